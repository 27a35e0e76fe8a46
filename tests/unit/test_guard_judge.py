"""When the guard goes back: each limit alone, for three windows in a row; a leak at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from src.tools.rag_tools.migration.guard import WINDOWS, Limits, Window, faults, judge, retreat
from src.tools.rag_tools.migration.stages import Stage
from src.tools.rag_tools.migration.transitions import Target

pytestmark = pytest.mark.migration

LIMITS = Limits()
GOOD = Window(
    comparisons=1_000, errors=0, timeouts=0, stale=0, agreements=1_000, pgvector_p99_ms=5.0, faiss_p99_ms=5.0,
    reads=1_000, fallbacks=0,
)  # fmt: skip
EMPTY = Window(0, 0, 0, 0, 0, None, None)

# Past one limit and within every other: `agreements` counts what neither failed nor was slow to answer.
BAD = {
    "errors": (replace(GOOD, errors=21), "errors 21 of 1000"),
    "timeouts": (replace(GOOD, timeouts=21), "timeouts 21 of 1000"),
    "agreement": (replace(GOOD, agreements=979), "agreement 97.90% of 1000"),
    "latency": (replace(GOOD, pgvector_p99_ms=101.0), "p99 of pgvector 101 ms, of faiss 5 ms"),
    "fallbacks": (replace(GOOD, fallbacks=21), "fallbacks 21 of 1000"),
}
AT_THE_LIMIT = {
    "errors": replace(GOOD, errors=20),
    "timeouts": replace(GOOD, timeouts=20),
    "agreement": replace(GOOD, agreements=980),
    "agreement without what was owed": replace(GOOD, stale=500, agreements=490),
    "latency of 100 ms": replace(GOOD, pgvector_p99_ms=100.0),
    "latency of a quarter more": replace(GOOD, pgvector_p99_ms=250.0, faiss_p99_ms=200.0),
    "fallbacks": replace(GOOD, fallbacks=20),
}
TOO_FEW = {
    "errors": replace(EMPTY, comparisons=19, errors=19),
    "timeouts": replace(EMPTY, comparisons=19, timeouts=19),
    "agreement": replace(EMPTY, comparisons=19),
    "agreement, nearly all of it owed": replace(EMPTY, comparisons=1_000, stale=981),
    "all of it owed": replace(EMPTY, comparisons=1_000, stale=1_000),
    "latency": replace(EMPTY, comparisons=19, agreements=19, pgvector_p99_ms=5_000.0, faiss_p99_ms=1.0),
    "latency of pgvector alone": replace(GOOD, pgvector_p99_ms=5_000.0, faiss_p99_ms=None),
    "fallbacks": replace(EMPTY, reads=19, fallbacks=19),
    "nothing": EMPTY,
}


def three(window: Window) -> list[Window]:
    return [window] * WINDOWS


@pytest.mark.parametrize("name", BAD)
def test_each_limit_alone_takes_back_after_three_windows_and_says_so(name: str) -> None:
    window, said = BAD[name]
    assert set(faults(window, LIMITS)) == {name}
    assert judge(three(window), 0, LIMITS) == f"for 3 windows: {said}"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("when", range(WINDOWS))
@pytest.mark.parametrize("otherwise", [GOOD, EMPTY], ids=["good", "empty"])
def test_two_bad_windows_are_no_reason_wherever_the_third_falls(name: str, when: int, otherwise: Window) -> None:
    windows = three(BAD[name][0])
    windows[when] = otherwise
    assert judge(windows, 0, LIMITS) is None


@pytest.mark.parametrize("count", range(WINDOWS))
def test_fewer_windows_than_three_are_no_reason(count: int) -> None:
    assert judge([BAD["errors"][0]] * count, 0, LIMITS) is None


def test_three_windows_bad_in_three_ways_are_no_reason() -> None:
    assert judge([BAD["errors"][0], BAD["timeouts"][0], BAD["agreement"][0]], 0, LIMITS) is None


def test_what_lasted_is_told_with_the_numbers_of_the_newest_window() -> None:
    windows = [replace(GOOD, errors=errors, timeouts=timeouts) for errors, timeouts in ((90, 0), (80, 70), (60, 50))]
    assert judge(windows, 0, LIMITS) == "for 3 windows: errors 60 of 1000"


def test_everything_that_lasted_is_told() -> None:
    window = replace(GOOD, errors=100, timeouts=50, agreements=850)
    assert judge(three(window), 0, LIMITS) == (
        "for 3 windows: agreement 85.00% of 1000; errors 100 of 1000; timeouts 50 of 1000"
    )


@pytest.mark.parametrize("name", AT_THE_LIMIT)
def test_at_the_limit_is_within_it(name: str) -> None:
    assert faults(AT_THE_LIMIT[name], LIMITS) == {}
    assert judge(three(AT_THE_LIMIT[name]), 0, LIMITS) is None


@pytest.mark.parametrize("name", TOO_FEW)
def test_too_few_reads_say_nothing(name: str) -> None:
    assert faults(TOO_FEW[name], LIMITS) == {}
    assert judge(three(TOO_FEW[name]), 0, LIMITS) is None


@pytest.mark.parametrize("windows", [three(GOOD), three(EMPTY), [EMPTY], []], ids=["good", "empty", "one", "none"])
def test_a_chunk_of_another_user_takes_back_at_once_whatever_the_windows_say(windows: Sequence[Window]) -> None:
    assert judge(windows, 1, LIMITS) == "1 comparisons found a chunk that belongs to another user"


def test_good_windows_are_no_reason() -> None:
    assert judge(three(GOOD), 0, LIMITS) is None


@pytest.mark.parametrize(
    ("stage", "percent", "expected"),
    [
        (Stage.OFF, 0, None),
        (Stage.DUALWRITE, 0, None),
        (Stage.SHADOW, 0, Target(Stage.DUALWRITE, 0)),
        (Stage.LIVE, 0, None),
        (Stage.LIVE, 1, Target(Stage.LIVE, 0)),
        (Stage.LIVE, 50, Target(Stage.LIVE, 0)),
        (Stage.LIVE, 100, Target(Stage.LIVE, 0)),
        (Stage.RAMPDOWN, 100, Target(Stage.LIVE, 0)),
        (Stage.COMPLETE, 100, None),
    ],
)
def test_it_goes_back_to_where_users_read_faiss_and_never_further(
    stage: Stage, percent: int, expected: Target | None
) -> None:
    assert retreat(stage, percent) == expected
