"""What real traffic and the stores themselves must show before users are moved, and before FAISS is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from rollout import sentinel
from rollout.control import Control
from rollout.gates import Check, Criterion, Verdict
from rollout.transitions import fleet, laggards
from src.tools.rag_tools.migration.causes import EXPLAINED, Cause
from src.tools.rag_tools.migration.flags import View
from src.tools.rag_tools.migration.shadow import cohort, fingerprint
from src.tools.rag_tools.migration.stages import Store

LARGEST_K = 50

OWED = """
SELECT count(*) FILTER (WHERE state = 'aside') AS aside,
       count(*) FILTER (WHERE state = 'owed' AND next_attempt_at = 'infinity') AS bulk,
       count(*) FILTER (WHERE state = 'owed' AND next_attempt_at < 'infinity'
                        AND changed_at < clock_timestamp() - make_interval(secs => %s)) AS old
FROM vector_ledger WHERE store = %s AND state <> 'done'
"""
VERIFY = """
SELECT v.differences, v.chunks, v.started_at >= t.created_at AS since_step,
       extract(epoch FROM clock_timestamp() - v.finished_at)::float8 AS age
FROM verify_runs v, (SELECT created_at FROM rollout_transitions ORDER BY id DESC LIMIT 1) t
ORDER BY v.id DESC LIMIT 1
"""
# Only what was compared in the present way counts: same model, chunker and retrieval.
COHORTS = """
SELECT cohort, count(*), count(*) FILTER (WHERE cause = ANY (%(agreed)s)) AS agreed,
       count(*) FILTER (WHERE cause = 'stale') AS stale
FROM shadow_diffs WHERE transition_id = %(transition_id)s AND fingerprint = ANY (%(fingerprints)s)
GROUP BY cohort ORDER BY cohort
"""
CAUSES = """
SELECT cause, count(*) FROM shadow_diffs
WHERE transition_id = %(transition_id)s AND fingerprint = ANY (%(fingerprints)s) GROUP BY cause
"""
FOREIGN = """
SELECT count(*) FROM shadow_diffs
WHERE transition_id = %(transition_id)s AND NOT fingerprint = ANY (%(fingerprints)s)
"""
# A stale comparison is explained once what was owed then is done. By the document's age: setting an entry aside, or
# trying it again, changes the entry's.
UNSETTLED = """
SELECT count(*) FROM shadow_diffs d
WHERE d.transition_id = %(transition_id)s AND d.cause = 'stale' AND EXISTS (
    SELECT 1 FROM vector_ledger l JOIN documents made ON made.id = l.document_id
    WHERE l.user_id = d.user_id AND l.wanted = 'present' AND l.state <> 'done'
      AND coalesce(made.created_at, '-infinity') <= d.at)
"""
LATENCY = """
SELECT count(*),
  percentile_cont(0.99) WITHIN GROUP (ORDER BY CASE served_by WHEN 'pgvector' THEN served_ms ELSE shadow_ms END),
  percentile_cont(0.99) WITHIN GROUP (ORDER BY CASE served_by WHEN 'faiss' THEN served_ms ELSE shadow_ms END)
FROM shadow_diffs WHERE transition_id = %s AND shadow_ms IS NOT NULL
"""
COUNTS = """
SELECT name, sum(count)::bigint FROM rollout_counts
WHERE transition_id = %s GROUP BY name
"""
FALLBACK_FREE = """
SELECT coalesce(sum(count), 0)::bigint FROM rollout_counts
WHERE name = 'fallback' AND since >= clock_timestamp() - make_interval(secs => %s)
  AND transition_id = %s
