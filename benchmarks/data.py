"""The rows that every benchmark works on: seeded, clustered, of users of unequal size.

A user's chunks lie around a centre of their own, those of one document around a point near it, so "near"
queries (beside an own chunk) and "far" ones (beside somebody else's) differ as they do in use.
"""

from __future__ import annotations

import random
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIMENSION = 1536
USERS = 200
SMALL, MEDIUM = 10, 500
CHUNKS_OF_A_DOCUMENT = 20
WORDS = ("harbour", "tide", "lantern", "granite", "meadow", "copper", "violet", "thunder", "orchard", "ember")


@dataclass(frozen=True, slots=True)
class Document:
    """A document and where its chunks lie, by position."""

    id: int
    user_id: int
    positions: range

    @property
    def source(self) -> str:
        return f"uploads/{self.id}.pdf"


@dataclass(frozen=True)
class Dataset:
    """`vectors`: float32, (chunks, 1536), length 1. Users are numbered from 1, the largest first."""

    sizes: tuple[int, ...]
    documents: tuple[Document, ...]
    vectors: NDArray[np.float32]
    seed: int

    @property
    def chunks(self) -> int:
        return len(self.vectors)

    @property
    def giant(self) -> int:
        return 1

    @property
    def medium(self) -> int:
        return 2

    @property
    def small(self) -> int:
        return 3

    @cached_property
    def ids(self) -> list[uuid.UUID]:
        chance = random.Random(self.seed)
        return [uuid.UUID(int=chance.getrandbits(128), version=4) for _ in range(self.chunks)]

    @cached_property
    def positions_of(self) -> dict[int, NDArray[np.int64]]:
        """Each user's positions."""
        found: dict[int, list[int]] = {}
        for document in self.documents:
            found.setdefault(document.user_id, []).extend(document.positions)
        return {user: np.array(sorted(mine), np.int64) for user, mine in found.items()}

    def content(self, position: int) -> str:
        """About 800 characters."""
        words = random.Random(position).choices(WORDS, k=115)
        return f"{position}: {' '.join(words)}."

    def metadata(self, document: Document, position: int) -> dict[str, Any]:
        page = position - document.positions.start
        return {"source": document.source, "file_name": f"{document.id}.pdf", "page": page}

    def near(self, user_id: int, count: int, seed: int = 1) -> NDArray[np.float32]:
        """Queries beside chunks of the user's own."""
        return self._beside(self.positions_of[user_id], count, seed)

    def far(self, user_id: int, count: int, seed: int = 2) -> NDArray[np.float32]:
        """Queries beside chunks of other users."""
        others = np.setdiff1d(np.arange(self.chunks), self.positions_of[user_id], assume_unique=True)
        return self._beside(others, count, seed)

    def best(self, user_id: int, query: NDArray[np.float32], k: int) -> set[uuid.UUID]:
        """The true answer, by brute force."""
        mine = self.positions_of[user_id]
        order = np.argsort(-(self.vectors[mine] @ query), kind="stable")[:k]
        return {self.ids[position] for position in mine[order]}

    def _beside(self, positions: NDArray[np.int64], count: int, seed: int) -> NDArray[np.float32]:
        chance = np.random.default_rng(seed)
        drawn = self.vectors[chance.choice(positions, count)]
        return unit(drawn + 0.35 * unit(chance.standard_normal(drawn.shape, dtype=np.float32)))


def make(chunks: int, *, seed: int = 0) -> Dataset:
    """`chunks` of 200 users; the largest has a fifth, one has 500, more than half have 10."""
    sizes = user_sizes(chunks)
    documents = tuple(_documents(sizes, seed))
    return Dataset(sizes, documents, _vectors(documents, chunks, seed), seed)


def user_sizes(chunks: int) -> tuple[int, ...]:
    giant, medium = chunks // 5, min(MEDIUM, chunks // 4)
    if chunks < 2 * USERS * SMALL:
        small = (chunks - giant - medium) // SMALL
        rest = chunks - giant - medium - small * SMALL
        return (giant, medium, *[SMALL] * small, *([rest] if rest else []))
    small = USERS * 3 // 5
    others = USERS - 2 - small
    left = chunks - giant - medium - small * SMALL
    weights = 1 / np.arange(1, others + 1)
    shares = np.maximum(SMALL, np.floor(left * weights / weights.sum())).astype(int)
    shares[0] += left - shares.sum()
    return (giant, medium, *[SMALL] * small, *(int(share) for share in shares))


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    made: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return made


def _documents(sizes: tuple[int, ...], seed: int) -> Iterator[Document]:
    """In the order of their uploads, which is nobody's in particular."""
    uploads = [
        (user, min(CHUNKS_OF_A_DOCUMENT, size - start))
        for user, size in enumerate(sizes, 1)
        for start in range(0, size, CHUNKS_OF_A_DOCUMENT)
    ]
    random.Random(seed).shuffle(uploads)
    at = 0
    for number, (user, count) in enumerate(uploads, 1):
        yield Document(number, user, range(at, at + count))
        at += count


def _vectors(documents: tuple[Document, ...], chunks: int, seed: int) -> NDArray[np.float32]:
    chance = np.random.default_rng(seed)
    users = max(document.user_id for document in documents)
    centres = unit(chance.standard_normal((users + 1, DIMENSION), dtype=np.float32))
    # In a file without a name: of a million, the machine may take the memory back.
    with tempfile.TemporaryFile() as file:
        rows = np.memmap(file, np.float32, "w+", shape=(chunks, DIMENSION))
    for document in documents:
        topic = unit(chance.standard_normal(DIMENSION, dtype=np.float32))
        noise = chance.standard_normal((len(document.positions), DIMENSION), dtype=np.float32)
        spread = centres[document.user_id] + 0.8 * topic + 0.7 * unit(noise)
        rows[document.positions.start : document.positions.stop] = unit(spread)
    # Written now, and not while something is measured.
    rows.flush()
    return rows
