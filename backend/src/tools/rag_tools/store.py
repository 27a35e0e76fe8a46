"""What a chunk is and what a vector store does: the seam between the life of documents and where chunks lie.

Chunk ids and hashes are computed here and nowhere else, so both stores name and verify a chunk alike.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

DIMENSION = 1536
UNIT_TOLERANCE = 1e-3
CHUNK_NAMESPACE = uuid.UUID("5f0c3f55-4a5c-5f0e-9d0b-0d6b1f6a7c11")
_VECTOR_HEADER = struct.pack(">hh", DIMENSION, 0)

Vector = NDArray[np.float32]


class StoreError(Exception):
    """A vector store could not do what was asked; the message says what to do next."""


class InvalidVectorError(StoreError):
    """A vector has the wrong dimension, is not of length 1, or holds NaN or infinity."""


class DocumentGoneError(StoreError):
    """The document was deleted or given up; nothing may be written for it any more."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a document, as both stores hold it. `vector`: float32, shape (1536,), length 1."""

    id: uuid.UUID
    document_id: int
    ordinal: int
    content: str
    metadata: Mapping[str, Any]
    vector: Vector

    @property
    def content_sha256(self) -> bytes:
        """SHA-256 of the content in UTF-8, 32 bytes; PostgreSQL computes the same with sha256()."""
        return content_hash(self.content)


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer of a search. `similarity` is the cosine, -1 to 1, larger is nearer."""

    chunk_id: uuid.UUID
    document_id: int
    content: str
    metadata: Mapping[str, Any]
    similarity: float


@dataclass(frozen=True, slots=True)
class InventoryRow:
    """What verify compares of one chunk; hashes are 32 bytes of SHA-256."""

    chunk_id: uuid.UUID
    document_id: int
    content_sha256: bytes
    vector_sha256: bytes


class VectorStore(Protocol):
    """A place that holds chunks by user and document, and finds the nearest of a user's own.

    `upsert` replaces nothing: a document is immutable, so writing it twice leaves it as it was.
    `delete` is final: a later `upsert` of the same document raises DocumentGoneError.
    `search` returns at most k hits, best first, ties by chunk id, only of `user_id`.
    `inventory` streams in order of chunk id.
    All raise StoreError when the store is away.
    """

    def upsert(self, user_id: int, document_id: int, chunks: Sequence[Chunk]) -> None: ...

    def delete(self, user_id: int, document_id: int) -> None: ...

    def search(self, user_id: int, vector: Vector, k: int) -> list[Hit]: ...

    def inventory(self, user_id: int) -> Iterator[InventoryRow]: ...


def content_hash(content: str) -> bytes:
    return hashlib.sha256(content.encode()).digest()


def vector_hash(vector: Vector) -> bytes:
    """SHA-256 of pgvector's binary form (dimension, zero, big-endian float4), so SQL can compute it."""
    return hashlib.sha256(_VECTOR_HEADER + vector.astype(">f4").tobytes()).digest()


def vector_hashes(rows: NDArray[np.float32]) -> list[bytes]:
    """`vector_hash` of each row."""
    encoded = rows.astype(">f4").view(np.uint8).reshape(len(rows), 4 * DIMENSION)
    return [hashlib.sha256(_VECTOR_HEADER + row.tobytes()).digest() for row in encoded]


def chunk_id(document_id: int, ordinal: int, content: str) -> uuid.UUID:
    """UUIDv5 of document id, ordinal and content hash: the same document always gets the same ids."""
    return uuid.uuid5(CHUNK_NAMESPACE, f"{document_id}:{ordinal}:{content_hash(content).hex()}")


# migration
def legacy_chunk_id(docstore_id: str) -> uuid.UUID:
    """The docstore id itself where it is a UUID, else UUIDv5 of it."""
    try:
        return uuid.UUID(docstore_id)
    except ValueError:
        return uuid.uuid5(CHUNK_NAMESPACE, f"docstore:{normalise_text(docstore_id)}")


# end of migration


def normalise_text(text: str) -> str:
    """Text that PostgreSQL can hold: NUL becomes a space, a lone surrogate the replacement character."""
    text = text.replace("\0", " ")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def normalise_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata that JSON can hold: keys become text, NaN and infinity null, other types their text."""
    return {normalise_text(str(key)): _plain(value) for key, value in metadata.items()}


def check_vectors(vectors: Any, where: str) -> NDArray[np.float32]:
    """`vectors` as float32, shape (n, 1536), each checked for length 1 and NaN.

    Raises InvalidVectorError naming `where`, the row and what is wrong with it.
    """
    try:
        with np.errstate(over="ignore"):
            matrix = np.ascontiguousarray(vectors, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidVectorError(
            f"{where}: no vectors of one dimension ({error}); check the embedding service"
        ) from error
    if matrix.ndim != 2 or matrix.shape[1] != DIMENSION:
        got = matrix.shape[1] if matrix.ndim == 2 else f"shape {matrix.shape}"
        raise InvalidVectorError(
            f"{where}: vectors have dimension {got}, {DIMENSION} needed;"
            " use the model that made the index (text-embedding-3-small)"
        )
    lengths = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))
    bad = np.flatnonzero(~(np.abs(lengths - 1.0) <= UNIT_TOLERANCE))
    if bad.size:
        row = int(bad[0])
        raise InvalidVectorError(
            f"{where}: vector {row} ({bad.size} of {len(matrix)}) has length {lengths[row]:.4g}, 1 needed;"
            " embed the text again, or check the embedding service"
        )
    return matrix


def canonical_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _plain(value: Any) -> Any:
    match value:
        case str():
            return normalise_text(value)
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return normalise_metadata(value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case set() | frozenset():
            # Its order differs from process to process.
            return sorted((_plain(item) for item in value), key=canonical_json)
        case _:
            return normalise_text(str(value))
