"""The vectors: read from LangChain's index.faiss with every check, searched, and written again.

The one module that loads faiss, when the first directory is opened: what else is imported does without.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from src.tools.rag_tools.migration.faiss_disk import FaissDirectoryError
from src.tools.rag_tools.store import DIMENSION, UNIT_TOLERANCE, Vector

SLICE = 4096
BLOCK = 1 << 20

Positions = NDArray[np.int64]


class DamagedIndexError(FaissDirectoryError):
    """index.faiss is cut short, or is no FAISS index."""


class UnsupportedIndexError(FaissDirectoryError):
    """index.faiss is whole, but of a kind that is not searched exactly by cosine here."""


class WrongDimensionError(FaissDirectoryError):
    """The vectors of index.faiss are not of the dimension that the embedding model gives."""


class NotUnitVectorError(FaissDirectoryError):
    """A stored vector is not of length 1, so its distance says nothing of the cosine."""


class WrongLength(NamedTuple):
    """A vector that is no unit vector: where it is, and how long."""

    position: int
    length: float


def new_index() -> Any:
    """An IndexFlatL2 without vectors."""
    return faiss.IndexFlatL2(DIMENSION)


def read_index(path: Path) -> tuple[Any, WrongLength | None]:
    """The index in `path`, an IndexFlatL2 of our dimension, and its first vector that is not of length 1."""
    with path.open("rb"):
        pass  # faiss tells a file that may not be read from a damaged one only by its text
    try:
        index = faiss.read_index(str(path))
    except (RuntimeError, MemoryError) as error:
        # A damaged header may ask for more memory than there is.
        raise DamagedIndexError(
            f"{path} cannot be read as a FAISS index ({error}); restore index.faiss and index.pkl"
            " together from one backup"
        ) from error
    _refuse_kind(path, index)
    if index.d != DIMENSION:
        raise WrongDimensionError(
            f"{path} holds vectors of dimension {index.d}, {DIMENSION} needed: it was made with another embedding"
            " model; embed the uploads again with text-embedding-3-small"
        )
    return index, _wrong_length(index)


def write_blocks(index: Any, write: Callable[[bytes], int]) -> None:
    """The index as faiss saves it, block by block. An error of `write` comes through."""
    # SWIG makes this class at run time; the stubs do not know it.
    writer = faiss.PyCallbackIOWriter(write, BLOCK)  # type: ignore[attr-defined]
    faiss.write_index(index, writer)


def _refuse_kind(path: Path, index: Any) -> None:
    kind = type(index).__name__
    if index.metric_type == faiss.METRIC_INNER_PRODUCT:
        raise UnsupportedIndexError(
            f"{path} is a {kind} by inner product (METRIC_INNER_PRODUCT), an IndexFlatL2 is needed: build it again with"
            " LangChain's default distance strategy, and start with that"
        )
    if not isinstance(index, faiss.IndexFlat) or index.metric_type != faiss.METRIC_L2:
        raise UnsupportedIndexError(
            f"{path} is a {kind}, an IndexFlatL2 is needed, which is searched exactly: build one from the original"
            " vectors (index.reconstruct_n gives them back where they are kept whole)"
        )


def _wrong_length(index: Any) -> WrongLength | None:
    """In slices: the squares of the whole matrix would be a second copy of it."""
    if not index.ntotal:
        return None
    matrix = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(-1, index.d)
    for start in range(0, len(matrix), SLICE):
        rows = matrix[start : start + SLICE]
        lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        # Negated, so that NaN is refused too.
        bad = np.flatnonzero(~(np.abs(lengths - 1.0) <= UNIT_TOLERANCE))
        if bad.size:
            return WrongLength(start + int(bad[0]), float(lengths[bad[0]]))
    return None


def refuse_wrong_length(path: Path, wrong: WrongLength | None, docstore_ids: list[str]) -> None:
    """NotUnitVectorError that names the chunk."""
    if wrong is not None:
        raise NotUnitVectorError(
            f"{path}: the vector at position {wrong.position} (docstore id {docstore_ids[wrong.position]!r}) has length"
            f" {wrong.length:.4g}, 1 needed: another model made it, or the file is damaged; restore both files"
            " from one backup, or embed that upload again"
        )


class Vectors:
    """All vectors of one process under one numbering: those read from the files, then those added.

    They are two flat indexes, so that the first upload does not copy all that was read to make room.
    `saved` is searched and never changed.
    """

    def __init__(self, saved: Any) -> None:
        self._saved, self._added = saved, new_index()
        self._first_added: int = saved.ntotal

    def add(self, rows: NDArray[np.float32]) -> None:
        self._added.add(rows)

    def at(self, positions: Positions) -> NDArray[np.float32]:
        """A copy of those rows, shape (n, 1536)."""
        rows = np.empty((len(positions), DIMENSION), np.float32)
        for index, first, mine in self._parts(positions):
            if mine.any():
                rows[mine] = index.reconstruct_batch(positions[mine] - first)
        return rows

    def nearest(self, vector: Vector, among: Positions, count: int) -> tuple[NDArray[np.float32], Positions]:
        """Squared distances and positions of the `count` nearest of `among`, nearest first."""
        found = [
            _search(index, vector, among[mine] - first, first, min(count, int(mine.sum())))
            for index, first, mine in self._parts(among)
            if mine.any()
        ]
        distances = np.concatenate([part[0] for part in found])
        positions = np.concatenate([part[1] for part in found])
        order = np.argsort(distances, kind="stable")[:count]
        return distances[order], positions[order]

    def _parts(self, positions: Positions) -> list[tuple[Any, int, NDArray[np.bool_]]]:
        """Each index, the position of its first row, and which of `positions` are its own."""
        added = positions >= self._first_added
        return [(self._saved, 0, ~added), (self._added, self._first_added, added)]


def _search(
    index: Any, vector: Vector, rows: Positions, first: int, count: int
) -> tuple[NDArray[np.float32], Positions]:
    # An array selector reads only the rows that it names. faiss keeps a bare pointer to them: they
    # must outlive the search, and do as our argument. The stubs do not know keywords added at run time.
    selector = faiss.SearchParameters(sel=faiss.IDSelectorArray(rows))  # type: ignore[call-arg]
    distances, found = index.search(vector[None], count, params=selector)
    return distances[0], found[0] + first
