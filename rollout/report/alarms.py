"""What a person must see first, by the page's data; pure. The gravest comes first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rollout.profiles import PRODUCTION
from rollout.report.data import Report
from rollout.report.scales import moment
from src.tools.rag_tools.migration.causes import Cause
from src.tools.rag_tools.migration.guard import ACTOR

SHOWN = 4


class Level(StrEnum):
    BAD = "bad"
    WARN = "warn"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Alarm:
    """`text` is what is the case, `then` what to do; a command stands in backticks."""

    level: Level
    text: str
    then: str = ""


def alarms(report: Report) -> list[Alarm]:
    """Those in force, the gravest first."""
    order = list(Level)
    return sorted(
        [*_leak(report), *_guard(report), *_fleet(report), *_owed(report), *_hold(report), *_profile(report)],
        key=lambda each: order.index(each.level),
    )


def _leak(report: Report) -> Iterator[Alarm]:
    count = sum(tally.count for tally in report.series.tallies if tally.cause == Cause.OWNER_MISMATCH)
    if count:
        yield Alarm(
            Level.BAD,
            f"{_counted(count, 'comparison', 'comparisons')} found a chunk that belongs to another user",
            "`rollout rollback --execute`, then RUNBOOK.md, 'a user sees another's document'",
        )


def _guard(report: Report) -> Iterator[Alarm]:
    last = report.transitions[0] if report.transitions else None
    if last is not None and last.actor == ACTOR:
        yield Alarm(
            Level.BAD,
            f"the guard took the rollout back at {moment(last.at)}: {last.reason}",
            "RUNBOOK.md, 'the guard took us back'",
        )


def _fleet(report: Report) -> Iterator[Alarm]:
    live = [each for each in report.status["fleet"] if each["state"] != "dead"]
    if halted := [each for each in live if each["halted"]]:
        yield Alarm(Level.BAD, f"{_named(halted)} stopped writing: {halted[0]['halted']}")
    if late := [each for each in live if each["state"] == "late"]:
        yield Alarm(
            Level.WARN,
            f"{_named(late)} did not arrive at transition {report.status['transition']} yet",
            "if it lasts: RUNBOOK.md, 'a worker is stuck on the old stage'",
        )
    if not live:
        yield Alarm(Level.NOTE, "no backend process is running that takes part in the rollout")


def _named(processes: Sequence[Mapping[str, Any]]) -> str:
    names = [f"{each['host']}:{each['pid']}" for each in processes[:SHOWN]]
    more = f" and {len(processes) - SHOWN} more" if len(processes) > SHOWN else ""
    return f"{_counted(len(processes), 'process', 'processes')} ({', '.join(names)}{more})"


def _owed(report: Report) -> Iterator[Alarm]:
    aside = sum(row["entries"] for row in report.status["owed"] if row["state"] == "aside")
    if aside:
        yield Alarm(
            Level.WARN,
            f"{_counted(aside, 'ledger entry', 'ledger entries')} set aside: nothing mends that by itself, and no step"
            " goes past it",
            "mend what 'Owed' says, then `rollout settle --execute --retry-aside`",
        )


def _hold(report: Report) -> Iterator[Alarm]:
    if report.hold is not None:
        yield Alarm(
            Level.WARN,
            f"{report.hold.actor} holds the rollout since {moment(report.hold.since)}: {report.hold.reason}",
            "nobody advances and the guard does not act until `rollout resume --execute`",
        )


def _profile(report: Report) -> Iterator[Alarm]:
    if report.profile != PRODUCTION.name:
        yield Alarm(
            Level.NOTE, f"the profile {report.profile!r} is in force: its thresholds are not those of production"
        )


def _counted(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"
