"""Chunks in PostgreSQL, scoped by user twice: a predicate in every statement, and row-level security.

Every write is one transaction: after a crash a document's chunks are all there or none is.
A read is one round trip: the user's scope, the time limit and the query travel in one pipeline,
which PostgreSQL runs as one transaction.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from pgvector.psycopg import register_vector
from psycopg.rows import TupleRow
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool, PoolTimeout

from src.config import settings
from src.tools.rag_tools import faults
from src.tools.rag_tools.giants import Giants
from src.tools.rag_tools.store import (
    Chunk,
    DocumentGoneError,
    Hit,
    InventoryRow,
    StoreError,
    Vector,
)

Connection = psycopg.Connection[TupleRow]
Pool = ConnectionPool[Connection]

MINIMUM_PGVECTOR = (0, 8, 4)
READ_TIMEOUT_MS = 5_000
WRITE_TIMEOUT_MS = 30_000
WAIT_SECONDS = 10.0
"""For a connection, or for one's turn to search."""
SEARCHES_AT_ONCE = max(4, 2 * (os.cpu_count() or 1))
"""In one process; more would only take the processor from one another, and the unluckiest wait twice as long."""

SCOPE = "SELECT set_config('app.user_id', %s, true), set_config('statement_timeout', %s, true)"
# The distance is computed once a row; as part of two expressions it would be twice.
SEARCH = """
SELECT id, document_id, content, metadata, -distance AS similarity
FROM (
    SELECT id, document_id, content, metadata, embedding <#> %(vector)b AS distance
    FROM document_chunks
    WHERE user_id = %(user_id)s
    ORDER BY distance, id
    LIMIT %(k)s
) AS nearest
"""
# The copy in half the width ranks all of them; what it takes for the best is ranked again by the vectors
# themselves. The subquery makes PostgreSQL convert the question once, not once a row.
SEARCH_GIANT = """
WITH best AS MATERIALIZED (
    SELECT id FROM chunk_halves
    WHERE user_id = %(user_id)s
    ORDER BY half <#> (SELECT %(vector)b::halfvec(1536)), id
    LIMIT 4 * %(k)s + 40
)
SELECT id, document_id, content, metadata, -(embedding <#> %(vector)b) AS similarity
FROM document_chunks
WHERE user_id = %(user_id)s AND id = ANY (ARRAY(SELECT id FROM best))
ORDER BY embedding <#> %(vector)b, id
LIMIT %(k)s
"""
INSERT = """
INSERT INTO document_chunks
    (user_id, id, document_id, ordinal, content, content_sha256, metadata, embedding)
VALUES (%s, %s, %s, %s, %s, %s, %s, %b)
ON CONFLICT (user_id, id) DO NOTHING
"""
# One probe of a small index for everybody else.
KEEP_HALVES = """
INSERT INTO chunk_halves (user_id, id, half)
SELECT user_id, id, embedding::halfvec(1536) FROM document_chunks
WHERE user_id = %(user_id)s AND id = ANY (%(ids)s)
  AND EXISTS (SELECT FROM giant_users WHERE user_id = %(user_id)s)
ON CONFLICT (user_id, id) DO NOTHING
"""
DELETE = "DELETE FROM document_chunks WHERE user_id = %s AND document_id = %s"
HOLD = """
SELECT 1 FROM documents
WHERE id = %s AND user_id = %s AND status IN ('received', 'indexing', 'ready') FOR SHARE
"""
# Hashed where the rows are: 64 bytes a chunk cross the wire instead of 7 kB.
INVENTORY = """
SELECT id, document_id, sha256(convert_to(content, 'UTF8')), sha256(vector_send(embedding))
FROM document_chunks WHERE user_id = %s ORDER BY id
"""
DOCUMENT = """
SELECT id, ordinal, content, metadata, embedding FROM document_chunks
WHERE user_id = %s AND document_id = %s ORDER BY ordinal, id
"""
ROLE = """
SELECT current_user, r.rolsuper, r.rolbypassrls,
       pg_has_role(current_user, c.relowner, 'MEMBER') AS owns
FROM pg_roles r, pg_class c
WHERE r.rolname = current_user AND c.oid = to_regclass('public.document_chunks')
"""


class RoleError(StoreError):
    """The backend's database role could read past row-level security."""


class SchemaError(StoreError):
    """The database lacks what the document tools need."""


def open_pool(conninfo: str, size: int, *, name: str) -> Pool:
    """A pool of autocommit connections that send and receive vectors in binary. Close it after use."""
    return ConnectionPool(
        conninfo,
        min_size=min(2, size),
        max_size=size,
        name=name,
        kwargs={"autocommit": True, **({} if settings.DATABASE_PREPARE else {"prepare_threshold": None})},
        configure=_configure,
        timeout=WAIT_SECONDS,
        open=True,
    )


def _configure(connection: Connection) -> None:
    # Without the extension a connection is made all the same, so that a check can say what is missing.
    with suppress(psycopg.ProgrammingError):
        register_vector(connection)


def check_role(connection: Connection) -> None:
    """RoleError where the role is a superuser, bypasses row-level security, or owns the table."""
    row = connection.execute(ROLE).fetchone()
    if row is None:
        raise SchemaError("table document_chunks is missing; run `alembic upgrade head` with DATABASE_ADMIN_URL set")
    role, superuser, bypasses, owns = row
    if superuser or bypasses or owns:
        why = "is a superuser" if superuser else "bypasses it" if bypasses else "owns the table"
        raise RoleError(
            f"role {role!r} is not held by row-level security ({why});"
            " DATABASE_URL must name victus_app, which is neither owner, superuser nor BYPASSRLS"
        )


