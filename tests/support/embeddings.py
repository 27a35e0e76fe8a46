"""Embedding models for tests: the text decides the vector, and nothing is downloaded."""

from __future__ import annotations

import hashlib

import numpy as np
from langchain_core.embeddings import Embeddings


class HashEmbeddings(Embeddings):
    """A unit vector for each text, decided by the text: equal texts are equal, others nearly orthogonal."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        vector = np.random.default_rng(seed).standard_normal(1536)
        return [float(value) for value in vector / np.linalg.norm(vector)]


class NoisyEmbeddings(Embeddings):
    """As a real service: the text decides the vector, but no two answers are quite the same. It may be away."""

    def __init__(self) -> None:
        self.away: Exception | None = None
        self.answers = 0

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        if self.away is not None:
            raise self.away
        self.answers += 1
        noise = np.random.default_rng(self.answers).standard_normal(1536) / 1000
        made = np.array(HashEmbeddings().embed_query(text)) * 40 + noise
        return [float(value) for value in made / np.linalg.norm(made)]
