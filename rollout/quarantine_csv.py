"""Decisions about the quarantine as a CSV file: written from the listing, filled in, read back whole.

A file with a bad line is refused with every bad line named, before anything is asked of a database.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TextIO

from rollout.errors import UsageError

NEEDED = ("group", "action", "document_id")
INFORMATION = ("source", "chunks", "why", "candidates")


class CsvError(UsageError):
    """The file cannot be read as decisions; none was carried out."""


class Action(StrEnum):
    ASSIGN = "assign"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True)
class Choice:
    """What on-call decided about one group. `where`: the line of the file that says so."""

    group: str
    action: Action
    document_id: int | None = None
    where: str = ""


def from_csv(path: Path) -> list[Choice]:
    """The decisions of a file with the columns group, action (assign, discard or nothing yet) and
    document_id; others are not looked at. Raises CsvError naming each bad line."""
    choices: list[Choice] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for line, row in _rows(path):
        group = row["group"]
        problem, choice = _choice(line, row)
        if group in seen:
            problem = f"group {group!r} is in line {seen[group]} already"
        seen.setdefault(group, line)
        if problem:
            problems.append(f"line {line}: {problem}")
        elif choice is not None:
            choices.append(choice)
    if problems:
        raise CsvError("\n  ".join([f"{path}: nothing was done, correct these first", *problems]))
    return choices


def to_csv(rows: Iterable[Mapping[str, object]], file: TextIO) -> None:
    """A file to fill in: one line a group, action and document_id empty.

    `rows` hold `group` and, for the reader, source, chunks, why and candidates.
    """
    writer = csv.DictWriter(file, [*NEEDED, *INFORMATION], restval="")
    writer.writeheader()
    writer.writerows(rows)


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """With their line numbers; every needed column is there as text without spaces around it."""
    try:
        # With the mark at its beginning that spreadsheets write.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
            if missing:
                raise CsvError(
                    f"{path} has no column {', '.join(missing)}; its first line must name"
                    f" {', '.join(NEEDED)}, as `rollout quarantine list` writes it"
                )
            return [(reader.line_num, {name: (row[name] or "").strip() for name in NEEDED}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CsvError(f"{path} cannot be read as CSV in UTF-8: {error}") from error


def _choice(line: int, row: Mapping[str, str]) -> tuple[str, Choice | None]:
    """(what is wrong, or nothing; the decision, or None where there is none yet)."""
    group, action, document_id = (row[name] for name in NEEDED)
    if not group:
        return "names no group", None
    where = f"line {line}: "
    match action.lower(), document_id:
        case "", "":
            return "", None
        case "assign", number if number.isascii() and number.isdigit():
            return "", Choice(group, Action.ASSIGN, int(number), where)
        case "assign", other:
            return f"assign needs the number of a document, not {other!r}", None
        case "discard", "":
            return "", Choice(group, Action.DISCARD, None, where)
        case (("" | "discard"), other):
            return f"document {other!r} is named, so the action must be assign", None
        case other, _:
            return f"action {other!r} is neither assign nor discard", None
