"""How a command speaks: the result on stdout (text, or JSON in a versioned envelope), progress on stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rollout.errors import RolloutError
from rollout.profiles import PRODUCTION, profile_in_force

ENVELOPE_VERSION = 1
UNEXPECTED = 1

WIDE = 240
"""Columns where nobody's terminal says how many there are: a row stays one line for grep and less."""


def _width(stream: TextIO) -> int | None:
    """None: as the terminal, or the variable COLUMNS, says."""
    return None if stream.isatty() or "COLUMNS" in os.environ else WIDE


stdout = Console(soft_wrap=True, highlight=False, width=_width(sys.stdout))
stderr = Console(stderr=True, soft_wrap=True, highlight=False)


@dataclass
class Answer:
    """What a command found: `data` for --json, `text` for people, and its exit code."""

    command: str
    data: Mapping[str, Any]
    text: Sequence[str | Table] = ()
    exit_code: int = 0
    profile: str | None = None
    """The profile of gates that this is an answer under; None for the one in force."""


def say(answer: Answer, as_json: bool) -> None:
    """Print the answer; leave with its exit code where that is not 0."""
    profile = answer.profile or profile_in_force().name
    if as_json:
        _envelope(answer.command, answer.exit_code, profile=profile, data=answer.data)
    else:
        if profile != PRODUCTION.name:
            stdout.print(f"profile: {profile}", style="bold")
        for part in answer.text:
            stdout.print(printable_lines(part), markup=False) if isinstance(part, str) else stdout.print(part)
    if answer.exit_code:
        raise typer.Exit(answer.exit_code)


@contextmanager
def failures(command: str, as_json: bool) -> Iterator[None]:
    """Turn what goes wrong into the error on stderr (with --json also on stdout) and its exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        message = "interrupted; what was finished stays, and the same command goes on from there"
        fail(command, UNEXPECTED, message, as_json)
        raise typer.Exit(UNEXPECTED) from None
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            traceback.print_exc(file=sys.stderr)
            code = UNEXPECTED
        fail(command, code, error, as_json)
        raise typer.Exit(code) from error


def exit_code_of(error: Exception) -> int | None:
    """The exit code of an error that this project raises on purpose; None for any other."""
    if isinstance(error, RolloutError):
        return error.exit_code
    # Loaded here: most commands end without an error, and `--help` should not load the stores.
    from src.database import DatabaseError
    from src.tools.rag_tools.embeddings import EmbeddingError
    from src.tools.rag_tools.store import StoreError

    return 5 if isinstance(error, DatabaseError | StoreError | EmbeddingError) else None


def fail(command: str, code: int, error: Exception | str, as_json: bool) -> None:
    """The chain of causes on stderr; with --json also the envelope on stdout."""
    if as_json:
        data = error.data if isinstance(error, RolloutError) else {}
        _envelope(command, code, data={**data, "error": str(error) or type(error).__name__})
    cause: BaseException | str | None = error
    prefix, said = "rollout: ", set[str]()
    while cause is not None:
        text = printable_lines(str(cause)) or type(cause).__name__
        if text not in said:
            stderr.print(f"{prefix}{text}", markup=False)
        said.add(text)
        cause, prefix = getattr(cause, "__cause__", None), "  because: "


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Nothing is cut off; the first column names the row for the next command and stays in one piece."""
    made = Table(title=_cell(title), title_justify="left", title_style="bold", pad_edge=False, box=None)
    for number, column in enumerate(columns):
        widest = max((_cell(row[number]).cell_len for row in rows), default=0) if number == 0 else None
        made.add_column(column, overflow="fold", min_width=widest)
    for row in rows:
        # Not as markup: a file name may hold a bracket.
        made.add_row(*(_cell(cell) for cell in row))
    return made


def printable(text: str) -> str:
    """Filenames are the users' own: what would steer the terminal is shown escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))


def progress(label: str) -> Callable[[int, int], None]:
    """A line on stderr that is rewritten on a terminal, and written at every tenth elsewhere."""
    last = -1
    terminal = stderr.is_terminal and not os.environ.get("NO_COLOR")

    def show(done: int, total: int) -> None:
        nonlocal last
        tenth = 10 * done // max(total, 1)
        if terminal:
            bar = "#" * (3 * tenth)
            stderr.file.write(f"\r{label} [{bar:<30}] {done}/{total}" + ("\n" if done >= total else ""))
            stderr.file.flush()
        elif tenth != last:
            stderr.print(f"{label} {done}/{total}")
        last = tenth

    return show


def _envelope(command: str, code: int, *, data: Mapping[str, Any], profile: str | None = None) -> None:
    envelope = {"version": ENVELOPE_VERSION, "command": command, "exit_code": code}
    if profile is not None:
        envelope["profile"] = profile
    # The envelope's own keys stand, whatever a command calls its own.
    # In ASCII, so that a file name that is no UTF-8 can be printed too.
    text = json.dumps({**envelope, **data, **envelope}, indent=2, default=_plain)
    sys.stdout.write(text + "\n")


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _cell(value: object) -> Text:
    match value:
        case None:
            return Text("")
        case float():
            return Text(f"{value:.6g}")
        case datetime():
            return Text(value.isoformat(" ", "seconds"))
        case _:
            return Text(printable(str(value)))