"""
AGE = "SELECT extract(epoch FROM clock_timestamp() - created_at)::float8 FROM rollout_transitions WHERE id = %s"


def settled_checks(control: Control, view: View) -> Mapping[str, Check]:
    """The gate to shadow reads: pgvector holds what it should."""
    return {
        "fleet": partial(_fleet, control, view),
        "owed": partial(_owed, control, Store.PGVECTOR),
        "verify": partial(_verify, control, since_step=True),
    }


def traffic_checks(control: Control, view: View) -> Mapping[str, Check]:
    """The gate to every step of the ramp, and past it."""
    return {
        "fleet": partial(_fleet, control, view),
        "comparisons": partial(_comparisons, control, view),
        "cohorts": partial(_cohorts, control, view),
        "fingerprint": partial(_fingerprint, control, view),
        "agreement": partial(_agreement, control, view),
        "unexplained": partial(_unexplained, control, view),
        "stale": partial(_stale, control, view),
        "dropped": partial(_dropped, control, view),
        "latency": partial(_latency, control, view),
        "owed": partial(_owed, control, Store.PGVECTOR),
        "verify": partial(_verify, control, since_step=False),
        "soak": partial(_soak, control, view, control.profile.ramp_soak),
        "sentinel": partial(_sentinel, control),
    }


def farewell_checks(control: Control, view: View) -> Mapping[str, Check]:
    """The gate to writing pgvector alone."""
    return {
        "fleet": partial(_fleet, control, view),
        "owed": partial(_owed, control, Store.PGVECTOR),
        "soak": partial(_soak, control, view, control.profile.long_soak),
        "fallback": partial(_fallback, control, view),
        "fallback-free": partial(_fallback_free, control, view),
    }


def _fleet(control: Control, view: View) -> Criterion:
    with control.connection() as connection:
        instances = fleet(connection)
    late = laggards(instances, view.transition_id, control.profile)
    live = [each for each in instances if each.silent < control.profile.dead_seconds]
    value = f"{len(live) - len(late)} of {len(live)} processes at transition {view.transition_id}"
    return Criterion(
        "fleet", "does every process act on the present stage?", value, "all",
        _verdict(not late), "wait for " + ", ".join(map(str, late)) if late else "", len(live),
    )  # fmt: skip


def _owed(control: Control, store: Store) -> Criterion:
    with control.connection() as connection:
        aside, bulk, old = _row(connection.execute(OWED, (control.profile.owed_age, store)).fetchone())
    return Criterion(
        "owed", f"has {store} got what it is owed?",
        f"{bulk} wait for the backfill, {old} owed for more than {control.profile.owed_age:.0f} s, {aside} set aside",
        "0 of each", _verdict(not bulk and not old and not aside),
        "run `rollout backfill --execute`, then `rollout settle --execute`; `rollout status` shows why entries fail",
    )  # fmt: skip


def _verify(control: Control, *, since_step: bool) -> Criterion:
    question = "do both stores hold the same?"
    limit = f"0 differences, {'begun after the last step' if since_step else 'fresh'}"
    with control.connection() as connection:
        row = connection.execute(VERIFY).fetchone()
    if row is None:
        return Criterion("verify", question, "never run", limit, Verdict.INCONCLUSIVE, "run `rollout verify`")
    differences, chunks, after, age = row
    fresh = bool(after) if since_step else age <= control.profile.verify_age
    verdict = Verdict.INCONCLUSIVE if not fresh else _verdict(differences == 0)
    value = f"{differences} differences, {age / 60:.0f} minutes ago" + ("" if fresh else ", too old")
    return Criterion("verify", question, value, limit, verdict, "run `rollout verify`", chunks)


def _comparisons(control: Control, view: View) -> Criterion:
    total = sum(row.comparisons for row in _cohort_rows(control, view))
    needed = control.profile.comparisons
    enough = total >= needed
    return Criterion(
        "comparisons", "is there enough evidence since the last step?", f"{total} comparisons", f">= {needed}",
        Verdict.PASS if enough else Verdict.INCONCLUSIVE,
        "" if enough else _patience(control, view, total, needed), total,
    )  # fmt: skip


def _cohorts(control: Control, view: View) -> Criterion:
    compared = {row.cohort: row for row in _cohort_rows(control, view)}
    # A size of user that exists and was never compared is missing evidence, not none needed.
    exist = {cohort(chunks) for chunks in control.faiss.counts().by_user.values() if chunks}
    rows = [compared.get(name, Cohort(name, 0, 0, 0)) for name in sorted(exist.union(compared))]
    needed = control.profile.cohort_comparisons
    thin = [row for row in rows if row.comparisons < needed]
    value = ", ".join(f"{row.cohort} {row.comparisons}" for row in rows) or "none"
    verdict = Verdict.PASS if rows and not thin else Verdict.INCONCLUSIVE
    todo = _patience(control, view, min((row.comparisons for row in thin), default=0), needed)
    return Criterion(
        "cohorts", "also for each size of user?", value, f">= {needed} each", verdict,
        "" if verdict is Verdict.PASS else todo,
    )  # fmt: skip


def _fingerprint(control: Control, view: View) -> Criterion:
    with control.connection() as connection:
        (foreign,) = _row(connection.execute(FOREIGN, _evidence(view)).fetchone())
    return Criterion(
        "fingerprint", "was everything compared with this model, chunker and retrieval?",
        f"{foreign} compared otherwise", "0", Verdict.INCONCLUSIVE if foreign else Verdict.PASS,
        "a process runs other settings or code: make them alike, then step again to begin a new window",
    )  # fmt: skip


def _agreement(control: Control, view: View) -> Criterion:
    """Per cohort, the lower end of what the agreement may truly be; errors and time-outs are disagreement."""
    rows = _cohort_rows(control, view)
    limit = control.profile.agreement
    bounds = {row.cohort: wilson_lower(row.agreed, row.comparisons - row.stale) for row in rows}
    value = ", ".join(f"{cohort} {bound:.4f}" for cohort, bound in bounds.items()) or "none"
    verdict = Verdict.INCONCLUSIVE if not bounds else _verdict(min(bounds.values()) >= limit)
    thin = any(row.comparisons < control.profile.cohort_comparisons for row in rows)
    if verdict is Verdict.FAIL and thin and all(row.agreed == row.comparisons - row.stale for row in rows):
        verdict = Verdict.INCONCLUSIVE
    return Criterion(
        "agreement", "how surely do the stores agree? (lower 95 % Wilson bound)", value, f">= {limit} each", verdict,
        "run `rollout diffs` for the causes", sum(row.comparisons for row in rows),
    )  # fmt: skip


def wilson_lower(agreed: int, judged: int) -> float:
    """The lower one-sided 95 percent bound of a share by Wilson's score interval (1927); 0 of nothing."""
    from scipy.stats import binomtest

    if judged <= 0:
        return 0.0
    test = binomtest(agreed, judged, alternative="greater")
    return float(test.proportion_ci(confidence_level=0.95, method="wilson").low)


