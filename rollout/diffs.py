"""The recorded differences of shadow reads: how many by cause, and the newest. Only reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psycopg.rows import dict_row

from rollout.control import Control
from rollout.errors import UsageError
from src.tools.rag_tools.migration.causes import Cause

CAUSES = """
SELECT cause, count(*) FROM shadow_diffs WHERE transition_id = %s GROUP BY cause ORDER BY count(*) DESC, cause
"""
NEWEST = """
SELECT id, at, user_id, cohort, cause, served_by, overlap_at_k, served_ms, shadow_ms,
       event ->> 'request_id' AS request_id, event -> 'served' AS served, event -> 'shadow' AS shadow
FROM shadow_diffs
WHERE transition_id = %(transition)s AND cause = ANY (%(causes)s)
ORDER BY id DESC LIMIT %(limit)s
"""


@dataclass(frozen=True, slots=True)
class Diffs:
    """`rows`: newest first; `served` and `shadow` are (chunk id, similarity) in order."""

    transition: int
    comparisons: int
    causes: dict[str, int]
    rows: list[dict[str, Any]]


def newest(control: Control, *, cause: str | None, limit: int, transition: int | None) -> Diffs:
    """The newest differences under a transition, by default the present one. UsageError for an unknown cause."""
    if cause is not None and cause not in set(Cause):
        raise UsageError(f"--cause {cause}: there are {', '.join(Cause)}")
    wanted = [cause] if cause is not None else [each.value for each in Cause if each is not Cause.MATCH]
    number = control.view().transition_id if transition is None else transition
    with control.connection() as connection:
        causes = dict(connection.execute(CAUSES, (number,)).fetchall())
        with connection.cursor(row_factory=dict_row) as cursor:
            parameters = {"transition": number, "causes": wanted, "limit": limit}
            rows = cursor.execute(NEWEST, parameters).fetchall()
    return Diffs(number, sum(causes.values()), causes, rows)
