"""When a store has failed several times in a row, it is not asked for a while. In memory, per process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FAILURES = 5
REST_SECONDS = 10.0


class Breaker:
    """Opens after `failures` in a row, for `rest` seconds; then one success closes it, one failure opens it again."""

    def __init__(
        self, *, failures: int = FAILURES, rest: float = REST_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.failures = failures
        self.rest = rest
        self.clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._until = 0.0

    @property
    def open(self) -> bool:
        """Whether the store should be left alone now."""
        return self.clock() < self._until

    def succeeded(self) -> None:
        with self._lock:
            self._in_a_row = 0

    def failed(self) -> None:
        with self._lock:
            self._in_a_row += 1
            if self._in_a_row >= self.failures:
                self._until = self.clock() + self.rest
                self._in_a_row = self.failures - 1