def _unexplained(control: Control, view: View) -> Criterion:
    causes = _causes(control, view)
    total = sum(causes.values())
    bad = {str(cause): count for cause, count in causes.items() if cause not in EXPLAINED}
    with control.connection() as connection:
        (unsettled,) = _row(connection.execute(UNSETTLED, _evidence(view)).fetchone())
    # Under traffic there is always an upload on its way; whether it explains the difference is seen when it is there.
    verdict = Verdict.FAIL if bad else Verdict.INCONCLUSIVE if unsettled or not total else Verdict.PASS
    todo = "run `rollout diffs`" if bad or not unsettled else "check again, or run `rollout settle --execute` first"
    if unsettled:
        bad["stale and still owed"] = unsettled
    value = ", ".join(f"{count} {cause}" for cause, count in bad.items()) or "0"
    return Criterion("unexplained", "is every difference explained?", value, "0", verdict, todo, total)


def _stale(control: Control, view: View) -> Criterion:
    causes = _causes(control, view)
    return _share(
        "stale", "how many comparisons met entries still owed?", causes.get(Cause.STALE, 0), sum(causes.values()),
        control.profile.stale_share, "wait until uploads settle, or run `rollout settle --execute`",
    )  # fmt: skip


def _dropped(control: Control, view: View) -> Criterion:
    dropped = _counts(control, view).get("shadow.dropped", 0)
    made = sum(_causes(control, view).values())
    return _share(
        "dropped", "how many shadow reads did not fit the queue?", dropped, dropped + made,
        control.profile.dropped_share, "lower the sample rate, or raise SHADOW_WORKERS",
    )  # fmt: skip


def _latency(control: Control, view: View) -> Criterion:
    with control.connection() as connection:
        n, new, old = _row(connection.execute(LATENCY, (view.transition_id,)).fetchone())
    question, limit = (
        "is pgvector fast enough?",
        f"p99 <= {control.profile.p99_ratio} x faiss' or <= {control.profile.p99_ms:.0f} ms",
    )
    if not n:
        return Criterion(
            "latency",
            question,
            "no comparisons",
            limit,
            Verdict.INCONCLUSIVE,
            "wait for traffic",
            0,
        )
    fits = new <= control.profile.p99_ms or new <= control.profile.p99_ratio * old
    return Criterion(
        "latency", question, f"p99 pgvector {new:.1f} ms, faiss {old:.1f} ms", limit, _verdict(fits),
        "see RUNBOOK.md, 'pgvector is slow'", n,
    )  # fmt: skip