def check_extension(connection: Connection) -> str:
    """The version of pgvector; SchemaError where it is missing or older than 0.8.4."""
    row = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
    if row is None:
        raise SchemaError("pgvector is missing in this database; run CREATE EXTENSION vector as its owner")
    version = str(row[0])
    if tuple(int(part) for part in version.split(".")) < MINIMUM_PGVECTOR:
        raise SchemaError(
            f"pgvector {version} is too old, 0.8.4 or later is needed;"
            " update the package, then run ALTER EXTENSION vector UPDATE"
        )
    return version


class PgvectorStore:
    """The VectorStore on `document_chunks`."""

    def __init__(self, pool: Pool, *, read_timeout_ms: int = READ_TIMEOUT_MS, giants: Giants | None = None) -> None:
        self.pool = pool
        self.read_timeout_ms = read_timeout_ms
        self.giants = giants or Giants(pool)
        self._turns = threading.Semaphore(SEARCHES_AT_ONCE)

    def search(self, user_id: int, vector: Vector, k: int) -> list[Hit]:
        """The k nearest of the user's own chunks, by a scan of all of them; StoreError when PostgreSQL is away."""
        with unavailable("search"), self._turn():
            try:
                return self._search(user_id, vector, k)
            except (psycopg.errors.QueryCanceled, PoolTimeout):
                raise
            except psycopg.OperationalError:
                # A server that was restarted leaves dead connections in the pool; a read may be asked twice.
                self.pool.check()
                return self._search(user_id, vector, k)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._turns.acquire(timeout=WAIT_SECONDS):
            raise PoolTimeout(f"{SEARCHES_AT_ONCE} others have been searching for {WAIT_SECONDS:.0f} s")
        try:
            yield
        finally:
            self._turns.release()

    def _search(self, user_id: int, vector: Vector, k: int) -> list[Hit]:
        statement = SEARCH_GIANT if user_id in self.giants.ready else SEARCH
        parameters = {"user_id": user_id, "vector": vector, "k": k}
        with self.pool.connection() as connection:
            begun = time.perf_counter()
            with connection.pipeline():
                connection.execute(SCOPE, (str(user_id), str(self.read_timeout_ms)))
                cursor = connection.execute(statement, parameters, binary=True)
            self.giants.searched(user_id, time.perf_counter() - begun)
            return [Hit(*row) for row in cursor]

    def upsert(self, user_id: int, document_id: int, chunks: Sequence[Chunk]) -> None:
        with self.transaction(user_id, point="pgvector.present") as connection:
            if connection.execute(HOLD, (document_id, user_id)).fetchone() is None:
                raise DocumentGoneError(f"document {document_id} was deleted or given up; nothing written")
            insert_chunks(connection, user_id, chunks)

    def delete(self, user_id: int, document_id: int) -> None:
        with self.transaction(user_id, point="pgvector.absent") as connection:
            connection.execute(DELETE, (user_id, document_id))

    def inventory(self, user_id: int) -> Iterator[InventoryRow]:
        with self.transaction(user_id) as connection, connection.cursor("inventory") as cursor:
            cursor.itersize = 2_000
            for row in cursor.execute(INVENTORY, (user_id,)):
                yield InventoryRow(*row)

    def document(self, user_id: int, document_id: int) -> list[Chunk]:
        """The document's chunks in order, with their vectors; empty when it holds none."""
        with self.transaction(user_id) as connection:
            rows = connection.execute(DOCUMENT, (user_id, document_id), binary=True).fetchall()
        return [
            Chunk(id_, document_id, ordinal, content, metadata, _as_array(embedding))
            for id_, ordinal, content, metadata, embedding in rows
        ]

    @contextmanager
    def transaction(self, user_id: int, *, point: str = "pgvector.read") -> Iterator[Connection]:
        """A transaction in the scope of `user_id`; a psycopg error inside becomes a StoreError."""
        with (
            unavailable("write"),
            faults.point(point),
            self.pool.connection() as connection,
            connection.transaction(),
        ):
            connection.execute(SCOPE, (str(user_id), str(WRITE_TIMEOUT_MS)))
            yield connection


def insert_chunks(connection: Connection, user_id: int, chunks: Iterable[Chunk]) -> None:
    """Insert those that are not there yet. The caller holds the document and the user's scope."""
    rows = [
        (
            user_id, chunk.id, chunk.document_id, chunk.ordinal, chunk.content,
            chunk.content_sha256, Jsonb(dict(chunk.metadata)), chunk.vector,
        )
        for chunk in chunks
    ]  # fmt: skip
    with connection.pipeline():
        connection.cursor().executemany(INSERT, rows)
        # Last: a writer that holds the table and does not see the user announced as a giant is waited for.
        connection.execute(KEEP_HALVES, {"user_id": user_id, "ids": [row[1] for row in rows]})


@contextmanager
def unavailable(doing: str) -> Iterator[None]:
    """Turn the driver's errors into a StoreError that says what to do."""
    try:
        yield
    except psycopg.errors.QueryCanceled as error:
        raise StoreError(f"PostgreSQL did not finish the {doing} in time; it may be overloaded") from error
    except psycopg.errors.ReadOnlySqlTransaction as error:
        raise StoreError(
            f"PostgreSQL is read-only, so the {doing} was refused; point DATABASE_URL at the primary"
        ) from error
    except (psycopg.Error, PoolTimeout) as error:
        raise StoreError(f"PostgreSQL is away or refused the {doing}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _as_array(embedding: Any) -> Vector:
    made: Vector = embedding.to_numpy() if hasattr(embedding, "to_numpy") else embedding
    return made
