"""When a store that keeps failing is left alone, and for how long; the clock moves only when told to."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from src.tools.rag_tools.migration.breaker import FAILURES, REST_SECONDS, Breaker

pytestmark = pytest.mark.migration


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock=clock)


def fail(breaker: Breaker, times: int = FAILURES) -> None:
    for _ in range(times):
        breaker.failed()


def test_a_store_is_asked_until_it_has_failed_five_times_in_a_row(breaker: Breaker) -> None:
    fail(breaker, FAILURES - 1)
    assert not breaker.open
    fail(breaker, 1)
    assert breaker.open


def test_one_success_in_between_begins_the_count_anew(breaker: Breaker) -> None:
    fail(breaker, FAILURES - 1)
    breaker.succeeded()
    fail(breaker, FAILURES - 1)
    assert not breaker.open


def test_it_is_left_alone_for_ten_seconds_and_then_asked_again(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += REST_SECONDS - 0.001
    assert breaker.open
    clock.now += 0.001
    assert not breaker.open


def test_after_the_rest_one_failure_is_enough_to_leave_it_alone_again(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    for _ in range(3):
        clock.now += REST_SECONDS
        assert not breaker.open
        fail(breaker, 1)
        assert breaker.open


def test_after_the_rest_one_success_is_enough_to_trust_it_again(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += REST_SECONDS
    breaker.succeeded()
    fail(breaker, FAILURES - 1)
    assert not breaker.open


def test_a_late_failure_while_it_rests_makes_the_rest_longer_but_never_endless(breaker: Breaker, clock: Clock) -> None:
    fail(breaker)
    clock.now += REST_SECONDS - 1
    fail(breaker, 1)
    clock.now += REST_SECONDS - 0.001
    assert breaker.open
    clock.now += 0.001
    assert not breaker.open


def test_failures_of_many_threads_at_once_are_all_counted(clock: Clock) -> None:
    threads, each = 8, 50
    breaker, barrier = Breaker(failures=threads * each, clock=clock), Barrier(threads)

    def work() -> None:
        barrier.wait(30)
        fail(breaker, each)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()
    assert breaker.open
