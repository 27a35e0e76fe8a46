"""`rollout assign-owners`: decides once to whom each legacy chunk belongs, and stores it.

One transaction takes the lock, reads, decides and writes the decisions, what the ledger owes for
them, and the new version that makes running processes take them over. A process that dies leaves
all of it or nothing; run again, it decides only what was not decided. A decision is never changed
here: what is in quarantine is taken out by hand, by `rollout quarantine`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import structlog
from psycopg.types.json import Jsonb

from rollout.errors import PreconditionError
from rollout.owner_report import AssignmentReport, Known, build, counts, render
from rollout.owner_rules import (
    Decision,
    DocumentRow,
    Earlier,
    Position,
    Reason,
    RowState,
    Status,
    decide,
)
from rollout.owner_sources import known_to_postgres, known_to_sqlite, rows_left_behind
from src.config import settings
from src.tools.rag_tools.migration.faiss_files import open_files
from src.tools.rag_tools.migration.faiss_records import BaseChunk
from src.tools.rag_tools.migration.settings import migration_settings
from src.tools.rag_tools.pgvector_store import Connection
from src.tools.rag_tools.store import normalise_text

__all__ = [
    "AssignmentReport",
    "Decision",
    "DocumentRow",
    "Earlier",
    "Known",
    "Position",
    "Reason",
    "RowState",
    "Status",
    "assign_owners",
    "decide",
    "exclusively",
    "owe_pgvector",
    "positions_in",
    "positions_of",
    "preview",
    "preview_directory",
    "record_version",
    "render",
    "rows_left_behind",
]

log = structlog.get_logger(__name__)

LOCK_TIMEOUT = "30s"
# Conflicts with itself and with writers, not with the backend's poll, which only reads.
LOCK = "LOCK TABLE owner_assignments IN SHARE ROW EXCLUSIVE MODE"
STORE = """
COPY legacy_chunks
    (docstore_id, position, source, document_id, user_id, ordinal, status, reason, decided_at)
FROM STDIN
"""
# FAISS holds the chunks already. pgvector's copy waits for backfill: the moment at which the
# background loop would find it due never comes. What is no longer wanted is left alone.
OWE = """
INSERT INTO vector_ledger (document_id, store, user_id, wanted, state, next_attempt_at)
SELECT d.document_id, s.store, d.user_id, 'present', s.state, s.due
FROM unnest(%(documents)s::int[], %(users)s::int[]) AS d (document_id, user_id)
CROSS JOIN (VALUES ('faiss', 'done', now()), ('pgvector', 'owed', 'infinity'::timestamptz))
    AS s (store, state, due)
ORDER BY d.document_id, s.store
ON CONFLICT (document_id, store) DO UPDATE
SET state = 'owed', attempts = 0, last_error = NULL, next_attempt_at = 'infinity',
    changed_at = clock_timestamp()
WHERE vector_ledger.store = 'pgvector' AND vector_ledger.wanted = 'present'
"""
VERSION = "INSERT INTO owner_assignments (actor, counts) VALUES (%s, %s) RETURNING version"


def assign_owners(
    connection: Connection,
    positions: Iterable[Position],
    *,
    actor: str,
    execute: bool,
    left_behind: Sequence[DocumentRow] = (),
    uploads: Path | None = None,
) -> AssignmentReport:
    """Decide every position that has no decision yet; without `execute` only say what would be.

    `positions`: the chunks of the FAISS directory that this release did not write itself.
    `left_behind`: rows that `import-sql` could not move. `uploads`: where to look for the files.
    Raises PreconditionError where a table is missing or somebody else holds the lock.
    """
    with exclusively(connection) if execute else _read_only(connection):
        known = known_to_postgres(connection, hold=execute, left_behind=left_behind)
        decisions = _decisions(positions, known)
        version = _store(connection, decisions, actor) if execute and decisions else None
    if version is not None:
        log.info("owners.assign.done", version=version, actor=actor, **counts(decisions))
    return build(decisions, known, uploads=uploads, version=version, executed=execute)


def preview(source_url: str, positions: Iterable[Position], *, uploads: Path | None = None) -> AssignmentReport:
    """The dry run on the old release's SQLite file, before anything of this release is there."""
    known = known_to_sqlite(source_url)
    return build(_decisions(positions, known), known, uploads=uploads)


