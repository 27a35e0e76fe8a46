"""The raw limits: what PostgreSQL and a driver can do with the same rows, and nothing else of this project's."""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from pgvector.psycopg import register_vector

from src.database import Role

if TYPE_CHECKING:
    from benchmarks.bench import Bench

COPY = """
COPY document_chunks (user_id, id, document_id, ordinal, content, content_sha256, metadata, embedding)
FROM STDIN (FORMAT BINARY)
"""
BLOCK = 500
IDS = struct.Struct(">hiii16siiii")
SCOPE = "SELECT set_config('app.user_id', %s, true)"
EXACT = """
SELECT id, document_id, content, metadata, embedding <#> %(vector)b FROM document_chunks
WHERE user_id = %(user_id)s ORDER BY embedding <#> %(vector)b LIMIT %(k)s
"""


def raw_copy(bench: Bench) -> list[float]:
    """Seconds of one binary COPY of all rows into the same table with the same indexes, one transaction.

    From arrays in memory, in blocks built with numpy.
    """
    database = bench.site.database()
    ready = list(_texts(bench))
    with bench.site.connect(database) as connection:
        begun = time.perf_counter()
        with connection.cursor().copy(COPY) as copy:
            copy.write(b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0))
            for start in range(0, len(ready), BLOCK):
                copy.write(_block(bench.data.vectors[start : start + BLOCK], ready[start : start + BLOCK]))
            copy.write(struct.pack(">h", -1))
        seconds = time.perf_counter() - begun
    bench.site.server.drop_database(database)
    return [seconds]


def _texts(bench: Bench) -> Iterator[tuple[int, bytes, int, int, bytes, bytes]]:
    data = bench.data
    for document in data.documents:
        for ordinal, at in enumerate(document.positions):
            metadata = json.dumps(data.metadata(document, at)).encode()
            yield document.user_id, data.ids[at].bytes, document.id, ordinal, data.content(at).encode(), metadata


def _block(
    vectors: np.ndarray[Any, np.dtype[np.float32]], rows: list[tuple[int, bytes, int, int, bytes, bytes]]
) -> bytes:
    big_endian = vectors.astype(">f4")
    parts = []
    for vector, (user, id_, document, ordinal, content, metadata) in zip(big_endian, rows, strict=True):
        parts += [
            IDS.pack(8, 4, user, 16, id_, 4, document, 4, ordinal),
            struct.pack(">i", len(content)), content,
            struct.pack(">i", 32), hashlib.sha256(content).digest(),
            struct.pack(">iB", 1 + len(metadata), 1), metadata,
            struct.pack(">ihh", 4 + 4 * len(vector), len(vector), 0), vector.tobytes(),
        ]  # fmt: skip
    return b"".join(parts)


@contextmanager
def raw_search(bench: Bench, database: str) -> Iterator[Callable[[int, Any, int], list[Any]]]:
    """The prepared exact scan with its set_config, in one pipeline, under row-level security."""
    with psycopg.connect(bench.site.conninfo(database, Role.APP), autocommit=True) as connection:
        register_vector(connection)

        def search(user_id: int, vector: Any, k: int) -> list[Any]:
            with connection.pipeline():
                connection.execute(SCOPE, (str(user_id),))
                cursor = connection.execute(
                    EXACT, {"user_id": user_id, "vector": vector, "k": k}, binary=True, prepare=True
                )
            return cursor.fetchall()

        yield search
