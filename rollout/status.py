"""Where the rollout is: stage, fleet, what is owed and why, quarantine, the last comparisons.

Reads, and opens no store: whatever is wrong with one, this is where somebody looks first.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import dict_row

from rollout.control import Control
from rollout.hold import current
from rollout.instances import described
from rollout.transitions import Target, fleet, next_target, previous_target
from src.tools.rag_tools.migration.faiss_format import PICKLE_FILE
from src.tools.rag_tools.migration.faiss_journal import Journal
from src.tools.rag_tools.migration.faiss_pickle import read_pickle
from src.tools.rag_tools.migration.faiss_sqlite import JOURNAL_FILE
from src.tools.rag_tools.migration.settings import migration_settings
from src.tools.rag_tools.migration.stages import ROUTING
from src.tools.rag_tools.store import StoreError, legacy_chunk_id

LEDGER = """
SELECT store, wanted, state, count(*) AS entries,
       extract(epoch FROM clock_timestamp() - min(changed_at))::float8 AS oldest_seconds,
       max(attempts) AS most_attempts
FROM vector_ledger WHERE state <> 'done' GROUP BY store, wanted, state ORDER BY store, wanted, state
"""
FAILING = """
SELECT document_id, store, wanted, state, attempts, last_error FROM vector_ledger
WHERE state <> 'done' AND last_error IS NOT NULL ORDER BY attempts DESC, document_id LIMIT 10
"""
TRANSITIONS = """
SELECT id, stage, read_percent, actor, reason, created_at FROM rollout_transitions ORDER BY id DESC LIMIT 10
"""
DOCUMENTS = "SELECT status, count(*) AS documents FROM documents GROUP BY status ORDER BY status"
LEGACY = "SELECT status, reason, count(*) AS chunks FROM legacy_chunks GROUP BY status, reason ORDER BY status, reason"
DECIDED = "SELECT docstore_id FROM legacy_chunks"
CAUSES = """
SELECT cause, count(*) AS comparisons FROM shadow_diffs
WHERE transition_id = %s GROUP BY cause ORDER BY count(*) DESC
"""
COUNTS = (
    "SELECT name, sum(count)::bigint AS count FROM rollout_counts WHERE transition_id = %s GROUP BY name ORDER BY name"
)


def owed(control: Control) -> list[dict[str, Any]]:
    """Entries not done, by store, what is wanted, and state."""
    with control.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(LEDGER).fetchall()


def failing(control: Control) -> list[dict[str, Any]]:
    """The entries that fail, with the last error of each, most attempts first; ten at most."""
    with control.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(FAILING).fetchall()


def status(control: Control) -> dict[str, Any]:
    """Everything that `rollout status` shows, as plain data."""
    view = control.view()
    routing = ROUTING[view.stage]
    with control.connection() as connection:
        instances = fleet(connection)
        hold = current(connection)
        with connection.cursor(row_factory=dict_row) as cursor:

            def read(sql: LiteralString, *parameters: object) -> list[dict[str, Any]]:
                return cursor.execute(sql, parameters or None).fetchall()

            return {
                "stage": view.stage.value,
                "read_percent": view.read_percent,
                "transition": view.transition_id,
                "reads": [store.value for store in routing.reads],
                "writes": [store.value for store in routing.writes],
                "shadow": routing.shadow,
                "hold": None if hold is None else str(hold),
                "shadow_sample_rate": view.sample_rate,
                "forward": _name(next_target(view, control.profile)),
                "back": _name(previous_target(view)),
                "fleet": described(instances, view.transition_id, control.profile),
                "owed": read(LEDGER),
                "failing": read(FAILING),
                "documents": read(DOCUMENTS),
                "legacy": read(LEGACY),
                "undecided": _undecided({row["docstore_id"] for row in read(DECIDED)}),
                "causes": read(CAUSES, view.transition_id),
                "counts": read(COUNTS, view.transition_id),
                "transitions": read(TRANSITIONS),
            }


def _undecided(decided: set[str]) -> int | str:
    """Chunks in the saved files that the old release wrote and nobody has decided on, or why that is not known."""
    pickled = migration_settings.FAISS_INDEX_PATH / PICKLE_FILE
    if not pickled.exists():
        return 0
    try:
        mine = _journalled(migration_settings.FAISS_INDEX_PATH / JOURNAL_FILE)
        names = [name for name in read_pickle(pickled).positions.values() if name not in decided]
    except (StoreError, OSError) as error:
        return str(error)
    return sum(legacy_chunk_id(name) not in mine for name in names)


def _journalled(path: Path) -> set[UUID]:
    if not path.exists():
        return set()
    with closing(Journal(path)) as journal:
        return journal.chunk_ids()


def _name(target: Target | None) -> str | None:
    return None if target is None else str(target)
