"""Requests that stop before every operation on a store or a file, until the test says how each of them ends.

A request runs in a thread of its own, but only one thread ever runs: who lets a request go on waits until it has
stopped again. So a run is decided by the orders alone, and the same orders give the same run.
"""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import psycopg

from src.tools.rag_tools.store import InvalidVectorError

STUCK_SECONDS = 60.0
# In memory something follows these that others can tell from what comes before the next operation.
AFTER_READY, AFTER_DELETE = "what follows upload.ready", "what follows delete.intent"
ALSO_STOPS_AFTER = {"upload.ready": AFTER_READY, "delete.intent": AFTER_DELETE}
FILES = ("kept.", "upload.fsync", "upload.parse", "delete.file")


class Order(StrEnum):
    """How the operation before which a request stands is to end."""

    GO = "is done"
    FAIL = "fails"
    LANDED = "is done, but its caller is told that it failed"
    HANG = "is given up by its caller, and may be done at any later time"
    BROKEN = "fails in a way that trying again cannot mend"
    DIE = "is never begun: the process is killed"


class Killed(BaseException):
    """The process was killed; nothing may handle this."""


class StuckError(Exception):
    """A request waits for something that only another stopped request could give: the test is wrong."""


class Actor:
    """One request, settling run or abandoned write. `at` names the operation before which it stands."""

    def __init__(self, label: str, body: Callable[[], Any], *, process: Any) -> None:
        self.label = label
        self.process = process
        self.at = "beginning"
        self.done = False
        self.error: Exception | None = None
        self.waits_for: Actor | None = None
        self.landing: Callable[[], None] | None = None
        self._body = body
        self._order = Order.GO
        self._within = False
        self._thread: threading.Thread | None = None
        self._go, self._stopped = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._stopped.acquire()

    def __str__(self) -> str:
        return f"{self.label} ({'over' if self.done else f'before {self.at}'})"

    # -- called by the test

    def obey(self, order: Order) -> None:
        """One operation further, and the same for whoever waits for this one."""
        waited = self.waits_for
        if waited is None or order is Order.HANG:
            self._resume(order)
            return
        waited.obey(order)
        if waited.done:
            self._resume(Order.GO)

    def finish(self) -> None:
        while not self.done:
            self.obey(Order.GO)

    def reach(self, point: str) -> bool:
        """Go on until it stands before `point`; False where it came to its end first."""
        while not self.done and self.where != point:
            self.obey(Order.GO)
        return not self.done

    def kill(self) -> None:
        while not self.done:
            self._resume(Order.DIE)

    @property
    def where(self) -> str:
        """The operation that comes next, perhaps that of a write it waits for."""
        return self.at if self.waits_for is None else self.waits_for.where

    def _resume(self, order: Order) -> None:
        self._order = order
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self.label, daemon=True)
            self._thread.start()
        else:
            self._go.release()
        if not self._stopped.acquire(timeout=STUCK_SECONDS):
            raise StuckError(f"{self} did not stop")

    # -- in the thread of the request

    def _run(self) -> None:
        _here.actor = self
        try:
            if self._order is not Order.DIE:
                self._body()
        except Killed:
            pass
        except Exception as error:  # noqa: BLE001 - judged by the properties
            self.error = error
        finally:
            self.done = True
            self._stopped.release()

    def stop(self) -> Order:
        """Wait for the next order."""
        self._stopped.release()
        self._go.acquire()
        if self._order is Order.DIE:
            raise Killed
        return self._order

    @contextmanager
    def around(self, point: str) -> Iterator[None]:
        if self._within:
            yield
            return
        self._within = True
        try:
            self.at = point
            order = self.stop()
            if order in (Order.FAIL, Order.BROKEN, Order.HANG):
                raise self._failure(point, order)
            yield
            if order is Order.LANDED:
                raise self._failure(point, order)
            if point in ALSO_STOPS_AFTER:
                self.at = ALSO_STOPS_AFTER[point]
                self.stop()
        finally:
            self._within = False

    def _failure(self, point: str, order: Order) -> Exception:
        """As the driver or the system would say it."""
        if order is Order.HANG and self.landing is not None:
            self.landing()
        if order is Order.BROKEN:
            return InvalidVectorError("a vector that no store takes")
        if point.startswith(FILES):
            return OSError(errno.ENOSPC, "No space left on device")
        if point.startswith("journal."):
            return sqlite3.OperationalError("disk I/O error")
        return psycopg.OperationalError("the connection is lost")


_here = threading.local()


def current() -> Actor | None:
    """The request in whose thread this runs."""
    actor: Actor | None = getattr(_here, "actor", None)
    return actor


@contextmanager
def hook(point: str) -> Iterator[None]:
    """For `faults.hook`: what the test itself does stops nowhere."""
    actor = current()
    if actor is None:
        yield
        return
    with actor.around(point):
        yield


class Secondaries:
    """In place of a router's threads for secondary writes: each such write is an actor, and time runs out on order."""

    def __init__(self, begin: Callable[[Actor], None]) -> None:
        self._begin = begin

    def submit(self, write: Callable[[], None]) -> Outcome:
        waiting = current()
        actor = Actor("its write", write, process=None if waiting is None else waiting.process)
        if waiting is None:
            actor.finish()
        else:
            actor.label = f"a write of {waiting.label}"
            self._begin(actor)
        return Outcome(actor, waiting)

    def shutdown(self, wait: bool = True) -> None:
        pass


class Outcome:
    """The future of a secondary write."""

    def __init__(self, actor: Actor, waiting: Actor | None) -> None:
        self._actor, self._waiting = actor, waiting

    def result(self, timeout: float) -> None:
        waiting = self._waiting
        try:
            while waiting is not None and not self._actor.done:
                waiting.waits_for = self._actor
                if waiting.stop() is Order.HANG:
                    raise FutureTimeoutError
        finally:
            if waiting is not None:
                waiting.waits_for = None
        if self._actor.error is not None:
            raise self._actor.error

    def cancel(self) -> bool:
        return False
