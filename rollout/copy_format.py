"""PostgreSQL's binary COPY of `document_chunks`, built block by block.

A row is packed by hand: going through an adapter for each of its eight values costs more than
hashing its content. The format is that of PostgreSQL's manual, COPY, "Binary Format": big-endian,
each value after its length. Only makes bytes, so a process that dies leaves nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from src.tools.rag_tools.store import DIMENSION, Chunk, InvalidVectorError, check_vectors

COPY = """
COPY document_chunks
    (user_id, id, document_id, ordinal, content, content_sha256, metadata, embedding)
FROM STDIN (FORMAT BINARY)
"""
HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
TRAILER = struct.pack(">h", -1)
BLOCK_ROWS = 32
"""About what a socket holds: PostgreSQL works on one block while the next is made."""

_IDS = struct.Struct(">hiii16siiii").pack
_LENGTH = struct.Struct(">i").pack
_HASH = struct.Struct(">i32s").pack
_JSONB = struct.Struct(">iB").pack
_VECTOR_BYTES = 4 * DIMENSION
_VECTOR = struct.pack(">ihh", 4 + _VECTOR_BYTES, DIMENSION, 0)
# One encoder for all rows; jsonb orders keys by itself.
_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def blocks(user_id: int, chunks: Sequence[Chunk]) -> Iterator[bytes]:
    """The rows of one document, without header and trailer, BLOCK_ROWS at a time.

    Raises InvalidVectorError at a block with a vector of another dimension or length than 1.
    """
    for start in range(0, len(chunks), BLOCK_ROWS):
        yield _block(user_id, chunks[start : start + BLOCK_ROWS])


def _block(user_id: int, chunks: Sequence[Chunk]) -> bytes:
    """Of each row the number of values, then each value after its length; jsonb's begins with 1."""
    vectors = _checked(chunks).astype(">f4").view(np.uint8).reshape(-1).data
    parts: list[bytes | memoryview] = []
    for row, chunk in enumerate(chunks):
        content = chunk.content.encode()
        metadata = _json(dict(chunk.metadata)).encode()
        parts += (
            _IDS(8, 4, user_id, 16, chunk.id.bytes, 4, chunk.document_id, 4, chunk.ordinal),
            _LENGTH(len(content)),
            content,
            _HASH(32, chunk.content_sha256),
            _JSONB(1 + len(metadata), 1),
            metadata,
            _VECTOR,
            vectors[row * _VECTOR_BYTES : (row + 1) * _VECTOR_BYTES],
        )
    return b"".join(parts)


def _checked(chunks: Sequence[Chunk]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    where = f"document {chunks[0].document_id} in FAISS"
    for chunk in chunks:
        if chunk.vector.shape != (DIMENSION,):
            raise InvalidVectorError(
                f"{where}: a vector has shape {chunk.vector.shape}, ({DIMENSION},) needed;"
                " use the model that made the index (text-embedding-3-small)"
            )
    return check_vectors(np.stack([chunk.vector for chunk in chunks]), where)
