"""The guard: watches the evidence of real traffic and takes the rollout back when it turns bad.

Every backend process runs it; the compare-and-set of the step lets one of them act. It goes back once, to where users
read FAISS again, and never further; the way forward stays a person's. `hold` stops it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import structlog

from src.tools.rag_tools.migration import metrics
from src.tools.rag_tools.migration.flags import View, latest
from src.tools.rag_tools.migration.stages import RETREAT, Stage, Store
from src.tools.rag_tools.migration.transitions import StepRefusedError, Target, step
from src.tools.rag_tools.pgvector_store import Connection, Pool, unavailable

log = structlog.get_logger(__name__)

ACTOR = "guard"
WINDOWS = 3

HELD = "SELECT held, actor, reason FROM rollout_holds ORDER BY id DESC LIMIT 1"
MISMATCHES = "SELECT count(*) FROM shadow_diffs WHERE transition_id = %s AND cause = 'owner_mismatch'"
# The newest window last; times are the database's. clock_timestamp() would keep the index from being used.
EVIDENCE = """
SELECT w.number,
       count(d.id) AS comparisons,
       count(d.id) FILTER (WHERE d.cause = 'error') AS errors,
       count(d.id) FILTER (WHERE d.cause = 'timeout') AS timeouts,
       count(d.id) FILTER (WHERE d.cause = 'stale') AS stale,
       count(d.id) FILTER (WHERE d.cause IN ('match', 'tie')) AS agreements,
       percentile_cont(0.99) WITHIN GROUP (ORDER BY
           CASE d.served_by WHEN 'pgvector' THEN d.served_ms ELSE d.shadow_ms END) AS pgvector_p99_ms,
       percentile_cont(0.99) WITHIN GROUP (ORDER BY
           CASE d.served_by WHEN 'faiss' THEN d.served_ms ELSE d.shadow_ms END) AS faiss_p99_ms
FROM generate_series(1, %(windows)s) AS w(number)
LEFT JOIN shadow_diffs d ON d.transition_id = %(transition_id)s
    AND d.at >= statement_timestamp() - make_interval(secs => %(seconds)s * (%(windows)s - w.number + 1))
    AND d.at < statement_timestamp() - make_interval(secs => %(seconds)s * (%(windows)s - w.number))
GROUP BY w.number ORDER BY w.number
"""
COUNTS = """
SELECT w.number,
       coalesce(sum(c.count) FILTER (WHERE c.name LIKE 'reads.%%'), 0)::bigint AS reads,
       coalesce(sum(c.count) FILTER (WHERE c.name = 'fallback'), 0)::bigint AS fallbacks
FROM generate_series(1, %(windows)s) AS w(number)
LEFT JOIN rollout_counts c ON c.transition_id = %(transition_id)s
    AND c.since >= statement_timestamp() - make_interval(secs => %(seconds)s * (%(windows)s - w.number + 1))
    AND c.since < statement_timestamp() - make_interval(secs => %(seconds)s * (%(windows)s - w.number))
GROUP BY w.number ORDER BY w.number
"""
OWED = """
SELECT store, count(*) FILTER (WHERE state = 'owed') AS owed, count(*) FILTER (WHERE state = 'aside') AS aside,
       coalesce(extract(epoch FROM clock_timestamp() - min(changed_at)), 0)::float8 AS oldest
FROM vector_ledger WHERE state <> 'done' GROUP BY store
"""
QUARANTINED = "SELECT count(*) FROM legacy_chunks WHERE status = 'quarantined'"
PRUNE = """
DELETE FROM shadow_diffs WHERE id IN (
    SELECT id FROM shadow_diffs WHERE at < statement_timestamp() - interval '30 days' ORDER BY at LIMIT 1000)
"""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a window is bad. Shares between 0 and 1, times in milliseconds; fewer reads than `least` say nothing."""

    least: int = 20
    errors: float = 0.02
    timeouts: float = 0.02
    fallbacks: float = 0.02
    agreement: float = 0.98
    p99_ratio: float = 1.25
    p99_ms: float = 100.0


@dataclass(frozen=True, slots=True)
class Window:
    """What one span of time showed. `stale` comparisons met entries still owed and count neither way."""

    comparisons: int
    errors: int
    timeouts: int
    stale: int
    agreements: int
    pgvector_p99_ms: float | None
    faiss_p99_ms: float | None
    reads: int = 0
    fallbacks: int = 0

    @property
    def judged(self) -> int:
        return self.comparisons - self.stale


def faults(window: Window, limits: Limits) -> dict[str, str]:
    """The limits that the window is past, by criterion, with the numbers."""
    found: dict[str, str] = {}
    if window.comparisons >= limits.least:
        found |= _share("errors", window.errors, window.comparisons, limits.errors)
        found |= _share("timeouts", window.timeouts, window.comparisons, limits.timeouts)
        found |= _agreement(window, limits)
        found |= _latency(window, limits)
    if window.reads >= limits.least:
        found |= _share("fallbacks", window.fallbacks, window.reads, limits.fallbacks)
    return found


