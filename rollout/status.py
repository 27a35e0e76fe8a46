"""Where the rollout is: stage, fleet, what is owed and why, quarantine, the last comparisons."""

from __future__ import annotations

from typing import Any, LiteralString

from psycopg.rows import dict_row

from rollout.control import Control
from rollout.hold import current
from rollout.instances import described
from rollout.transitions import Target, fleet, next_target, previous_target
from src.tools.rag_tools.migration.stages import ROUTING

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
                "causes": read(CAUSES, view.transition_id),
                "counts": read(COUNTS, view.transition_id),
                "transitions": read(TRANSITIONS),
            }


def _name(target: Target | None) -> str | None:
    return None if target is None else str(target)
