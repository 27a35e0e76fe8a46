"""How often a log-in may fail before the next one has to wait.

Counted in the memory of each process, by account, by address, and by both. That is enough against
guessing: argon2 bounds the rate anyway, and N processes allow N times the limit, which is still a few
guesses a minute. It needs no table that a flood could fill, and a restart forgives, which harms
nobody. The limit for an account seen from everywhere is far above that of one address, so that a
stranger who fails on purpose does not soon lock its owner out.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from src.auth.errors import TooManyAttemptsError

WINDOW_SECONDS = 300.0
BY_BOTH = 5
BY_ADDRESS = 50
BY_ACCOUNT = 100
KEYS_KEPT = 20_000
"""The least recently used keys are dropped above this, so a flood of names cannot fill the memory."""

Key = tuple[str, ...]


class Throttle:
    """Failed log-ins of the last five minutes. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._failures: OrderedDict[Key, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, account: str, address: str) -> None:
        """Counts the log-in as failed until `succeeded` says otherwise, so that guesses made at the
        same time cannot all pass before the first of them fails.

        Raises TooManyAttemptsError where it may not even be tried.
        """
        limits = _limits(account, address)
        with self._lock:
            now = self.clock()
            longest = max(self._wait(key, limit, now) for key, limit in limits.items())
            if longest > 0:
                raise TooManyAttemptsError(longest)
            for key in limits:
                self._failures.setdefault(key, deque()).append(now)
                self._failures.move_to_end(key)
            while len(self._failures) > KEYS_KEPT:
                self._failures.popitem(last=False)

    def succeeded(self, account: str, address: str) -> None:
        """Takes back this attempt, and forgives earlier ones of this account at this address."""
        with self._lock:
            for key in _limits(account, address):
                if failures := self._failures.get(key):
                    failures.pop()
            self._failures.pop(("both", account, address), None)

    def _wait(self, key: Key, limit: int, now: float) -> float:
        """Seconds until the key is below its limit again; 0 or less where it is."""
        failures = self._failures.get(key)
        if failures is None:
            return 0.0
        while failures and failures[0] <= now - WINDOW_SECONDS:
            failures.popleft()
        if not failures:
            del self._failures[key]
        return failures[-limit] + WINDOW_SECONDS - now if len(failures) >= limit else 0.0


def _limits(account: str, address: str) -> dict[Key, int]:
    return {
        ("both", account, address): BY_BOTH,
        ("address", address): BY_ADDRESS,
        ("account", account): BY_ACCOUNT,
    }
