"""The page's own SQL: read-only, bounded in time, one snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from psycopg.rows import class_row, dict_row

from rollout.control import Control
from rollout.report.data import BY_ITSELF, Count, Difference, Judged, Latency, Series, Span, Tally, Transition
from src.tools.rag_tools.migration.causes import EXPLAINED, Cause
from src.tools.rag_tools.pgvector_store import Connection

SECONDS = 20
"""A chart that takes longer is left out; the database has other things to do."""
SHOWN_TRANSITIONS = 50
SHOWN_DIFFERENCES = 20
SHOWN_RUNS = 5
AGREED = [Cause.MATCH.value, Cause.TIE.value]

READ_ONLY = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
LIMIT = "SELECT set_config('statement_timeout', %s, true)"

NOW = "SELECT clock_timestamp(), min(created_at) FILTER (WHERE id > 1) FROM rollout_transitions"
TRANSITIONS = """
SELECT id, stage, read_percent, actor, reason, created_at, evidence
FROM rollout_transitions ORDER BY id DESC LIMIT %s
"""
RUNS = """
SELECT id, transition_id, finished_at, chunks, differences,
       extract(epoch FROM finished_at - started_at)::float8 AS seconds
FROM verify_runs ORDER BY id DESC LIMIT %s
"""
TALLIES = """
SELECT date_bin(%(bucket)s, at, 'epoch') AS at, transition_id AS transition, cohort, cause, count(*)
FROM shadow_diffs WHERE at >= %(begins)s AND at <= %(ends)s GROUP BY 1, 2, 3, 4 ORDER BY 2, 1, 3, 4
"""
# The bound of a transition that began before the charts do counts what came before them.
BEFORE = """
SELECT transition_id AS transition, cohort, count(*) FILTER (WHERE cause = ANY (%(agreed)s)) AS agreed,
       count(*) FILTER (WHERE cause <> 'stale') AS judged
FROM shadow_diffs
WHERE at < %(begins)s
  AND transition_id = (SELECT max(id) FROM rollout_transitions WHERE created_at <= %(begins)s)
GROUP BY 1, 2
"""
LATENCIES = """
SELECT date_bin(%(bucket)s, d.at, 'epoch') AS at, s.store,
       percentile_cont(0.5) WITHIN GROUP (ORDER BY s.ms) AS p50,
       percentile_cont(0.99) WITHIN GROUP (ORDER BY s.ms) AS p99, count(*)
FROM shadow_diffs d CROSS JOIN LATERAL (VALUES
    ('faiss', CASE d.served_by WHEN 'faiss' THEN d.served_ms ELSE d.shadow_ms END),
    ('pgvector', CASE d.served_by WHEN 'pgvector' THEN d.served_ms ELSE d.shadow_ms END)) AS s (store, ms)
WHERE d.at >= %(begins)s AND d.at <= %(ends)s AND d.shadow_ms IS NOT NULL
GROUP BY 1, 2 ORDER BY 1, 2
"""
COUNTS = """
SELECT date_bin(%(bucket)s, since, 'epoch') AS at, name, sum(count)::bigint AS count
FROM rollout_counts WHERE since >= %(begins)s AND since <= %(ends)s GROUP BY 1, 2 ORDER BY 1, 2
"""
# A leak is never pushed out of the list by lesser differences.
DIFFERENCES = """
SELECT id, at, transition_id AS transition, user_id, cohort, cause, served_by, overlap_at_k AS overlap
FROM shadow_diffs WHERE at >= %(begins)s AND at <= %(ends)s AND NOT cause = ANY (%(explained)s)
ORDER BY (cause = 'owner_mismatch') DESC, id DESC LIMIT %(limit)s
"""


@contextmanager
def reading(control: Control) -> Iterator[Connection]:
    """A transaction that cannot write and does not last. Raises PreconditionError where it would."""
    with control.connection() as connection, connection.transaction():
        connection.execute(READ_ONLY)
        connection.execute(LIMIT, (f"{SECONDS}s",))
        yield connection


def clock(control: Control) -> tuple[datetime, datetime | None]:
    """The database's time, and when the rollout left its first stage; None where it has not."""
    with reading(control) as connection:
        now, began = connection.execute(NOW).fetchone() or (None, None)
    if now is None:
        raise LookupError("an aggregate returned no row")
    return now, began


def fitting(now: datetime, began: datetime | None) -> Span:
    """The shortest span that holds the whole rollout, a day at most."""
    age = 0.0 if began is None else (now - began).total_seconds()
    return next((span for span in BY_ITSELF if span.seconds >= age), BY_ITSELF[-1])


def transitions(control: Control) -> list[Transition]:
    with reading(control) as connection:
        rows = connection.execute(TRANSITIONS, (SHOWN_TRANSITIONS,)).fetchall()
    return [
        Transition(number, stage, percent, actor, reason, at, _overridden(evidence))
        for number, stage, percent, actor, reason, at, evidence in rows
    ]


def verified(control: Control) -> list[dict[str, Any]]:
    with reading(control) as connection, connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(RUNS, (SHOWN_RUNS,)).fetchall()


def series(control: Control, now: datetime, span: Span) -> Series:
    begins = now - timedelta(seconds=span.seconds)
    parameters = {"bucket": timedelta(seconds=span.bucket), "begins": begins, "ends": now, "agreed": AGREED}
    with reading(control) as connection:
        return Series(
            connection.cursor(row_factory=class_row(Tally)).execute(TALLIES, parameters).fetchall(),
            connection.cursor(row_factory=class_row(Judged)).execute(BEFORE, parameters).fetchall(),
            connection.cursor(row_factory=class_row(Latency)).execute(LATENCIES, parameters).fetchall(),
            connection.cursor(row_factory=class_row(Count)).execute(COUNTS, parameters).fetchall(),
        )


def differences(control: Control, now: datetime, span: Span) -> list[Difference]:
    """The newest that nothing excuses, leaks first."""
    parameters = {
        "begins": now - timedelta(seconds=span.seconds),
        "ends": now,
        "explained": [cause.value for cause in EXPLAINED],
        "limit": SHOWN_DIFFERENCES,
    }
    with reading(control) as connection:
        return connection.cursor(row_factory=class_row(Difference)).execute(DIFFERENCES, parameters).fetchall()


def _overridden(evidence: Any) -> tuple[tuple[str, str], ...]:
    """Of a step by a person; the guard's evidence has no criteria."""
    criteria = evidence.get("gate", {}).get("criteria", []) if isinstance(evidence, dict) else []
    return tuple(
        (each["name"], each.get("todo", "").removeprefix("overridden: "))
        for each in criteria
        if each.get("verdict") == "overridden"
    )
