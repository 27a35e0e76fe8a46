"""RUNBOOK.md as data: its sections, each with commands and what the page says that they print.

A block of commands (```sh) is followed by a block of output (```text). `...` on a line of its own stands for any lines,
`[exit code N]` at the end for how it ended. Numbers, ids, times and the width of a column are aside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FENCE = re.compile(r"^ *```(\w*) *$")
ANYTHING = "..."
# What differs from one installation, machine or moment to the next.
ASIDE = (
    (re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b[0-9a-f]{12,64}\b"), "#"),
    (re.compile(r"\d+ days?, "), ""),
    (re.compile(r"\d+(?:[.,:]\d+)*"), "#"),
    (re.compile(r"\s+"), " "),
)


@dataclass(frozen=True, slots=True)
class Block:
    """The commands of one block, and the lines that the page says they print."""

    line: int
    commands: tuple[str, ...]
    printed: tuple[str, ...]


@dataclass(slots=True)
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


def sections(page: Path) -> list[Section]:
    """Each heading of the second level. ValueError where commands and what they print are not in pairs."""
    found: list[Section] = []
    asked: tuple[int, tuple[str, ...]] | None = None
    for number, kind, lines in _pieces(page.read_text(encoding="utf-8").splitlines()):
        if kind == "prose":
            continue
        if (kind == "text") != (asked is not None):
            raise ValueError(f"{page.name}:{number}: a block of commands and what it prints belong together")
        if kind == "heading":
            found.append(Section(*lines))
        elif kind == "text" and asked is not None:
            found[-1].blocks.append(Block(*asked, lines))
        asked = (number, lines) if kind == "sh" else None
    return found


def _pieces(lines: list[str]) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    block: list[str] = []
    kind, begun = "", 0
    for number, line in enumerate(lines, 1):
        fence = FENCE.match(line)
        if fence and not kind:
            kind, begun, block = fence[1], number, []
        elif fence:
            yield begun, kind, tuple(block)
            kind = ""
        elif kind:
            block.append(line.strip())
        elif line.startswith("## "):
            yield number, "heading", (line.removeprefix("## "),)
        else:
            yield number, "prose", (line,)


def plain(line: str) -> str:
    for pattern, instead in ASIDE:
        line = pattern.sub(instead, line)
    return line.strip()


def is_as_printed(said: tuple[str, ...], printed: list[str]) -> str:
    """Empty where `printed` is what the page says; else the first lines of the page that are not there."""
    wanted = [plain(line) for line in said if line.strip()]
    lines = [plain(line) for line in printed if line.strip()]
    at, after_anything = 0, False
    for part in _parts(wanted):
        if part == [ANYTHING]:
            after_anything = True
            continue
        places = range(at, len(lines) - len(part) + 1) if after_anything else range(at, at + 1)
        start = next((place for place in places if lines[place : place + len(part)] == part), None)
        if start is None:
            return "\n".join(part)
        at, after_anything = start + len(part), False
    return "" if after_anything or at == len(lines) else f"the page says nothing of: {lines[at]}"


def _parts(lines: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for line in lines:
        if line == ANYTHING:
            if part:
                yield part
            yield [ANYTHING]
            part = []
        else:
            part.append(line)
    if part:
        yield part
