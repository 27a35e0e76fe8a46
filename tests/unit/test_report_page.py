"""The numbers behind the page, what it warns of, and that it is a function of its data. No database, no browser."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from rollout.evidence_checks import wilson_lower
from rollout.gates import Criterion, Gate, Verdict
from rollout.hold import Hold
from rollout.report import page, panels
from rollout.report.agreement import agreement, by_cause, runs
from rollout.report.alarms import Level, alarms
from rollout.report.data import SPANS, Count, Difference, Judged, Latency, Report, Series, Tally, Transition
from rollout.report.queries import fitting
from rollout.report.scales import Scale, rounded_up, shares, ticks, times
from rollout.transitions import Target
from src.tools.rag_tools.migration.causes import Cause
from src.tools.rag_tools.migration.stages import Stage

pytestmark = pytest.mark.migration

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
STATUS: dict[str, Any] = {
    "stage": "live", "read_percent": 10, "transition": 5, "reads": ["faiss", "pgvector"],
    "writes": ["faiss", "pgvector"], "shadow": True, "shadow_sample_rate": 1.0, "forward": "live at 50 percent",
    "fleet": [], "owed": [], "failing": [], "legacy": [],
}  # fmt: skip
LEAKED = Series([Tally(NOW - timedelta(minutes=5), 5, "small", Cause.OWNER_MISMATCH, 2)])


def minutes(ago: int) -> datetime:
    return NOW - timedelta(minutes=ago)


def report(**parts: Any) -> Report:
    made = Report(NOW, "production", SPANS[1], 0.99, 100.0, {**STATUS, **parts.pop("status", {})})
    return replace(made, **parts)


def process(**parts: Any) -> dict[str, Any]:
    return {
        "instance": "0f", "host": "app-1", "pid": 7, "transition": 5, "silent_seconds": 0.5, "halted": None,
        "state": "arrived", **parts,
    }  # fmt: skip


# -- agreement


def test_the_bound_counts_everything_since_the_step_and_forgets_the_step_before() -> None:
    series = Series(
        tallies=[
            Tally(minutes(50), 4, "small", "match", 100),
            Tally(minutes(40), 5, "small", "match", 10),
            Tally(minutes(30), 5, "small", "match", 20),
            Tally(minutes(30), 5, "small", "error", 1),
        ]
    )
    points = agreement(series)["small"]
    assert [(point.transition, point.judged) for point in points] == [(4, 100), (5, 10), (5, 21)]
    assert [point.bound for point in points] == [wilson_lower(100, 100), wilson_lower(10, 10), wilson_lower(30, 31)]
    assert [len(run) for run in runs(points)] == [1, 2]


def test_what_was_compared_before_the_chart_begins_counts_in_the_bound_but_in_no_bucket() -> None:
    series = Series([Tally(minutes(5), 5, "small", "match", 10)], before=[Judged(5, "small", 89, 90)])
    (point,) = agreement(series)["small"]
    assert (point.judged, point.share) == (10, 1.0)
    assert point.bound == wilson_lower(99, 100)


def test_stale_comparisons_are_not_judged_and_ties_agree() -> None:
    series = Series([Tally(minutes(5), 5, "small", cause, 2) for cause in ("stale", "tie", "timeout")])
    (point,) = agreement(series)["small"]
    assert (point.share, point.judged) == (0.5, 4)
    only_stale = agreement(Series([Tally(minutes(5), 5, "small", "stale", 2)]))["small"]
    assert (only_stale[0].share, only_stale[0].judged) == (None, 0)


def test_cohorts_stand_in_order_of_size() -> None:
    series = Series([Tally(minutes(5), 5, cohort, "match", 1) for cohort in ("large", "small", "medium")])
    assert list(agreement(series)) == ["small", "medium", "large"]


def test_causes_are_added_up_over_cohorts_and_transitions() -> None:
    met: list[tuple[int, int, str, str, int]] = [
        (5, 4, "small", "error", 1),
        (5, 5, "large", "error", 2),
        (4, 5, "large", "match", 3),
    ]
    series = Series([Tally(minutes(ago), step, cohort, cause, count) for ago, step, cohort, cause, count in met])
    assert by_cause(series) == {"match": {minutes(4): 3}, "error": {minutes(5): 3}}


# -- axes


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.3, 0.3), (7, 8), (11, 15), (550, 600), (1_000, 1_000), (8_001, 10_000)]
)
def test_an_axis_ends_at_the_next_round_number(value: float, rounded: float) -> None:
    assert rounded_up(value) == pytest.approx(rounded)


def test_an_axis_of_shares_begins_below_every_value() -> None:
    assert shares(0.985) == pytest.approx([0.98, 0.985, 0.99, 0.995, 1.0])
    assert shares(0.0)[0] == 0.0
    assert all(shares(part / 100)[0] <= part / 100 for part in range(101))


def test_values_outside_an_axis_fall_on_its_edge() -> None:
    scale = Scale(0, 10, 100, 0)
    assert [scale(value) for value in (-5, 0, 5, 10, 99)] == [100, 100, 50, 0, 0]


@pytest.mark.parametrize("span", SPANS, ids=lambda span: span.name)
def test_each_span_has_few_labels_and_a_readable_number_of_buckets(span: Any) -> None:
    labels = times(NOW - timedelta(seconds=span.seconds), NOW)
    assert 2 <= len(labels) <= 7
    assert 30 <= span.seconds / span.bucket <= 60


def test_ticks_hold_no_more_than_the_axis() -> None:
    assert ticks(600) == [0, 200, 400, 600]
    assert max(ticks(15)) <= 15


@pytest.mark.parametrize(
    ("age", "name"),
    [(None, "10m"), (timedelta(minutes=9), "10m"), (timedelta(hours=2), "6h"), (timedelta(days=9), "24h")],
)
def test_the_charts_show_the_whole_rollout_but_a_day_at_most_by_themselves(age: timedelta | None, name: str) -> None:
    assert fitting(NOW, None if age is None else NOW - age).name == name


# -- charts


def test_a_chart_says_in_words_what_it_shows_and_its_numbers_stand_in_a_table() -> None:
    series = Series(
        tallies=[Tally(minutes(5), 5, "small", "match", 3), Tally(minutes(5), 5, "small", "reorder", 1)],
        latencies=[Latency(minutes(5), "faiss", 1.0, 4.0, 4), Latency(minutes(5), "pgvector", 2.0, 140.0, 4)],
        counts=[Count(minutes(5), "reads.faiss", 9), Count(minutes(5), "fallback", 2)],
    )
    made = {
        panel.id: panel for panel in [*panels.evidence(report(series=series)), *panels.reads(report(series=series))]
    }
    assert list(made) == ["agreement-small", "causes", "differences", "p50", "p99", "reads"]
    assert made["agreement-small"].rows == [["01 Mar 11:55:00", "#5", 4, "75.00%", f"{wilson_lower(3, 4):.4f}"]]
    assert made["causes"].rows == [["01 Mar 11:55:00", 3, 1]]
    assert made["p99"].rows == [["01 Mar 11:55:00", "4.0 ms", "140.0 ms"]]
    assert "last faiss 4.0 ms, pgvector 140.0 ms" in made["p99"].svg
    assert made["reads"].note == "2 fell back on FAISS, 0 shadow reads were dropped"
    assert all('role="img" aria-label="' in panel.svg for panel in made.values())


def test_without_comparisons_there_are_no_charts() -> None:
    assert panels.evidence(report()) == []
    assert panels.reads(report()) == []


def test_a_leak_stands_first_among_the_causes_and_what_is_explained_last() -> None:
    series = Series([Tally(minutes(5), 5, "small", cause, n) for cause, n in (("match", 9), ("error", 5))])
    leaked = Series([*series.tallies, Tally(minutes(5), 5, "small", "owner_mismatch", 1)])
    assert [cause for cause, _, _ in panels.totals(report(series=leaked))] == ["owner_mismatch", "error", "match"]


# -- alarms


def test_a_quiet_rollout_raises_no_alarm() -> None:
    assert alarms(report(status={"fleet": [process()]})) == []


@pytest.mark.parametrize(
    ("parts", "level", "words"),
    [
        ({"series": LEAKED}, Level.BAD, "2 comparisons found"),
        ({"transitions": [Transition(5, "live", 0, "guard", "errors 9 of 20", NOW)]}, Level.BAD, "errors 9 of 20"),
        ({"status": {"fleet": [process(halted="lost commits")]}}, Level.BAD, "1 process (app-1:7) stopped writing"),
        ({"status": {"fleet": [process(state="late")] * 9}}, Level.WARN, "9 processes (app-1:7, app-1:7, app-1:7,"),
        ({"status": {"owed": [{"state": "aside", "entries": 3}]}}, Level.WARN, "3 ledger entries set aside"),
        ({"hold": Hold("ada", "Friday", NOW)}, Level.WARN, "ada holds the rollout since 01 Mar 12:00:00: Friday"),
        ({"profile": "rehearsal"}, Level.NOTE, "'rehearsal' is in force"),
        ({"status": {"fleet": [process(state="dead")]}}, Level.NOTE, "no backend process is running"),
    ],
)  # fmt: skip
def test_what_a_person_must_see_is_said_at_the_top(parts: dict[str, Any], level: Level, words: str) -> None:
    status = {"fleet": [process()]} | parts.pop("status", {})
    (alarm,) = alarms(
        report(status={**status, "owed": [{**_owed(), **row} for row in status.get("owed", [])]}, **parts)
    )
    assert alarm.level is level
    assert words in alarm.text


def test_the_gravest_alarm_comes_first() -> None:
    found = alarms(report(profile="rehearsal", hold=Hold("a", "b", NOW), status={"fleet": [process(halted="x")]}))
    assert [alarm.level for alarm in found] == [Level.BAD, Level.WARN, Level.NOTE]


# -- the page


def test_the_same_data_gives_the_same_page() -> None:
    assert page.render(report()) == page.render(report())


def test_a_criterion_that_was_not_asked_is_named_with_the_reason_and_the_verdict_says_so() -> None:
    gate = Gate(Target(Stage.LIVE, 50), [Criterion("fleet", "all?", "3 of 3", "all", Verdict.PASS)])
    text = page.render(report(gate=gate, left_out={"sentinel": "it writes a document"}))
    assert "pass, as far as asked" in text
    assert "it writes a document" in text
    assert "not asked here" in text


def test_a_page_without_renewal_runs_nothing_and_loads_nothing() -> None:
    text = page.render(report())
    assert "<script" not in text
    assert "script-src" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text


def test_text_of_others_is_escaped_and_commands_in_it_are_set_as_code() -> None:
    row = Difference(7, NOW, 5, 1, "small", "error", "faiss", None, failed="see `<b>` & \x1b[31m\u202e")
    text = page.render(report(differences=[row]))
    assert "see <code>&lt;b&gt;</code> &amp; \\x1b[31m\\u202e" in text


def test_a_page_that_could_not_be_collected_says_why_and_tries_again() -> None:
    text = page.render_failure("PostgreSQL is away: <x>", refresh_seconds=15)
    assert "PostgreSQL is away: &lt;x&gt;" in text
    assert 'data-refresh="15"' in text


def _owed() -> dict[str, Any]:
    return {"store": "pgvector", "wanted": "present", "oldest_seconds": 1.0, "most_attempts": 1}