def preview_directory(
    source_url: str, directory: Path | None = None, *, uploads: Path | None = None
) -> AssignmentReport:
    """`preview` of the old release's own FAISS directory, which is only read.

    Directory and folder of uploads are the configured ones where they are not given.
    """
    return preview(source_url, positions_in(directory), uploads=uploads or settings.UPLOAD_DIR)


def positions_in(directory: Path | None = None) -> list[Position]:
    """The chunks of the old release's own FAISS directory, which is only read."""
    chunks = open_files(directory or migration_settings.FAISS_INDEX_PATH).content.chunks
    found = zip(chunks.docstore_ids, chunks.metadatas, strict=True)
    return [
        Position(at, docstore_id, _text(metadata.get("source"))) for at, (docstore_id, metadata) in enumerate(found)
    ]


def positions_of(chunks: Iterable[BaseChunk]) -> list[Position]:
    """What `FaissStore.base_positions` yields, without the content."""
    return [Position(chunk.position, chunk.docstore_id, chunk.source or "") for chunk in chunks]


@contextmanager
def exclusively(connection: Connection) -> Iterator[None]:
    """A transaction in which nobody else decides about owners. Raises PreconditionError."""
    try:
        with connection.transaction():
            connection.execute("SELECT set_config('lock_timeout', %s, true)", (LOCK_TIMEOUT,))
            connection.execute(LOCK)
            yield
    except psycopg.errors.UndefinedTable as error:
        raise PreconditionError("the migration's tables are missing; run `alembic upgrade head` first") from error
    except psycopg.errors.LockNotAvailable as error:
        raise PreconditionError(
            f"another command decides about owners, or holds documents, for over {LOCK_TIMEOUT};"
            " nothing was changed. Run this again once it has ended"
        ) from error


def owe_pgvector(connection: Connection, owners: Mapping[int, int]) -> None:
    """pgvector owes these documents (user id by document id), also one that it had without the new
    chunks. The caller holds their rows and knows that they are not deleted."""
    documents = {"documents": list(owners), "users": list(owners.values())}
    connection.execute(OWE, documents)


def record_version(connection: Connection, actor: str, what: Mapping[str, Any]) -> int:
    """The new version, which makes every running process read the owners again."""
    row = connection.execute(VERSION, (actor, Jsonb(dict(what)))).fetchone()
    return int(row[0])  # type: ignore[index]  # INSERT ... RETURNING gives a row


def _text(source: object) -> str:
    return source if isinstance(source, str) else ""


@contextmanager
def _read_only(connection: Connection) -> Iterator[None]:
    with connection.transaction():
        connection.execute("SET TRANSACTION READ ONLY")
        yield


def _decisions(positions: Iterable[Position], known: Known) -> list[Decision]:
    undecided = (chunk for chunk in positions if chunk.docstore_id not in known.decided)
    return decide(undecided, known.rows, known.users.keys(), known.earlier)


def _store(connection: Connection, decisions: Sequence[Decision], actor: str) -> int:
    _copy(connection, decisions)
    owners = {
        one.document_id: one.user_id for one in decisions if one.document_id is not None and one.user_id is not None
    }
    owe_pgvector(connection, owners)
    return record_version(connection, actor, {"action": "assign", **counts(decisions)})


def _copy(connection: Connection, decisions: Iterable[Decision]) -> None:
    # One moment for all of them, by which a run in quarantine stays one group.
    moment = connection.execute("SELECT now()").fetchone()
    with connection.cursor() as cursor, cursor.copy(STORE) as copy:
        for one in decisions:
            copy.write_row(
                (
                    one.docstore_id, one.position, normalise_text(one.source), one.document_id,
                    one.user_id, one.ordinal, one.status, one.reason, *(moment or ()),
                )
            )  # fmt: skip
