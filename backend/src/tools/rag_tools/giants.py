"""Users with very many chunks: which they are, and how somebody becomes one.

Their searches scan `chunk_halves`, a copy of their vectors in half the width, and rank the best of it by the
vectors themselves. Everybody else's statements touch nothing of this.

Becoming one has three steps, so that no chunk is missed and nobody is held up: the row in `giant_users`, by
which every writer that begins from then on adds to the copy; waiting for the writers that began before; then
copying what is there. Only then is the row `ready`, and searches use the copy. A process that dies in between
leaves a row that is not ready; the next look goes on from there.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from src.tools.rag_tools.pgvector_store import Connection, Pool

log = structlog.get_logger(__name__)

GIANT_CHUNKS = 5_000
"""From here on the copy is at least twice as fast; see docs/decisions/giant-users.md."""
SLOW_SECONDS = 0.005
"""Nobody whose search is faster needs to be looked at."""
LOOK_SECONDS = 30.0
COPY_DOCUMENTS = 50
WRITER_SECONDS = 10.0
"""Who writes for longer than this is waited for at the next look."""

SCOPE = "SELECT set_config('app.user_id', %s, true)"
READY = "SELECT user_id FROM giant_users WHERE ready"
UNFINISHED = "SELECT user_id FROM giant_users WHERE NOT ready"
HAS_MANY = "SELECT 1 FROM document_chunks WHERE user_id = %s OFFSET %s LIMIT 1"
ANNOUNCE = "INSERT INTO giant_users (user_id) VALUES (%s) ON CONFLICT DO NOTHING"
# Who may write the table now. A lock on it would be waited for behind a vacuum, and other writers behind the lock.
WRITERS = """
SELECT virtualtransaction FROM pg_locks
WHERE relation = 'document_chunks'::regclass AND mode = 'RowExclusiveLock'
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
DOCUMENTS = "SELECT DISTINCT document_id FROM document_chunks WHERE user_id = %s ORDER BY document_id"
# FOR KEY SHARE leaves out what is being deleted, which the foreign key would refuse.
COPY = """
INSERT INTO chunk_halves (user_id, id, half)
SELECT user_id, id, embedding::halfvec(1536) FROM document_chunks
WHERE user_id = %s AND document_id = ANY (%s)
FOR KEY SHARE
ON CONFLICT (user_id, id) DO NOTHING
"""
DONE = "UPDATE giant_users SET ready = true WHERE user_id = %s"


class Giants:
    """What one process knows of them. Thread-safe; a process that knows too little is only slower."""

    def __init__(self, pool: Pool, *, chunks: int = GIANT_CHUNKS) -> None:
        self.pool = pool
        self.chunks = chunks
        self.ready: frozenset[int] = frozenset()
        self._suspects: set[int] = set()
        self._lock = threading.Lock()

    def searched(self, user_id: int, seconds: float) -> None:
        """A search of the user's own chunks took that long."""
        if seconds > SLOW_SECONDS and user_id not in self.ready:
            self.suspect(user_id)

    def suspect(self, user_id: int) -> None:
        """Count the user's chunks at the next look."""
        with self._lock:
            self._suspects.add(user_id)

    def load(self, connection: Connection) -> None:
        """Take over who is ready."""
        self.ready = frozenset(row[0] for row in connection.execute(READY))

    def look(self) -> None:
        """Take over who is ready, and make giants of the suspects that are; a step of a loop."""
        with self._lock:
            suspects, self._suspects = self._suspects, set()
        with self.pool.connection() as connection:
            unfinished = {row[0] for row in connection.execute(UNFINISHED)}
            for user_id in sorted(unfinished | suspects - self.ready):
                if user_id in unfinished or has_many(connection, user_id, self.chunks):
                    make_giant(connection, user_id)
            self.load(connection)


def has_many(connection: Connection, user_id: int, chunks: int) -> bool:
    """Whether the user has at least that many chunks."""
    with connection.transaction():
        connection.execute(SCOPE, (str(user_id),))
        return connection.execute(HAS_MANY, (user_id, chunks - 1)).fetchone() is not None


def make_giant(connection: Connection, user_id: int) -> None:
    """Copy the user's vectors, on an autocommit connection. Where a writer takes long, a later call goes on."""
    connection.execute(ANNOUNCE, (user_id,))
    if not _writers_ended(connection):
        log.info("giants.copy.postponed", user_id=user_id)
        return
    documents = _documents(connection, user_id)
    for start in range(0, len(documents), COPY_DOCUMENTS):
        with connection.transaction():
            connection.execute(SCOPE, (str(user_id),))
            connection.execute(COPY, (user_id, documents[start : start + COPY_DOCUMENTS]))
    connection.execute(DONE, (user_id,))
    log.info("giants.copy.done", user_id=user_id, documents=len(documents))


def _writers_ended(connection: Connection) -> bool:
    """Wait for the transactions that write now: who begins to later sees the announcement."""
    end = time.monotonic() + WRITER_SECONDS
    before = _writers(connection)
    while before and time.monotonic() < end:
        # No function of PostgreSQL waits for a transaction to end.
        time.sleep(0.05)
        before &= _writers(connection)
    return not before


def _writers(connection: Connection) -> set[str]:
    return {row[0] for row in connection.execute(WRITERS)}


def _documents(connection: Connection, user_id: int) -> list[int]:
    with connection.transaction():
        connection.execute(SCOPE, (str(user_id),))
        return [row[0] for row in connection.execute(DOCUMENTS, (user_id,))]
