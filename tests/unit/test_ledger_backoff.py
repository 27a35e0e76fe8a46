"""How long a failed entry waits before it is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.tools.rag_tools.migration.ledger import BACKOFF_LIMIT_SECONDS, backoff

pytestmark = pytest.mark.migration

attempts = st.integers(min_value=1, max_value=2**31 - 1)
jitters = st.floats(min_value=0.0, max_value=1.0)


def test_the_wait_doubles_with_each_attempt() -> None:
    assert [backoff(number, 1.0) for number in (1, 2, 3, 4)] == [2.0, 4.0, 8.0, 16.0]


@given(attempts, jitters)
def test_the_wait_is_never_longer_than_five_minutes_nor_shorter_than_a_second(number: int, jitter: float) -> None:
    assert 1.0 <= backoff(number, jitter) <= BACKOFF_LIMIT_SECONDS == 300.0


@given(attempts, jitters)
def test_jitter_takes_at_most_half_of_the_wait(number: int, jitter: float) -> None:
    assert backoff(number, 1.0) / 2 <= backoff(number, jitter) <= backoff(number, 1.0)


@given(attempts)
def test_two_processes_with_different_luck_do_not_come_back_together(number: int) -> None:
    assert backoff(number, 0.0) < backoff(number, 0.5) < backoff(number, 1.0)


@given(attempts, jitters)
def test_a_later_attempt_waits_no_less(number: int, jitter: float) -> None:
    assert backoff(number, jitter) <= backoff(number + 1, jitter)
