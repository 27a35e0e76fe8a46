"""One batch of the backfill: some documents that pgvector is owed, copied in one transaction.

The transaction locks the documents' ledger rows, copies their chunks and marks them done, so all of
it happens or nothing. A deletion needs the same rows: one that came first leaves its document out,
one that comes later waits and then deletes what was copied. Rows that somebody else is at work on
are left out, not waited for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import psycopg

from rollout.copy_format import COPY, HEADER, TRAILER, blocks
from rollout.errors import RefusedError
from src.tools.rag_tools import faults
from src.tools.rag_tools.migration import ledger
from src.tools.rag_tools.migration.faiss_store import FaissStore
from src.tools.rag_tools.migration.flags import View, latest
from src.tools.rag_tools.migration.ledger import ATTEMPTS_BEFORE_ASIDE, Entry, Wanted
from src.tools.rag_tools.migration.settle import PayloadMissingError
from src.tools.rag_tools.migration.stages import ROUTING, Store
from src.tools.rag_tools.pgvector_store import Connection
from src.tools.rag_tools.store import Chunk, InvalidVectorError, StoreError

OF_ONE_DOCUMENT = (
    InvalidVectorError, PayloadMissingError, psycopg.DataError, psycopg.IntegrityError,
)  # fmt: skip

FROM_FAISS = """
FROM vector_ledger l
JOIN vector_ledger f ON f.document_id = l.document_id AND f.store = 'faiss'
    AND f.wanted = 'present' AND f.state = 'done'
LEFT JOIN documents d ON d.id = l.document_id
WHERE l.store = 'pgvector' AND l.wanted = 'present' AND l.state = 'owed'
"""
TOTAL = f"SELECT count(*) {FROM_FAISS}"
NEXT = f"""
SELECT l.document_id, l.user_id, l.attempts, coalesce(d.path, '') {FROM_FAISS}
    AND l.document_id > %(after)s AND NOT l.document_id = ANY (%(failed)s)
