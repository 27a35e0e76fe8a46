"""How often a log-in may fail, by a clock that the test moves."""

from __future__ import annotations

import pytest

from src.auth import throttle as module
from src.auth.errors import TooManyAttemptsError
from src.auth.throttle import BY_ACCOUNT, BY_ADDRESS, BY_BOTH, WINDOW_SECONDS, Throttle


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def throttle(clock: Clock) -> Throttle:
    return Throttle(clock)


def fail(throttle: Throttle, times: int, account: str = "ada", address: str = "10.0.0.1") -> None:
    for _ in range(times):
        throttle.begin(account, address)


def test_after_five_failures_the_next_one_waits(throttle: Throttle, clock: Clock) -> None:
    fail(throttle, BY_BOTH)
    clock.now += 100
    with pytest.raises(TooManyAttemptsError) as refused:
        throttle.begin("ada", "10.0.0.1")
    assert refused.value.retry_after == WINDOW_SECONDS - 100
    clock.now += WINDOW_SECONDS - 100
    throttle.begin("ada", "10.0.0.1")


def test_who_knows_the_password_is_forgiven(throttle: Throttle) -> None:
    for _ in range(BY_BOTH):
        fail(throttle, BY_BOTH - 1)
        throttle.begin("ada", "10.0.0.1")
        throttle.succeeded("ada", "10.0.0.1")


def test_a_stranger_does_not_lock_out_the_owner(throttle: Throttle) -> None:
    fail(throttle, BY_BOTH, address="6.6.6.6")
    with pytest.raises(TooManyAttemptsError):
        throttle.begin("ada", "6.6.6.6")
    throttle.begin("ada", "10.0.0.1")


def test_one_address_cannot_try_many_accounts(throttle: Throttle) -> None:
    for number in range(BY_ADDRESS):
        throttle.begin(f"user {number}", "6.6.6.6")
    with pytest.raises(TooManyAttemptsError):
        throttle.begin("another", "6.6.6.6")


def test_many_addresses_cannot_try_one_account(throttle: Throttle) -> None:
    for number in range(BY_ACCOUNT):
        throttle.begin("ada", f"10.0.1.{number}")
    with pytest.raises(TooManyAttemptsError):
        throttle.begin("ada", "10.0.2.1")


def test_an_attempt_counts_before_it_is_known_to_fail(throttle: Throttle) -> None:
    """Else any number of guesses could be under way at once."""
    fail(throttle, BY_BOTH)  # all begun, none of them over
    with pytest.raises(TooManyAttemptsError):
        throttle.begin("ada", "10.0.0.1")


def test_a_refused_attempt_does_not_lengthen_the_wait(throttle: Throttle, clock: Clock) -> None:
    fail(throttle, BY_BOTH)
    clock.now += WINDOW_SECONDS - 1
    for _ in range(10):
        with pytest.raises(TooManyAttemptsError):
            throttle.begin("ada", "10.0.0.1")
    clock.now += 1
    throttle.begin("ada", "10.0.0.1")


def test_a_flood_of_names_does_not_grow_the_memory(throttle: Throttle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEYS_KEPT", 30)
    for number in range(200):
        throttle.begin(f"user {number}", f"address {number}")
    assert len(throttle._failures) <= 30
