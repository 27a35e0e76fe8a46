"""Axes: where a value falls on the page, and which values and times are worth a label. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

STEPS = (1, 2, 2.5, 5, 10)
ENDS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
FLOORS = ((0.98, 4), (0.95, 5), (0.9, 4), (0.8, 4), (0.5, 5), (0.0, 4))
"""Where an axis of shares may begin, and how many parts it then has; the highest one below every value is taken."""
TIMES = tuple(timedelta(seconds=seconds) for seconds in (120, 900, 3_600, 14_400, 86_400, 172_800, 432_000))
MOST_TIMES = 6


@dataclass(frozen=True, slots=True)
class Scale:
    """A straight line from values to pixels; values outside fall on the edge."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.begin + (self.end - self.begin) * min(1.0, max(0.0, share)), 2)


def rounded_up(value: float, choices: tuple[float, ...] = ENDS) -> float:
    """The next round number from a positive one."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(choice * power for choice in choices if choice * power >= value * (1 - 1e-9))


def ticks(high: float, count: int = 4) -> list[float]:
    """Round values from 0 to `high`, about `count` of them."""
    step = rounded_up(high / count, STEPS)
    return [step * number for number in range(int(high / step + 1e-9) + 1)]


def shares(smallest: float) -> list[float]:
    """The labels of an axis of shares that holds everything from `smallest` to 1."""
    low, parts = next((floor, parts) for floor, parts in FLOORS if floor <= smallest)
    return [low + (1 - low) * part / parts for part in range(parts + 1)]


def times(begins: datetime, ends: datetime) -> list[datetime]:
    """Round moments, in UTC, few enough for their labels to stand side by side."""
    step = next((step for step in TIMES if (ends - begins) / step <= MOST_TIMES), TIMES[-1])
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    first = epoch + step * math.ceil((begins - epoch) / step)
    return [first + step * number for number in range(int((ends - first) / step) + 1)] if first <= ends else []


def short_time(at: datetime, span: timedelta) -> str:
    """A moment for an axis: the day where the axis is longer than one."""
    return at.astimezone(UTC).strftime("%d %b" if span > timedelta(days=1) else "%H:%M")


def moment(at: datetime) -> str:
    """A moment to the second, in UTC, whatever zone the database speaks in."""
    return f"{at.astimezone(UTC):%d %b %H:%M:%S}"


def short_number(value: float) -> str:
    """A value for an axis or a tile: thousands as k, millions as M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
