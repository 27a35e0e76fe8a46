"""Where a view sends reads and writes, and what a process's own notes add to what a poll brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.tools.rag_tools.migration.flags import (
    Flags,
    FlagsUnknownError,
    HaltedError,
    View,
    is_stale,
)
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from src.tools.rag_tools.migration.targeting import bucket
from src.tools.rag_tools.pgvector_store import Pool

pytestmark = pytest.mark.migration

F, P = Store.FAISS, Store.PGVECTOR
USER = 7
BELOW, ABOVE = bucket(USER) - 1e-6, bucket(USER) + 1e-6
ONE_STORE = [stage for stage in Stage if len(ROUTING[stage].writes) == 1]
TWO_STORES = [stage for stage in Stage if len(ROUTING[stage].writes) == 2]

users = st.integers(min_value=1, max_value=2**31 - 1)
stages = st.sampled_from(list(Stage))
thresholds = st.floats(min_value=0.0, max_value=100.0)
owings = st.frozensets(st.sampled_from(list(Store)))


def view(stage: Stage, *, threshold: float = 0.0, owed: frozenset[Store] = frozenset(), number: int = 1) -> View:
    return View(number, stage, round(threshold), threshold, 1.0, {USER: owed} if owed else {})


@pytest.mark.parametrize(
    ("stage", "serving"),
    [(Stage.OFF, F), (Stage.DUALWRITE, F), (Stage.SHADOW, F), (Stage.RAMPDOWN, P), (Stage.COMPLETE, P)],
)
@pytest.mark.parametrize("threshold", [0.0, 100.0])
def test_outside_the_ramp_the_stage_alone_says_who_serves(stage: Stage, serving: Store, threshold: float) -> None:
    assert view(stage, threshold=threshold).serving(USER) is serving


def test_on_the_ramp_a_user_below_the_threshold_is_served_by_pgvector() -> None:
    assert view(Stage.LIVE, threshold=BELOW).serving(USER) is F
    assert view(Stage.LIVE, threshold=ABOVE).serving(USER) is P


def test_at_0_percent_everybody_is_served_by_faiss_and_at_100_by_pgvector() -> None:
    assert {view(Stage.LIVE, threshold=0.0).serving(user) for user in range(5_000)} == {F}
    assert {view(Stage.LIVE, threshold=100.0).serving(user) for user in range(5_000)} == {P}


@given(stages, thresholds, users)
def test_the_serving_store_is_written_first_and_every_store_of_the_stage_is_written(
    stage: Stage, threshold: float, user: int
) -> None:
    made = view(stage, threshold=threshold)
    assert made.writes(user)[0] is made.serving(user)
    assert set(made.writes(user)) == set(ROUTING[stage].writes)
    assert len(made.writes(user)) == len(ROUTING[stage].writes)


@pytest.mark.parametrize("stage", TWO_STORES)
@pytest.mark.parametrize("threshold", [0.0, 100.0])
def test_a_user_is_read_from_a_store_that_owes_them_nothing(stage: Stage, threshold: float) -> None:
    serving = view(stage, threshold=threshold).serving(USER)
    read = {
        owed: view(stage, threshold=threshold, owed=frozenset(owed)).reads(USER)
        for owed in [(), (serving,), (serving.other,), (F, P)]
    }
    assert read == {(): (serving,), (serving,): (serving.other,), (serving.other,): (serving,), (F, P): (F, P)}


@pytest.mark.parametrize("stage", ONE_STORE)
@pytest.mark.parametrize("owed", [(), (F,), (P,), (F, P)])
def test_a_stage_that_writes_one_store_reads_no_other(stage: Stage, owed: tuple[Store, ...]) -> None:
    made = view(stage, owed=frozenset(owed))
    assert made.reads(USER) == ROUTING[stage].reads
    assert made.fallback(USER) is None


@given(stages, thresholds, owings)
def test_a_write_goes_by_the_serving_store_whatever_a_fallback_reads(
    stage: Stage, threshold: float, owed: frozenset[Store]
) -> None:
    assert view(stage, threshold=threshold, owed=owed).writes(USER) == view(stage, threshold=threshold).writes(USER)


@given(stages, thresholds, owings)
def test_nobody_falls_back_on_a_store_that_owes_something(
    stage: Stage, threshold: float, owed: frozenset[Store]
) -> None:
    made = view(stage, threshold=threshold, owed=owed)
    if owed:
        assert made.fallback(USER) is None
    elif len(ROUTING[stage].writes) == 2:
        assert made.fallback(USER) is made.serving(USER).other


def test_what_is_owed_to_one_user_moves_no_other() -> None:
    made = view(Stage.SHADOW, owed=frozenset({F}))
    assert made.reads(USER) == (P,)
    assert made.reads(USER + 1) == (F,)


# -- the ramp


@given(users, thresholds, thresholds)
def test_a_user_who_is_in_stays_in_while_the_ramp_widens(user: int, one: float, other: float) -> None:
    lower, higher = sorted((one, other))
    if view(Stage.LIVE, threshold=lower).serving(user) is P:
        assert view(Stage.LIVE, threshold=higher).serving(user) is P


def test_who_is_in_at_10_percent_is_in_at_50() -> None:
    at = {
        percent: {user for user in range(2_000) if view(Stage.LIVE, threshold=percent).serving(user) is P}
        for percent in (1.0, 10.0, 50.0, 100.0)
    }
    assert at[1.0] < at[10.0] < at[50.0] < at[100.0] == set(range(2_000))


def test_buckets_are_spread_evenly() -> None:
    buckets = [bucket(user) for user in range(1, 20_001)]
    tenths = [sum(1 for value in buckets if low <= value < low + 10) for low in range(0, 100, 10)]
    assert all(0 <= value < 100 for value in buckets)
    assert all(1_850 <= count <= 2_150 for count in tenths)  # six standard deviations of a fair draw are 255


def test_a_bucket_is_the_same_in_every_process_and_release() -> None:
    known = {1: 4.564152, 2: 43.561671, 3: 91.498647, 1_000_000: 8.950347}
    assert {user: round(bucket(user), 6) for user in known} == known


# -- age


def test_flags_are_stale_after_30_seconds() -> None:
    made = View(1, Stage.LIVE, 0, 0.0, 1.0, fetched_at=100.0)
    assert not is_stale(made, 130.0)
    assert is_stale(made, 130.1)


def test_flags_are_as_old_as_the_question_and_not_as_the_answer() -> None:
    clock = Clock()
    flags = polled(row(), clock=clock, meanwhile=lambda _: clock.pass_by(31.0))
    assert is_stale(flags.view(), clock())


# -- a process's own notes


def test_before_the_first_poll_there_is_nothing_to_act_on() -> None:
    flags = Flags(cast("Pool", FakePool([])))
    with pytest.raises(FlagsUnknownError, match="not ready"):
        flags.view()
    with pytest.raises(FlagsUnknownError), flags.request():
        pass


def test_a_note_is_known_to_the_next_request_and_the_next_poll_replaces_it() -> None:
    flags = polled(row(), row())
    flags.note_owed(USER, frozenset({P}))
    flags.note_deleted(40)
    with flags.request() as seen:
        assert known(seen) == ({USER: {P}}, {40})
    flags.poll()
    assert known(flags.view()) == ({}, set())


def test_a_poll_that_was_begun_before_a_note_does_not_take_it_away() -> None:
    def upload_and_delete(flags: Flags) -> None:
        flags.note_owed(USER, frozenset({P}))
        flags.note_deleted(40)

    flags = polled(row(), row(), meanwhile=upload_and_delete)
    flags.poll()
    assert known(flags.view()) == ({USER: {P}}, {40})


def test_what_a_poll_begun_before_a_note_brings_for_the_same_user_is_kept_too() -> None:
    """The poll may have looked later than the note did, and seen what another process left owed."""
    flags = polled(row(), row(owed=[[USER, "pgvector"]]), meanwhile=lambda flags: flags.note_owed(USER, frozenset()))
    flags.poll()
    assert known(flags.view()) == ({USER: {P}}, set())


def test_two_uploads_of_one_user_that_note_in_another_order_than_they_looked_lose_nothing() -> None:
    flags = polled(row())
    flags.note_owed(USER, frozenset({P}))  # looked second, noted first
    flags.note_owed(USER, frozenset())
    assert known(flags.view()) == ({USER: {P}}, set())


def test_what_is_owed_by_either_store_adds_up_until_the_next_poll() -> None:
    flags = polled(row(owed=[[USER, "faiss"]]))
    flags.note_owed(USER, frozenset({P}))
    assert flags.view().reads(USER) == (F,)  # `off` writes one store
    assert known(flags.view()) == ({USER: {F, P}}, set())


# -- the fleet


def test_a_request_keeps_its_view_and_the_process_reports_the_oldest_in_flight() -> None:
    pool = FakePool([row(1), row(2), row(3), row(3), row(3)])
    flags = Flags(cast("Pool", pool))
    flags.poll()
    with flags.request() as first:
        flags.poll()
        with flags.request() as second:
            flags.poll()
            assert (first.transition_id, second.transition_id, flags.view().transition_id) == (1, 2, 3)
        flags.poll()
    flags.poll()
    assert pool.reported == [0, 1, 1, 1, 3]


def test_a_request_that_fails_is_no_longer_in_flight() -> None:
    pool = FakePool([row(1), row(2), row(2)])
    flags = Flags(cast("Pool", pool))
    flags.poll()
    with pytest.raises(ZeroDivisionError), flags.request():
        raise ZeroDivisionError
    flags.poll()
    flags.poll()
    assert pool.reported == [0, 1, 2]


def test_a_lower_transition_stops_writes_and_keeps_what_was_known() -> None:
    flags = polled(row(3, "live"), row(2, "shadow", hidden=[41]), row(3, "live"))
    flags.poll()
    assert flags.view().stage is Stage.LIVE
    assert flags.view().hidden == {41}, "a deletion counts, whatever became of the flags"
    with flags.request() as seen:
        assert seen.transition_id == 3
    with pytest.raises(HaltedError, match="lost commits in a failover"), flags.request(write=True):
        pass
    flags.poll()
    assert flags.halted, "only a restart ends it"


def test_a_stage_of_a_later_release_stops_writes_and_leaves_the_flags_as_they_were() -> None:
    flags = polled(row(1), row(2, "contracted"))
    with pytest.raises(FlagsUnknownError, match="contracted"):
        flags.poll()
    assert flags.view().transition_id == 1
    with pytest.raises(HaltedError), flags.request(write=True):
        pass


# -- parts


class Clock:
    """A clock that only a test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