ORDER BY l.document_id LIMIT %(limit)s
"""
LOCK_NEXT = f"{NEXT} FOR UPDATE OF l SKIP LOCKED"
# What a repair or a hand has left of documents that are owed.
REMOVE = """
DELETE FROM document_chunks c USING unnest(%s::int[], %s::int[]) AS owed (user_id, document_id)
WHERE c.user_id = owed.user_id AND c.document_id = owed.document_id
"""
# Of those who are giants by now: a first backfill makes nobody one before its end.
KEEP_HALVES = """
INSERT INTO chunk_halves (user_id, id, half)
SELECT c.user_id, c.id, c.embedding::halfvec(1536)
FROM unnest(%s::int[], %s::int[]) AS owed (user_id, document_id)
JOIN giant_users USING (user_id)
JOIN document_chunks c ON c.user_id = owed.user_id AND c.document_id = owed.document_id
ON CONFLICT (user_id, id) DO NOTHING
"""
DONE = """
UPDATE vector_ledger SET state = 'done', last_error = NULL, changed_at = clock_timestamp()
WHERE document_id = ANY (%s) AND store = 'pgvector'
"""
STILL_OWED = """
SELECT 1 FROM vector_ledger
WHERE document_id = %s AND store = 'pgvector' AND wanted = 'present' AND state = 'owed'
"""
REMAINING = """
SELECT count(*) FROM vector_ledger
WHERE store = 'pgvector' AND wanted = 'present' AND state <> 'done'
"""


@dataclass(frozen=True, slots=True)
class Owed:
    """A document that pgvector is owed. `path`: where its upload lies or lay, empty for none."""

    document_id: int
    user_id: int
    attempts: int
    path: str


@dataclass(slots=True)
class Batch:
    """What was copied, or counted, so far."""

    documents: list[Owed] = field(default_factory=list)
    chunks: int = 0
    bytes: int = 0


class CannotCopyError(StoreError):
    """A document of the batch cannot be copied, so none was. `documents`: those up to it."""

    def __init__(self, documents: Sequence[Owed], cause: Exception) -> None:
        super().__init__(f"document {documents[-1].document_id}: {_reason(cause)}")
        self.documents = documents
        self.mends = isinstance(cause, PayloadMissingError)


def require_both_written(connection: Connection) -> View:
    """The last transition; RefusedError unless its stage writes both stores."""
    view = latest(connection)
    writes = ROUTING[view.stage].writes
    if len(writes) < len(Store):
        raise RefusedError(
            f"stage {view.stage} (transition {view.transition_id}) writes only {writes[0]}, the"
            " backfill needs one that writes both stores: from off `rollout advance`, from complete"
            " `rollout rollback`"
        )
    return view


def total(connection: Connection) -> int:
    """How many documents a backfill begun now would copy."""
    return _count(connection, TOTAL)


def remaining(connection: Connection) -> int:
    """How many documents pgvector is owed, for whatever reason, set aside included."""
    return _count(connection, REMAINING)


def next_owed(
    connection: Connection, *, after: int, failed: Sequence[int], limit: int, lock: bool = False
) -> list[Owed]:
    """In order of id the documents that pgvector is owed and FAISS has, without those `failed`."""
    parameters = {"after": after, "failed": list(failed), "limit": limit}
    rows = connection.execute(LOCK_NEXT if lock else NEXT, parameters)
    return [Owed(*row) for row in rows]


def copy_batch(
    connection: Connection,
    faiss: FaissStore,
    *,
    after: int,
    failed: Sequence[int],
    documents: int,
    chunks: int,
) -> Batch:
    """Copy the next documents after id `after`: at most `documents` with at most `chunks` in all.

    The first is copied whatever its size. Raises CannotCopyError, with nothing copied.
    """
    with faults.point("backfill.batch"), connection.transaction():
        require_both_written(connection)
        with faults.point("backfill.lock"):
            owed = next_owed(connection, after=after, failed=failed, limit=documents, lock=True)
        if not owed:
            return Batch()
        users, numbers = [each.user_id for each in owed], [each.document_id for each in owed]
        with faults.point("backfill.copy"):
            connection.execute(REMOVE, (users, numbers))
            batch = _send(connection, faiss, owed, chunks)
            connection.execute(KEEP_HALVES, (users, numbers))
        with faults.point("backfill.done"):
            connection.execute(DONE, ([each.document_id for each in batch.documents],))
        return batch


def count_document(faiss: FaissStore, owed: Owed, batch: Batch) -> None:
    """Read and check the document as for a copy, and add it to `batch`. Raises CannotCopyError."""
    try:
        chunks = _read(faiss, owed)
        batch.bytes += sum(map(len, blocks(owed.user_id, chunks)))
    except OF_ONE_DOCUMENT as error:
        raise CannotCopyError([owed], error) from error
    batch.chunks += len(chunks)
    batch.documents.append(owed)


def postpone(connection: Connection, owed: Owed, error: CannotCopyError) -> None:
    """Record why it was not copied, where it is still owed.

    What cannot mend is set aside at once: every attempt would read the same bytes.
    """
    view = latest(connection)
    attempts = owed.attempts if error.mends else ATTEMPTS_BEFORE_ASIDE
    entry = Entry(
        owed.document_id, Store.PGVECTOR, owed.user_id, Wanted.PRESENT, attempts,
        view.transition_id, view.stage,
    )  # fmt: skip
    jitter = random.random()  # noqa: S311 - nothing secret
    ledger.postpone(connection, entry, str(error), mends=error.mends, jitter=jitter)


def still_owed(connection: Connection, owed: Owed) -> bool:
    return connection.execute(STILL_OWED, (owed.document_id,)).fetchone() is not None


def _send(connection: Connection, faiss: FaissStore, owed: Sequence[Owed], limit: int) -> Batch:
    """Reads a document while PostgreSQL works on the one before."""
    batch = Batch()
    try:
        with connection.cursor().copy(COPY) as copy:
            copy.write(HEADER)
            for each in owed:
                batch.documents.append(each)
                chunks = _read(faiss, each)
                if batch.chunks and batch.chunks + len(chunks) > limit:
                    batch.documents.pop()  # read again, as the first of the next batch
                    break
                for block in blocks(each.user_id, chunks):
                    copy.write(block)
                    batch.bytes += len(block)
                batch.chunks += len(chunks)
            copy.write(TRAILER)
    except OF_ONE_DOCUMENT as error:
        raise CannotCopyError(batch.documents, error) from error
    return batch


def _read(faiss: FaissStore, owed: Owed) -> list[Chunk]:
    chunks = faiss.document(owed.document_id, owed.user_id)
    if not chunks:
        raise PayloadMissingError(
            "faiss is done in the ledger but holds no chunk of it; run `rollout verify`, and bring"
            " back the directory that it was in"
        )
    return chunks


def _reason(cause: Exception) -> str:
    if not isinstance(cause, psycopg.Error):
        return str(cause)
    first, _, _ = str(cause).strip().partition("\n")
    return f"PostgreSQL refuses a row ({first}); mend what is in its way, then settle it again"


def _count(connection: Connection, statement: str) -> int:
    row = connection.execute(statement).fetchone()
    return int(row[0]) if row else 0