def _soak(control: Control, view: View, seconds: float) -> Criterion:
    with control.connection() as connection:
        (age,) = _row(connection.execute(AGE, (view.transition_id,)).fetchone())
    left = timedelta(seconds=max(0, round(seconds - age)))
    return Criterion(
        "soak", "has the present step lasted long enough?", f"{timedelta(seconds=round(age))}",
        f">= {timedelta(seconds=seconds)}", Verdict.PASS if age >= seconds else Verdict.INCONCLUSIVE,
        "" if age >= seconds else f"wait {left}",
    )  # fmt: skip


def _sentinel(control: Control) -> Criterion:
    found = sentinel.probe(control.router)
    return Criterion(
        "sentinel", "does a document written through both stores come back from both, and go again?", found or "yes",
        "yes", _verdict(not found), "see RUNBOOK.md, 'a user misses a document'", 1,
    )  # fmt: skip


def _fallback(control: Control, view: View) -> Criterion:
    counts = _counts(control, view)
    reads = sum(count for name, count in counts.items() if name.startswith("reads."))
    return _share(
        "fallback", "how many reads had to fall back on faiss?", counts.get("fallback", 0), reads,
        control.profile.fallback_share, "see RUNBOOK.md, 'pgvector is slow'",
    )  # fmt: skip


def _fallback_free(control: Control, view: View) -> Criterion:
    seconds = control.profile.fallback_free
    with control.connection() as connection:
        (count,) = _row(connection.execute(FALLBACK_FREE, (seconds, view.transition_id)).fetchone())
    return Criterion(
        "fallback-free", f"none in the last {timedelta(seconds=seconds)}?", str(count), "0", _verdict(not count),
        "find out why pgvector failed, then wait",
    )  # fmt: skip


def _share(name: str, question: str, part: int, whole: int, limit: float, todo: str) -> Criterion:
    share = part / whole if whole else 0.0
    verdict = Verdict.INCONCLUSIVE if not whole else _verdict(share <= limit)
    return Criterion(
        name, question, f"{part} of {whole} ({share:.2%})", f"<= {limit:.2%}", verdict,
        todo if whole else "wait for traffic", whole,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cohort:
    """The comparisons of users of one size."""

    cohort: str
    comparisons: int
    agreed: int
    stale: int


def _cohort_rows(control: Control, view: View) -> list[Cohort]:
    parameters = {**_evidence(view), "agreed": [Cause.MATCH.value, Cause.TIE.value]}
    with control.connection() as connection:
        return [Cohort(*row) for row in connection.execute(COHORTS, parameters)]


def _causes(control: Control, view: View) -> dict[Cause, int]:
    with control.connection() as connection:
        return {Cause(row[0]): row[1] for row in connection.execute(CAUSES, _evidence(view))}


def _evidence(view: View) -> dict[str, Any]:
    """What selects the comparisons that count: since the last step, made the present way, of any k."""
    return {
        "transition_id": view.transition_id,
        "fingerprints": [fingerprint(k) for k in range(1, LARGEST_K + 1)],
    }


def _patience(control: Control, view: View, have: int, needed: int) -> str:
    """How long until enough samples, at the pace so far."""
    with control.connection() as connection:
        (age,) = _row(connection.execute(AGE, (view.transition_id,)).fetchone())
    if not have:
        return "wait for traffic; none so far"
    return f"wait for traffic, about {timedelta(seconds=round(age * (needed - have) / have))} at the pace so far"


def _counts(control: Control, view: View) -> dict[str, int]:
    with control.connection() as connection:
        return {row[0]: row[1] for row in connection.execute(COUNTS, (view.transition_id,))}


def _row(row: tuple[Any, ...] | None) -> tuple[Any, ...]:
    if row is None:
        raise LookupError("an aggregate returned no row")
    return row


def _verdict(holds: bool) -> Verdict:
    return Verdict.PASS if holds else Verdict.FAIL
