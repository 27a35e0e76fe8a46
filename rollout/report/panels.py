"""The charts of the page: which there are, what each shows, and its numbers as a table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from markupsafe import Markup

from rollout.report import charts
from rollout.report.agreement import Point, agreement, by_cause, runs
from rollout.report.charts import Axis, Line
from rollout.report.data import Latency, Report
from rollout.report.scales import moment, rounded_up, shares, short_number, ticks
from src.tools.rag_tools.migration.causes import EXPLAINED, Cause
from src.tools.rag_tools.migration.stages import Store

SIZES = {"small": "fewer than 100 chunks", "medium": "100 to 9,999 chunks", "large": "10,000 chunks and more"}
FALLBACK, DROPPED, READS = "fallback", "shadow.dropped", "reads."
BOTH = "+".join(Store)


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: `legend` pairs a class of the style with its words, `key` a line's; the rest is its table."""

    id: str
    title: str
    note: str
    svg: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    legend: Sequence[tuple[str, str]] = ()
    key: Sequence[tuple[str, str]] = ()


def axis(report: Report) -> Axis:
    """From the first whole bucket to now."""
    marks = [(each.id, each.at) for each in report.transitions if each.id > 1 and each.at >= report.begins]
    return Axis(report.begins, report.as_of, timedelta(seconds=report.span.bucket), marks)


def evidence(report: Report) -> list[Panel]:
    """Agreement by cohort, causes, latency; none where nothing was compared."""
    if not report.series.tallies:
        return []
    time = axis(report)
    found = [_agreement(time, cohort, points, report) for cohort, points in agreement(report.series).items()]
    return [*found, *_causes(time, by_cause(report.series)), *_latencies(time, report)]


def reads(report: Report) -> list[Panel]:
    """Who answered the users; nothing where nobody asked."""
    stores: dict[str, dict[datetime, int]] = {name: {} for name in (Store.FAISS, Store.PGVECTOR, BOTH)}
    for each in report.series.counts:
        if each.name.startswith(READS):
            counts = stores.setdefault(each.name.removeprefix(READS), {})
            counts[each.at] = counts.get(each.at, 0) + each.count
    met = {name: counts for name, counts in stores.items() if counts}
    if not met:
        return []
    note = f"{_total(report, FALLBACK)} fell back on FAISS, {_total(report, DROPPED)} shadow reads were dropped"
    legend = [(_class(name), name.replace("+", " and ")) for name in met]
    drawn = {_class(name): counts for name, counts in met.items()}
    svg = charts.stacked(axis(report), drawn, f"Answered reads by store over time; {note}")
    return [Panel("reads", "Answered reads", note, svg, ["from (UTC)", *met], _rows(met), legend)]


def totals(report: Report) -> list[tuple[str, int, bool]]:
    """Each cause that was met, how often, and whether it is explained by itself; the gravest question first."""
    counted = {cause: sum(counts.values()) for cause, counts in by_cause(report.series).items()}
    rows = [(cause, count, cause in EXPLAINED) for cause, count in counted.items()]
    return sorted(rows, key=lambda row: (row[0] != Cause.OWNER_MISMATCH, row[2], -row[1]))


def _agreement(time: Axis, cohort: str, points: Sequence[Point], report: Report) -> Panel:
    met = [point.share for point in points if point.share is not None]
    labels = shares(min([*met, points[-1].bound, report.threshold]))
    lines = [
        Line("share", [[(each.at, each.share) for each in points if each.share is not None]], dots=True),
        Line("bound", [[(each.at, each.bound) for each in run] for run in runs(points)]),
    ]
    notes = {
        each.at: f"{_percent(each.share)} of {each.judged} agreed, bound {each.bound:.4f} (#{each.transition})"
        for each in points
    }
    last = points[-1]
    svg = charts.lined(
        time, lines, f"Agreement of {cohort} users over time; the bound is {last.bound:.4f} now",
        low=labels[0], high=1.0, at=labels, label=_axis_percent,
        threshold=report.threshold, notes=notes,
    )  # fmt: skip
    rows = [
        [moment(each.at), f"#{each.transition}", each.judged, _percent(each.share), f"{each.bound:.4f}"]
        for each in points
    ]
    return Panel(
        f"agreement-{cohort}",
        f"Agreement, {cohort} users",
        f"{SIZES.get(cohort, 'own chunks')}; bound {last.bound:.4f} now, {report.threshold} needed",
        svg,
        ["from (UTC)", "transition", "judged", "agreed", "bound"],
        rows,
        key=[("share", "agreed in the bucket"), ("bound", "lower 95 % bound since the step"), ("threshold", "needed")],
    )


def _causes(time: Axis, causes: Mapping[str, Mapping[datetime, int]]) -> list[Panel]:
    panels = [_stack(time, "causes", "Comparisons by cause", "everything compared", causes)]
    differing = {cause: counts for cause, counts in causes.items() if cause != Cause.MATCH}
    if differing:
        panels.append(_stack(time, "differences", "Differences by cause", "the same without `match`", differing))
    return panels


def _stack(time: Axis, name: str, title: str, note: str, causes: Mapping[str, Mapping[datetime, int]]) -> Panel:
    total = sum(sum(counts.values()) for counts in causes.values())
    svg = charts.stacked(time, causes, f"{title} over time; {total} in all")
    return Panel(
        name, title, f"{note}: {total}", svg, ["from (UTC)", *causes], _rows(causes),
        [(cause, cause) for cause in causes],
    )  # fmt: skip


def _latencies(time: Axis, report: Report) -> list[Panel]:
    latencies = report.series.latencies
    if not latencies:
        return []
    return [
        _latency(time, latencies, "p50", None),
        _latency(time, latencies, "p99", report.p99_ms),
    ]


def _latency(time: Axis, latencies: Sequence[Latency], quantile: str, threshold: float | None) -> Panel:
    values = {store: {each.at: _value(each, quantile) for each in latencies if each.store == store} for store in Store}
    high = rounded_up(max(value for each in values.values() for value in each.values()) or 1.0)
    buckets = sorted({each.at for each in latencies})
    rows = [[moment(at), *(_ms(values[store].get(at)) for store in Store)] for at in buckets]
    last = ", ".join(f"{store} {_ms(values[store].get(buckets[-1]))}" for store in Store)
    svg = charts.lined(
        time, [Line(store, [sorted(each.items())]) for store, each in values.items()],
        f"Latency {quantile} of both stores over time; last {last}",
        low=0.0, high=high, at=ticks(high), label=short_number, threshold=threshold,
        notes={at: ", ".join(f"{store} {_ms(values[store].get(at))}" for store in Store) for at in buckets},
    )  # fmt: skip
    return Panel(
        quantile, f"Latency, {quantile} in ms", f"of compared reads; last: {last}", svg, ["from (UTC)", *Store], rows,
        key=[(store.value, store.value) for store in Store],
    )  # fmt: skip


def _rows(series: Mapping[str, Mapping[datetime, int]]) -> list[list[object]]:
    buckets = sorted({at for counts in series.values() for at in counts})
    return [[moment(at), *(counts.get(at, 0) for counts in series.values())] for at in buckets]


def _total(report: Report, name: str) -> int:
    return sum(each.count for each in report.series.counts if each.name == name)


def _class(store: str) -> str:
    return "both" if "+" in store else store


def _value(latency: Latency, quantile: str) -> float:
    return latency.p50 if quantile == "p50" else latency.p99


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _percent(share: float | None) -> str:
    return "nothing" if share is None else f"{share:.2%}"


def _axis_percent(share: float) -> str:
    return f"{share * 100:g}%"