class FakePool:
    """Answers each poll with the next row, after `meanwhile` has happened."""

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self.rows = rows
        self.reported: list[int] = []
        self.meanwhile: Callable[[], None] = lambda: None

    @contextmanager
    def connection(self) -> Iterator[FakePool]:
        yield self

    def execute(self, _: str, parameters: dict[str, Any]) -> FakePool:
        self.reported.append(parameters["acts_on"])
        self.meanwhile()
        return self

    def fetchone(self) -> tuple[Any, ...]:
        return self.rows.pop(0)


def known(view: View) -> tuple[dict[int, set[Store]], set[int]]:
    return {user: set(stores) for user, stores in view.owed.items()}, set(view.hidden)


def row(
    number: int = 1, stage: str = "off", *, owed: list[list[Any]] | None = None, hidden: list[int] | None = None
) -> tuple[Any, ...]:
    return (number, stage, 0, 0.0, 1.0, owed or [], hidden or [], 0)


def polled(
    *rows: tuple[Any, ...], clock: Clock | None = None, meanwhile: Callable[[Flags], None] | None = None
) -> Flags:
    """Flags after the first poll; `meanwhile` happens between the question and the answer of the last one."""
    pool = FakePool(list(rows))
    flags = Flags(cast("Pool", pool), clock=clock or Clock())
    arm = (lambda: meanwhile(flags)) if meanwhile else pool.meanwhile
    if len(rows) == 1:
        pool.meanwhile = arm
    flags.poll()
    pool.meanwhile = arm
    return flags
