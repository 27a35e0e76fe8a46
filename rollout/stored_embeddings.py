"""Embeddings without a model: a text gets a stored vector, turned a little. For rehearsals on a copy.

A text that the index holds gets its own vector; any other gets the vector of a chunk chosen by its hash.
The turn is decided by the text alone, so the same text always gets the same vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from langchain_core.embeddings import Embeddings
from numpy.typing import NDArray

TURN = 0.05


class StoredEmbeddings(Embeddings):
    """`known` maps a chunk's content to its row in `vectors`, float32, shape (n, 1536), length 1."""

    def __init__(self, known: Mapping[str, int], vectors: NDArray[np.float32]) -> None:
        self.known = known
        self.vectors = vectors

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self._vector(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return self._vector(text)

    def _vector(self, text: str) -> list[float]:
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        row = self.known.get(text, seed % len(self.vectors))
        noise = np.random.default_rng(seed).standard_normal(self.vectors.shape[1])
        turned = self.vectors[row] + TURN * noise / np.linalg.norm(noise)
        return [float(value) for value in turned / np.linalg.norm(turned)]
