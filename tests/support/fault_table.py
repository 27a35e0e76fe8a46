"""The table of what was tried to lose a write, printed at the end of a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PROPERTY = "fault"


@dataclass
class Row:
    """One kind of attack. `kept`: in how many of its tests every promise was kept."""

    places: Counter[str] = field(default_factory=Counter)
    within: int = 0
    tests: int = 0
    kept: int = 0


def collected(reports: Any) -> dict[str, Row]:
    """By attack, from the reports of the tests, whichever process ran them."""
    rows: dict[str, Row] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == PROPERTY and report.when == "call":
                attack, places, within = json.loads(value)
                row = rows.setdefault(attack, Row())
                row.places.update(places)
                row.within += within
                row.tests += 1
                row.kept += report.outcome == "passed"
    return rows


def table(rows: dict[str, Row]) -> Iterator[str]:
    """As Markdown."""
    yield "| fault | times | places | fewest at a place | before the answer | promises kept |"
    yield "|---|---|---|---|---|---|"
    for attack, row in rows.items():
        at_points = {place: count for place, count in row.places.items() if place != "any time"}
        kept = "all" if row.kept == row.tests else f"in {row.kept} of {row.tests} tests"
        fewest = min(at_points.values(), default=0)
        yield f"| {attack} | {row.places.total()} | {len(at_points)} | {fewest} | {row.within} | {kept} |"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, ())]
    if rows := collected(reports):
        terminalreporter.section("what was tried to lose a write")
        for line in table(rows):
            terminalreporter.write_line(line)
