"""Clocks and medians. Free of this project's packages: the peers' processes use it too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds."""

    p50: float
    p99: float
    count: int


def seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def each(act: Callable[..., object], arguments: Iterable[object]) -> list[float]:
    """Milliseconds of one call for each argument."""
    found = []
    for argument in arguments:
        begun = time.perf_counter()
        act(argument)
        found.append((time.perf_counter() - begun) * 1000)
    return found


def in_turn(rounds: int, acts: dict[str, Callable[[], list[float]]]) -> dict[str, list[float]]:
    """Every act once a round, the first one another each round: what slows the machine slows them all."""
    found: dict[str, list[float]] = {name: [] for name in acts}
    names = list(acts)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name] += acts[name]()
    return found


def spread(milliseconds: Sequence[float]) -> Spread:
    ordered = sorted(milliseconds)
    at = min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))
    return Spread(statistics.median(ordered), ordered[at], len(ordered))
