"""Mending what verify found, by owing it again: settling then brings the store to what is wanted.

Each document is one transaction: its entry becomes owed and, where pgvector's rows are wrong, they
go. A process that dies in between has mended some documents; running again does the rest. FAISS is
the reference as long as it serves the user; where pgvector serves, wrong rows are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rollout.verify_merge import Kind
from rollout.verify_report import DocumentDifference, VerifyReport
from src.tools.rag_tools.migration.flags import View, latest
from src.tools.rag_tools.migration.ledger import Wanted
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.pgvector_store import DELETE, Connection, Pool, unavailable

# Holds back a step to another stage, which takes this table in a stronger mode.
NO_STEP_NOW = "LOCK TABLE documents IN ROW EXCLUSIVE MODE"
OWE_AGAIN = """
UPDATE vector_ledger
SET state = 'owed', attempts = 0, last_error = NULL, next_attempt_at = clock_timestamp(),
    changed_at = clock_timestamp()
WHERE document_id = %s AND store = %s AND wanted = %s
RETURNING document_id
"""
KNOWN = "SELECT 1 FROM vector_ledger WHERE document_id = %s AND store = %s AND wanted = %s"


@dataclass(frozen=True, slots=True)
class Act:
    """Owe the document to `store` again, and first remove what pgvector has of it under a user."""

    document_id: int
    store: Store
    wanted: Wanted = Wanted.PRESENT
    remove_of: int | None = None
    concerns: tuple[int, ...] = ()
    """Users who must not be read from pgvector while its rows go."""


@dataclass(slots=True)
class RepairReport:
    """What was done; of a dry run, what would be. `left`: the reason by document id."""

    executed: bool
    acts: list[Act] = field(default_factory=list)
    left: dict[int, str] = field(default_factory=dict)


def repair(pool: Pool, report: VerifyReport, *, execute: bool) -> RepairReport:
    """Owe again what `report` found; then `rollout settle`, then verify again.

    `pool` connects as victus_rollout. What cannot be mended without a decision is left, with the
    reason. Raises StoreError where PostgreSQL is away.
    """
    made = RepairReport(execute)
    acts = [Act(document_id, Store.PGVECTOR) for document_id in sorted(report.displaced)]
    for found in report.found:
        match act_on(found):
            case Act() as act:
                acts.append(act)
            case reason:
                made.left[found.document_id] = reason
    for act in acts:
        with unavailable("repair"), pool.connection() as connection:
            refused = _perform(connection, act, execute=execute)
        if refused is None:
            made.acts.append(act)
        else:
            made.left[act.document_id] = refused
    return made


def act_on(found: DocumentDifference) -> Act | str:
    """What mends the difference, or why nothing does by itself."""
    document_id, store = found.document_id, found.store
    match found.kind:
        case Kind.MISSING_IN_FAISS | Kind.MISSING_IN_PGVECTOR:
            if found.held[store.other] == 0:
                return (
                    "no store holds a chunk of it: bring back the directory or the database that"
                    " did, or delete the document and upload it again"
                )
            return Act(document_id, store)
        case Kind.EXTRA:
            remove_of = found.user_id if store is Store.PGVECTOR else None
            return Act(document_id, store, Wanted.ABSENT, remove_of)
        case Kind.OWNER_MISMATCH if store is Store.FAISS:
            return (
                f"FAISS gives it to user {found.user_id}, the ledger to user {found.belongs_to}:"
                " see `rollout assign-owners`"
            )
        case Kind.OWNER_MISMATCH | Kind.DOCUMENT_MISMATCH | Kind.CONTENT_DRIFT | Kind.VECTOR_DRIFT:
            concerns = {found.user_id, found.belongs_to or found.user_id}
            return Act(document_id, store, remove_of=found.user_id, concerns=tuple(sorted(concerns)))


def _perform(connection: Connection, act: Act, *, execute: bool) -> str | None:
    """None where it was done (of a dry run: where it can be), else why not."""
    entry = (act.document_id, act.store, act.wanted)
    with connection.transaction():
        connection.execute(NO_STEP_NOW)
        refused = _served(latest(connection), act)
        if refused is not None:
            return refused
        if connection.execute(OWE_AGAIN if execute else KNOWN, entry).fetchone() is None:
            return (
                f"the ledger has no entry that wants it {act.wanted} in {act.store}: it has changed"
                " since, or never had an owner; verify again, or see `rollout quarantine list`"
            )
        if execute and act.remove_of is not None:
            connection.execute(DELETE, (act.remove_of, act.document_id))
        return None


def _served(view: View, act: Act) -> str | None:
    reading = [user for user in act.concerns if view.serving(user) is Store.PGVECTOR]
    if not reading:
        return None
    return (
        f"user {reading[0]} is read from pgvector (stage {view.stage}), whose rows would go: step back"
        " with `rollout rollback` until FAISS serves, or decide by hand which store is right"
    )
