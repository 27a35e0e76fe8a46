"""Agreement over time and the bound that the gate asks for, from counts; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from rollout.evidence_checks import wilson_lower
from rollout.report.data import Series
from src.tools.rag_tools.migration.causes import Cause

AGREED = frozenset({Cause.MATCH.value, Cause.TIE.value})
COHORTS = ("small", "medium", "large")


@dataclass(frozen=True, slots=True)
class Point:
    """One bucket of a cohort: its own share, and the bound of everything since the transition began.

    `share` is None where every comparison was stale. Shares between 0 and 1.
    """

    at: datetime
    transition: int
    share: float | None
    bound: float
    judged: int


def agreement(series: Series) -> dict[str, list[Point]]:
    """The points of each cohort that was compared, small users first, in order of transition and time."""
    buckets = _buckets(series)
    totals = {(each.cohort, each.transition): (each.agreed, each.judged) for each in series.before}
    found: dict[str, list[Point]] = defaultdict(list)
    for (cohort, transition, at), (agreed, judged) in buckets.items():
        before = totals.get((cohort, transition), (0, 0))
        so_far = (before[0] + agreed, before[1] + judged)
        totals[cohort, transition] = so_far
        share = agreed / judged if judged else None
        found[cohort].append(Point(at, transition, share, wilson_lower(*so_far), judged))
    return {cohort: found[cohort] for cohort in sorted(found, key=_size)}


def runs(points: Sequence[Point]) -> list[list[Point]]:
    """The points of each transition: a bound belongs to one, and no line joins two."""
    found: dict[int, list[Point]] = defaultdict(list)
    for point in points:
        found[point.transition].append(point)
    return list(found.values())


def by_cause(series: Series) -> dict[str, dict[datetime, int]]:
    """Comparisons of each cause that was met, by bucket, in the order in which causes are defined."""
    found: dict[str, dict[datetime, int]] = {cause.value: {} for cause in Cause}
    for tally in series.tallies:
        counts = found.setdefault(tally.cause, {})
        counts[tally.at] = counts.get(tally.at, 0) + tally.count
    return {cause: counts for cause, counts in found.items() if counts}


def _buckets(series: Series) -> Mapping[tuple[str, int, datetime], tuple[int, int]]:
    """Agreed and judged comparisons, in order of transition and time."""
    counts: dict[tuple[str, int, datetime], tuple[int, int]] = {}
    for tally in sorted(series.tallies, key=lambda each: (each.transition, each.at)):
        key = (tally.cohort, tally.transition, tally.at)
        agreed, judged = counts.get(key, (0, 0))
        agrees, judges = tally.cause in AGREED, tally.cause != Cause.STALE
        counts[key] = (agreed + tally.count * agrees, judged + tally.count * judges)
    return counts


def _size(cohort: str) -> tuple[int, str]:
    return (COHORTS.index(cohort) if cohort in COHORTS else len(COHORTS), cohort)
