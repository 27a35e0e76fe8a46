"""Processes that die, or are overtaken by another one, at a named point of the write path."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count

from src.tools.rag_tools import faults


class DiedError(BaseException):
    """The process was killed here. No exception that anybody catches."""


def die() -> None:
    raise DiedError


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The points passed inside the block, each as often as it was passed."""
    passed: list[str] = []

    @contextmanager
    def hook(name: str) -> Iterator[None]:
        passed.append(name)
        yield

    with _hooked(hook):
        yield passed


@contextmanager
def at(name: str, act: Callable[[], object], *, nth: int = 1, after: bool = False) -> Iterator[None]:
    """Inside the block, once: `act` just before the operation at the nth passing of that point, or just after it.

    A block that ends well without having come there fails.
    """
    passing, lock, acted = count(1), threading.Lock(), []

    @contextmanager
    def hook(passed: str) -> Iterator[None]:
        with lock:
            due = passed == name and next(passing) == nth
            acted.extend([passed] * due)
        if due and not after:
            act()
        yield
        if due and after:
            act()

    with _hooked(hook):
        yield
    assert acted, f"{name} was not passed {nth} times"


def places(passed: list[str]) -> list[tuple[str, int, bool]]:
    """Every place at which a process that passes these points may die: name, which passing, before or after."""
    return [
        (name, passed[: place + 1].count(name), after) for place, name in enumerate(passed) for after in (False, True)
    ]


@contextmanager
def _hooked(hook: Callable[[str], AbstractContextManager[object]]) -> Iterator[None]:
    before, faults.hook = faults.hook, hook
    try:
        yield
    finally:
        faults.hook = before
