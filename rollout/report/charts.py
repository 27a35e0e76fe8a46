"""Charts as SVG text: bars stacked over time, and lines with a threshold. Pure; every text is escaped.

Colours come from the page's style by class, so that light and dark are one drawing. A column's numbers are shown
where the pointer rests, and stand in the table below each chart for everybody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from markupsafe import Markup, escape

from rollout.report.scales import Scale, moment, rounded_up, short_number, short_time, ticks, times

WIDTH, HEIGHT = 360, 176
LEFT, RIGHT, TOP, BOTTOM = 40, 6, 14, 20
NARROWEST = 1.0
FEWEST = 4


@dataclass(frozen=True, slots=True)
class Axis:
    """The time that all charts share, and the transitions that fall into it, by number."""

    begins: datetime
    ends: datetime
    bucket: timedelta
    marks: Sequence[tuple[int, datetime]] = ()

    def x(self, at: datetime) -> float:
        return Scale(0, (self.ends - self.begins).total_seconds(), LEFT, WIDTH - RIGHT)(
            (at - self.begins).total_seconds()
        )


@dataclass(frozen=True, slots=True)
class Line:
    """One line in pieces that nothing joins; `name` is a class of the style."""

    name: str
    pieces: Sequence[Sequence[tuple[datetime, float]]]
    dots: bool = False


def stacked(axis: Axis, series: Mapping[str, Mapping[datetime, int]], title: str) -> Markup:
    """Bars: for each bucket the counts of `series`, in order from the bottom; a name is a class of the style."""
    totals: dict[datetime, int] = {}
    for counts in series.values():
        for at, count in counts.items():
            totals[at] = totals.get(at, 0) + count
    high = rounded_up(max([*totals.values(), FEWEST]))
    y = Scale(0, high, HEIGHT - BOTTOM, TOP)
    bars = [_bar(axis, at, [(name, counts.get(at, 0)) for name, counts in series.items()], y) for at in sorted(totals)]
    return _svg(title, [_grid(y, ticks(high), short_number), _time(axis), *bars])


def lined(
    axis: Axis,
    lines: Sequence[Line],
    title: str,
    *,
    low: float,
    high: float,
    at: Sequence[float],
    label: Callable[[float], str],
    threshold: float | None = None,
    notes: Mapping[datetime, str] | None = None,
) -> Markup:
    """Lines between `low` and `high`, with labels at `at` and a dashed threshold; `notes` for the pointer."""
    y = Scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_grid(y, at, label), _time(axis)]
    if threshold is not None and low <= threshold <= high:
        parts.append(_rule(y(threshold), "threshold"))
    parts += [_line(axis, line, y) for line in lines]
    parts += [_hover(axis, when, text) for when, text in (notes or {}).items()]
    return _svg(title, parts)


def _svg(title: str, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )


def _grid(y: Scale, at: Sequence[float], label: Callable[[float], str]) -> Markup:
    return Markup("").join(
        _rule(y(value), "grid")
        + Markup('<text x="{}" y="{}" class="y">{}</text>').format(LEFT - 5, y(value) + 3.5, label(value))
        for value in at
    )


def _time(axis: Axis) -> Markup:
    span = axis.ends - axis.begins
    labels = [
        Markup('<text x="{}" y="{}" class="x">{}</text>').format(axis.x(at), HEIGHT - 5, short_time(at, span))
        for at in times(axis.begins, axis.ends)
        if LEFT + 12 <= axis.x(at) <= WIDTH - RIGHT - 12
    ]
    return Markup("").join([*labels, *_marks(axis)])


def _marks(axis: Axis) -> list[Markup]:
    """A transition is a line; its number is left out where the one before stands too near."""
    drawn, last = [], 0.0
    for number, at in sorted(axis.marks):
        x = axis.x(at)
        drawn.append(
            Markup('<line x1="{0}" x2="{0}" y1="{1}" y2="{2}" class="mark"></line>').format(x, TOP, HEIGHT - BOTTOM)
        )
        if x - last >= 16:
            drawn.append(Markup('<text x="{}" y="{}" class="x">#{}</text>').format(x, TOP - 4, number))
            last = x
    return drawn


def _bar(axis: Axis, at: datetime, parts: Sequence[tuple[str, int]], y: Scale) -> Markup:
    left, width = _column(axis, at)
    drawn, height = [], 0
    for name, count in parts:
        if count:
            top, bottom = y(height + count), y(height)
            drawn.append(
                Markup('<rect x="{}" y="{}" width="{}" height="{}" class="{}"></rect>').format(
                    left, top, width, max(NARROWEST, round(bottom - top, 2)), f"c-{name}"
                )
            )
            height += count
    said = ", ".join(f"{name} {count}" for name, count in parts if count)
    return Markup("").join([*drawn, _hover(axis, at, said)])


def _hover(axis: Axis, at: datetime, text: str) -> Markup:
    left, width = _column(axis, at)
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" class="hover"><title>{}</title></rect>').format(
        left, TOP, width, HEIGHT - TOP - BOTTOM, f"{moment(at)}: {text}"
    )


def _column(axis: Axis, at: datetime) -> tuple[float, float]:
    """Left edge and width of a bucket; the first and the last one may be cut."""
    left, right = axis.x(at), axis.x(at + axis.bucket)
    gap = 1.0 if right - left > 4 else 0.0
    return left, max(NARROWEST, round(right - left - gap, 2))


def _line(axis: Axis, line: Line, y: Scale) -> Markup:
    drawn = [_piece(axis, line.name, piece, y) for piece in line.pieces if piece]
    if line.dots:
        drawn += [
            Markup('<circle cx="{}" cy="{}" r="2" class="dot l-{}"></circle>').format(
                axis.x(at + axis.bucket / 2), y(value), line.name
            )
            for piece in line.pieces
            for at, value in piece
        ]
    return Markup("").join(drawn)


def _piece(axis: Axis, name: str, piece: Sequence[tuple[datetime, float]], y: Scale) -> Markup:
    points = [(axis.x(at + axis.bucket / 2), y(value)) for at, value in piece]
    if len(points) == 1:
        # A line of one point would not be seen.
        x, height = points[0]
        points = [(x - 3, height), (x + 3, height)]
    return Markup('<polyline points="{}" class="l-{}"></polyline>').format(
        " ".join(f"{x},{height}" for x, height in points), name
    )


def _rule(y: float, name: str) -> Markup:
    return Markup('<line x1="{}" x2="{}" y1="{}" y2="{}" class="{}"></line>').format(LEFT, WIDTH - RIGHT, y, y, name)


def swatch(name: str) -> Markup:
    """The colour of a bar's part, for a legend; the text beside it names it."""
    return Markup('<svg class="swatch" viewBox="0 0 10 10" aria-hidden="true"><rect width="10" height="10" '
                  'class="c-{}"></rect></svg>').format(escape(name))  # fmt: skip
