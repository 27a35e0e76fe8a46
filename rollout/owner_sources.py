"""What the databases know about uploads: PostgreSQL, and the old release's SQLite file before it.

Only reads. Told to hold, it locks the rows that it read until the caller's transaction ends, so
that no document is deleted between a decision and its commit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rollout.legacy_sqlite import legacy_sqlite
from rollout.owner_report import Known, UserName
from rollout.owner_rules import DocumentRow, Earlier, RowState
from src.tools.rag_tools.pgvector_store import Connection

HAS_TABLES = "SELECT to_regclass('public.legacy_chunks') IS NOT NULL"
# A row whose presence the ledger wants without any legacy chunk is an upload to this release. The
# old release knew no other state than `ready`.
ROWS = """
SELECT d.id, d.user_id, d.path, d.filename,
       CASE WHEN d.status = 'deleted' OR EXISTS (
           SELECT FROM vector_ledger l WHERE l.document_id = d.id AND l.wanted = 'absent'
       ) THEN 'deleted' ELSE 'live' END
FROM documents d
WHERE d.status IN ('ready', 'deleted')
  AND (d.path <> '' OR d.filename <> '')
  AND (NOT EXISTS (
           SELECT FROM vector_ledger l WHERE l.document_id = d.id AND l.wanted = 'present'
       ) OR EXISTS (
           SELECT FROM legacy_chunks c WHERE c.document_id = d.id AND c.status = 'assigned'
       ))
ORDER BY d.id
"""
HOLD_ROWS = f"{ROWS} FOR SHARE OF d"
LEGACY_ROWS = "SELECT id, user_id, path, filename FROM documents ORDER BY id"
USERS = "SELECT id, email, username FROM users"
DECIDED = "SELECT docstore_id FROM legacy_chunks"
COUNTS = "SELECT status, count(*) FROM legacy_chunks GROUP BY status"
USED = "SELECT DISTINCT document_id FROM legacy_chunks WHERE status = 'assigned'"
WAITING = """
SELECT source, count(*) FROM legacy_chunks
WHERE status = 'quarantined' AND ordinal = 0 GROUP BY source
"""


def known_to_postgres(connection: Connection, *, hold: bool = False, left_behind: Sequence[DocumentRow] = ()) -> Known:
    """What PostgreSQL says, `left_behind` added to its rows. Also of a database that still is the
    old release's: there nothing can have been decided."""
    users = {number: UserName(email, name) for number, email, name in connection.execute(USERS)}
    if not _has_tables(connection):
        rows = [DocumentRow(*row) for row in connection.execute(LEGACY_ROWS)]
        return Known([*rows, *left_behind], users)
    return Known(
        [*_rows(connection, hold), *left_behind],
        users,
        Earlier(
            frozenset(number for (number,) in connection.execute(USED)),
            dict(connection.execute(WAITING).fetchall()),
        ),
        frozenset(docstore_id for (docstore_id,) in connection.execute(DECIDED)),
        dict(connection.execute(COUNTS).fetchall()),
    )


def known_to_sqlite(source_url: str) -> Known:
    """What the old release's SQLite file says. Raises SourceUrlError and SourceError."""
    with legacy_sqlite(source_url, lock=False) as file:
        users = {
            number: UserName(str(email), str(name))
            for number, email, name in file.rows("users", ("id", "email", "username"), "id")
        }
        found = file.rows("documents", ("id", "user_id", "path", "filename"), "id")
        return Known([_sqlite_row(*row) for row in found], users)


def rows_left_behind(connection: Connection, source_url: str) -> list[DocumentRow]:
    """Rows of the old release's SQLite file that PostgreSQL never got, or has no longer.

    They own nothing, but they compete: without them an upload of a user who is gone could look like
    that of another one with a file of the same name.
    """
    moved = {number for (number,) in connection.execute("SELECT id FROM documents")}
    return [
        DocumentRow(row.id, row.user_id, row.path, row.filename, RowState.LEFT_BEHIND)
        for row in known_to_sqlite(source_url).rows
        if row.id not in moved
    ]


def _has_tables(connection: Connection) -> bool:
    row = connection.execute(HAS_TABLES).fetchone()
    return row is not None and bool(row[0])


def _rows(connection: Connection, hold: bool) -> Iterator[DocumentRow]:
    for number, user_id, path, filename, state in connection.execute(HOLD_ROWS if hold else ROWS):
        yield DocumentRow(number, user_id, path, filename, RowState(state))


def _sqlite_row(number: int, user_id: Any, path: Any, filename: Any) -> DocumentRow:
    """SQLite checks no types: what is no user id becomes the id of a user who cannot exist."""
    owner = user_id if isinstance(user_id, int) else -number
    return DocumentRow(number, owner, str(path or ""), str(filename or ""))