def judge(windows: Sequence[Window], mismatches: int, limits: Limits) -> str | None:
    """Why to go back now; None where there is no reason. A leak at once, the rest when every window shows it."""
    if mismatches:
        return f"{mismatches} comparisons found a chunk that belongs to another user"
    if len(windows) < WINDOWS:
        return None
    found = [faults(window, limits) for window in windows]
    lasting = set.intersection(*(set(each) for each in found))
    if not lasting:
        return None
    return f"for {len(windows)} windows: " + "; ".join(found[-1][name] for name in sorted(lasting))


def retreat(stage: Stage, percent: int) -> Target | None:
    """Where the guard goes from here; None where users read FAISS already, or FAISS is no longer written."""
    target = RETREAT.get(stage)
    return None if target is None or (target is stage and percent == 0) else Target(target, 0)


class Guard:
    """One process's guard; `look` is one round of its loop."""

    def __init__(self, pool: Pool, *, window_seconds: float, limits: Limits | None = None) -> None:
        self.pool = pool
        self.window_seconds = window_seconds
        self.limits = limits or Limits()

    def look(self) -> int | None:
        """Measure, show, and step back where there is reason; returns the new transition's id."""
        with unavailable("look of the guard"), self.pool.connection() as connection:
            view = latest(connection)
            self._show(connection)
            connection.execute(PRUNE)
            windows = self._windows(connection, view.transition_id)
            _show_window(windows[-1])
            target = retreat(view.stage, view.read_percent)
            if target is None:
                return None
            mismatches = connection.execute(MISMATCHES, (view.transition_id,)).fetchone()
            reason = judge(windows, 0 if mismatches is None else int(mismatches[0]), self.limits)
            if reason is None or self._held(connection, reason):
                return None
            return self._go_back(connection, view, target, reason, windows)

    def _go_back(
        self, connection: Connection, view: View, target: Target, reason: str, windows: Sequence[Window]
    ) -> int | None:
        evidence = {"guard": [asdict(window) for window in windows], "limits": asdict(self.limits)}
        try:
            number = step(connection, view, target, actor=ACTOR, reason=reason, evidence=evidence)
        except StepRefusedError as error:
            log.warning("guard.step.refused", transition=view.transition_id, reason=reason, error=str(error))
            return None
        log.error("guard.step.done", transition=number, to=str(target), reason=reason)
        return number

    def _held(self, connection: Connection, reason: str) -> bool:
        row = connection.execute(HELD).fetchone()
        if row is None or not row[0]:
            return False
        log.warning("guard.step.held", reason=reason, held_by=row[1], because=row[2])
        return True

    def _windows(self, connection: Connection, transition_id: int) -> list[Window]:
        parameters = {"windows": WINDOWS, "seconds": self.window_seconds, "transition_id": transition_id}
        diffs = connection.execute(EVIDENCE, parameters).fetchall()
        counts = connection.execute(COUNTS, parameters).fetchall()
        return [Window(*diff[1:], *count[1:]) for diff, count in zip(diffs, counts, strict=True)]

    def _show(self, connection: Connection) -> None:
        owed = {row[0]: row[1:] for row in connection.execute(OWED)}
        for store in Store:
            entries, aside, oldest = owed.get(store, (0, 0, 0.0))
            metrics.OWED.labels(store.value).set(entries)
            metrics.ASIDE.labels(store.value).set(aside)
            metrics.OWED_AGE.labels(store.value).set(oldest)
        row = connection.execute(QUARANTINED).fetchone()
        metrics.QUARANTINED.set(0 if row is None else row[0])


def _share(name: str, part: int, whole: int, limit: float) -> dict[str, str]:
    return {name: f"{name} {part} of {whole}"} if part / whole > limit else {}


def _agreement(window: Window, limits: Limits) -> dict[str, str]:
    if window.judged < limits.least or window.agreements / window.judged >= limits.agreement:
        return {}
    return {"agreement": f"agreement {window.agreements / window.judged:.2%} of {window.judged}"}


def _latency(window: Window, limits: Limits) -> dict[str, str]:
    new, old = window.pgvector_p99_ms, window.faiss_p99_ms
    if new is None or old is None or new <= limits.p99_ms or new <= limits.p99_ratio * old:
        return {}
    return {"latency": f"p99 of pgvector {new:.0f} ms, of faiss {old:.0f} ms"}


def _show_window(window: Window) -> None:
    for criterion, value in asdict(window).items():
        metrics.GATE_VALUE.labels(criterion).set(value if value is not None else float("nan"))
