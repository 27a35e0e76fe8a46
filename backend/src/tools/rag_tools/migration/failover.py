"""Has PostgreSQL lost commits? FAISS' journal remembers what was there: the highest document, the last transition.

A restored or failed-over PostgreSQL hands out document ids a second time, and a document id must never mean two
documents. So a process that finds PostgreSQL behind the journal stops writing, a starting one does not start, and
`rollout recover` brings the two together from what the journal still has.
"""

from __future__ import annotations

from dataclasses import dataclass

from src.tools.rag_tools.migration.faiss_journal import Journal
from src.tools.rag_tools.pgvector_store import Connection

LAST = """
SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END,
       (SELECT max(id) FROM rollout_transitions)
FROM documents_id_seq
"""
SEEN = "last_transition"


@dataclass(frozen=True, slots=True)
class Marks:
    """How far one side has come: the highest document id given out, the last transition."""

    document: int
    transition: int


def of_postgres(connection: Connection) -> Marks:
    row = connection.execute(LAST).fetchone()
    return Marks(0, 0) if row is None else Marks(int(row[0]), int(row[1] or 0))


def of_journal(journal: Journal) -> Marks:
    """What the journal saw last; both 0 for a new one."""
    return Marks(journal.highest_document(), int(journal.note(SEEN) or 0))


def remember(journal: Journal, transition: int) -> None:
    """Note the transition, if it is a later one than noted."""
    if transition > int(journal.note(SEEN) or 0):
        journal.set_note(SEEN, str(transition))


def lost(postgres: Marks, journal: Marks) -> str | None:
    """Why nothing may be written; None where PostgreSQL has everything that the journal saw."""
    found = []
    if postgres.document < journal.document:
        found.append(f"it has given out document ids up to {postgres.document}, FAISS holds {journal.document}")
    if postgres.transition < journal.transition:
        found.append(f"it is at transition {postgres.transition}, {journal.transition} was in force")
    if not found:
        return None
    return (
        f"PostgreSQL lost commits: {'; '.join(found)}. Writes are stopped. Run `rollout recover --execute`,"
        " then restart this process: RUNBOOK.md, 'PostgreSQL failed over'"
    )
