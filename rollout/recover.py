"""After a failover that lost commits: bring PostgreSQL back to what FAISS' journal still knows.

Documents that only the journal has get their rows again, deletions that only the journal has are deletions again, ids
that were given out are not given out twice, and a transition after the lost ones ends the halt. Running it again
changes nothing more. What neither side has any more cannot be brought back: uploads of a stage that writes pgvector
alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from psycopg.types.json import Jsonb

from rollout.control import Control
from src.tools.rag_tools.migration import failover, ledger
from src.tools.rag_tools.migration.faiss_journal import Op
from src.tools.rag_tools.migration.ledger import Wanted
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.pgvector_store import Connection

PAGE = 1_000
ROWS = "SELECT id, status FROM documents WHERE id = ANY (%s)"
USERS = "SELECT id FROM users"
RESTORE = """
INSERT INTO documents (id, user_id, filename, path, status, created_at, updated_at)
VALUES (%s, %s, %s, %s, %s, now(), now())
"""
DELETED = """
UPDATE documents SET status = 'deleted', filename = '', error = NULL, deleted_at = now(), updated_at = now()
WHERE id = %s AND status <> 'deleted'
"""
SEQUENCE = "SELECT setval('documents_id_seq', greatest(%s, (SELECT last_value FROM documents_id_seq)))"
REOPEN = """
INSERT INTO rollout_transitions
    (id, stage, read_percent, read_threshold, shadow_sample_rate, actor, reason, evidence)
SELECT %(id)s, stage, read_percent, read_threshold, shadow_sample_rate, %(actor)s, %(reason)s, %(evidence)s
FROM rollout_transitions ORDER BY id DESC LIMIT 1
"""


@dataclass
class Recovery:
    """What was brought back, by document id, or would be. `ownerless`: their users are gone too."""

    executed: bool
    postgres: failover.Marks
    journal: failover.Marks
    restored: list[int] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)
    ownerless: list[int] = field(default_factory=list)
    transition: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def recover(control: Control, *, execute: bool, actor: str) -> Recovery:
    """Compare the journal with the tables and, with `execute`, mend the tables; one transaction."""
    journal = control.faiss.journal
    with control.connection() as connection, connection.transaction():
        connection.execute("LOCK TABLE documents, rollout_transitions IN SHARE ROW EXCLUSIVE MODE")
        report = Recovery(execute, failover.of_postgres(connection), failover.of_journal(journal))
        users = {int(row[0]) for row in connection.execute(USERS)}
        added, gone = _journal(control)
        known = _known(connection, [*added, *gone])
        for document_id, user_id in sorted((added | gone).items()):
            _mend(control, connection, report, document_id, user_id, document_id in gone, known.get(document_id), users)
        if execute:
            _go_on(connection, report, actor)
    return report


def _mend(
    control: Control,
    connection: Connection,
    report: Recovery,
    document_id: int,
    user_id: int,
    gone: bool,
    status: str | None,
    users: set[int],
) -> None:
    if (status == "deleted" and gone) or (status is not None and not gone):
        return
    if user_id not in users:
        report.ownerless.append(document_id)
        return
    (report.deleted if gone else report.restored).append(document_id)
    if not report.executed:
        return
    if status is None:
        _restore(control, connection, document_id, user_id, gone)
    else:
        connection.execute(DELETED, (document_id,))
    if gone:
        ledger.withdraw(connection, document_id, user_id)


def _restore(control: Control, connection: Connection, document_id: int, user_id: int, gone: bool) -> None:
    """The row as it was, from what the chunks say of their file; FAISS is done, pgvector is owed."""
    chunks = [] if gone else control.faiss.journal.document(document_id)
    metadata = chunks[0].metadata if chunks else {}
    filename, path = str(metadata.get("file_name", "")), str(metadata.get("source", ""))
    status = "deleted" if gone else "ready"
    connection.execute(RESTORE, (document_id, user_id, "" if gone else filename, "" if gone else path, status))
    if not gone:
        ledger.intend(connection, document_id, user_id)
        ledger.mark(connection, document_id, Store.FAISS, Wanted.PRESENT)


def _go_on(connection: Connection, report: Recovery, actor: str) -> None:
    """Ids go on after the highest ever given out; the transition goes on after the highest ever seen."""
    connection.execute(SEQUENCE, (max(report.journal.document, report.postgres.document, 1),))
    if report.journal.transition > report.postgres.transition:
        report.transition = report.journal.transition + 1
        reason = f"recovered after a failover that lost transitions up to {report.journal.transition}"
        evidence = Jsonb({"recovery": report.as_dict()})
        connection.execute(REOPEN, {"id": report.transition, "actor": actor, "reason": reason, "evidence": evidence})


def _journal(control: Control) -> tuple[dict[int, int], dict[int, int]]:
    """User by document, of what the journal added and has still, and of what it saw deleted."""
    added: dict[int, int] = {}
    gone: dict[int, int] = {}
    position = 0
    while entries := control.faiss.journal.entries_after(position, PAGE):
        for entry in entries:
            match entry.op:
                case Op.ADD:
                    added[entry.document_id] = entry.user_id
                case Op.DELETE:
                    gone[entry.document_id] = entry.user_id
                    added.pop(entry.document_id, None)
        position = entries[-1].seq
    return added, gone


def _known(connection: Connection, documents: list[int]) -> dict[int, str]:
    return {int(row[0]): str(row[1]) for row in connection.execute(ROWS, (documents,))}
