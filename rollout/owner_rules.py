"""To whom each chunk of the old index belongs: the rules, on plain data.

The old release wrote down no owner. What it left is the order of the chunks: one upload is a
maximal run of consecutive positions with one `source`. Runs are matched to rows of `documents` so
that a chunk may lose its owner but never gets a wrong one: whatever leaves a choice is quarantined.
Nothing is read or written here, so there is nothing that a dying process could leave behind.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from src.tools.rag_tools.store import normalise_text


class Status(StrEnum):
    """Only an assigned chunk is served, and only to its owner."""

    ASSIGNED = "assigned"
    QUARANTINED = "quarantined"
    DISCARDED = "discarded"


class Reason(StrEnum):
    """Why a chunk has its status: the first three assign, `deleted` discards, others quarantine."""

    PATH = "path"
    FILENAME = "filename"
    BY_HAND = "by_hand"
    SEVERAL_USERS = "several_users"
    MORE_RUNS_THAN_ROWS = "more_runs_than_rows"
    NO_ROW = "no_row"
    MISSING_USER = "missing_user"
    NO_SOURCE = "no_source"
    FILENAME_NOT_UNIQUE = "filename_not_unique"
    ROW_NOT_MOVED = "row_not_moved"
    DELETED = "deleted"


class RowState(StrEnum):
    """`left_behind`: only in the old release's SQLite file, PostgreSQL could not hold the row."""

    LIVE = "live"
    DELETED = "deleted"
    LEFT_BEHIND = "left_behind"


@dataclass(frozen=True, slots=True)
class Position:
    """A chunk's place in the index, counted from 0. `source` is empty where it names none."""

    position: int
    docstore_id: str
    source: str


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """A row of `documents` that may stand for an upload to the old release."""

    id: int
    user_id: int
    path: str
    filename: str
    state: RowState = RowState.LIVE


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for one chunk. `ordinal` counts within the document, or within the run that
    got none. Document and user are set where it is assigned, and only there."""

    docstore_id: str
    position: int
    source: str
    document_id: int | None
    user_id: int | None
    ordinal: int
    status: Status
    reason: Reason


@dataclass(frozen=True, slots=True)
class Earlier:
    """What earlier assignments left. `used`: ids of rows that own chunks. `waiting`: by source, how
    many runs are in quarantine; they still compete for the rows."""

    used: frozenset[int] = frozenset()
    waiting: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """One upload as the index shows it."""

    source: str
    positions: tuple[Position, ...]

    def decided(self, status: Status, reason: Reason, row: DocumentRow | None) -> list[Decision]:
        document_id, user_id = (row.id, row.user_id) if row is not None else (None, None)
        return [
            Decision(
                chunk.docstore_id, chunk.position, chunk.source,
                document_id, user_id, ordinal, status, reason,
            )
            for ordinal, chunk in enumerate(self.positions)
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """The file that a source names and how that was found; no file, and why none."""

    file: str | None
    reason: Reason


class Rows:
    """Rows of `documents` by the file that they name; each list in order of upload."""

    def __init__(self, rows: Iterable[DocumentRow]) -> None:
        self._by_file: dict[str, list[DocumentRow]] = {}
        self._by_name: dict[str, list[DocumentRow]] = {}
        for row in sorted(rows, key=lambda row: row.id):
            path, filename = normal(row.path), normal(row.filename)
            self._by_file.setdefault(path or filename, []).append(row)
            # The old release had one name for both; where they differ, either may be ambiguous.
            for name in {posixpath.basename(path), posixpath.basename(filename)} - {""}:
                self._by_name.setdefault(name, []).append(row)

    def of_file(self, file: str) -> Sequence[DocumentRow]:
        return self._by_file.get(file, ())

    def find(self, source: str) -> Found:
        """By path; else by a filename that stands for one file only."""
        file = normal(source)
        if not file:
            return Found(None, Reason.NO_SOURCE)
        if file in self._by_file:
            return Found(file, Reason.PATH)
        named = self._by_name.get(posixpath.basename(file), ())
        files = {file_of(row) for row in named}
        if len(files) == 1:
            return Found(files.pop(), Reason.FILENAME)
        if len({row.user_id for row in named}) > 1:
            return Found(None, Reason.SEVERAL_USERS)
        return Found(None, Reason.FILENAME_NOT_UNIQUE if named else Reason.NO_ROW)

    def like(self, source: str) -> list[DocumentRow]:
        """Every row with that path or that filename: whose a chunk in quarantine could be."""
        file = normal(source)
        alike = {row.id: row for row in self._by_name.get(posixpath.basename(file), ()) if file}
        alike |= {row.id: row for row in self.of_file(file) if file}
        return [alike[number] for number in sorted(alike)]


def decide(
    positions: Iterable[Position],
    rows: Iterable[DocumentRow],
    users: Collection[int],
    earlier: Earlier | None = None,
) -> list[Decision]:
    """A decision for each position, in order of position.

    `positions`: the chunks not decided yet. `users`: ids of those that exist. In which order any of
    them come does not matter.
    """
    earlier = earlier or Earlier()
    known = Rows(rows)
    decisions: list[Decision] = []
    contenders: dict[str, list[tuple[Run, Reason]]] = {}
    for run in runs(positions):
        found = known.find(run.source)
        if found.file is None:
            decisions += run.decided(Status.QUARANTINED, found.reason, None)
        else:
            contenders.setdefault(found.file, []).append((run, found.reason))
    waiting = _waiting(known, earlier.waiting)
    for file, claims in contenders.items():
        decisions += _decide_file(claims, known.of_file(file), users, earlier.used, waiting[file])
    return sorted(decisions, key=lambda decision: decision.position)


def runs(positions: Iterable[Position]) -> Iterator[Run]:
    """The maximal runs of consecutive positions with one source, in order."""
    current: list[Position] = []
    for chunk in sorted(positions, key=lambda chunk: chunk.position):
        if current and not _continues(current[-1], chunk):
            yield Run(current[0].source, tuple(current))
            current = []
        current.append(chunk)
    if current:
        yield Run(current[0].source, tuple(current))


def normal(path: str) -> str:
    """One spelling for one path: `./uploads/x`, `uploads\\x` and `uploads/x` are the same file."""
    if not path.strip():
        return ""
    return posixpath.normpath(normalise_text(path).replace("\\", "/"))


def file_of(row: DocumentRow) -> str:
    """What stands for the row's file: its path; the bare filename where it has none."""
    return normal(row.path) or normal(row.filename)


def _continues(before: Position, after: Position) -> bool:
    return after.position == before.position + 1 and after.source == before.source


def _waiting(rows: Rows, sources: Mapping[str, int]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for source, number in sources.items():
        file = rows.find(source).file
        if file is not None:
            counted[file] += number
    return counted


def _decide_file(
    claims: Sequence[tuple[Run, Reason]],
    rows: Sequence[DocumentRow],
    users: Collection[int],
    used: Collection[int],
    waiting: int,
) -> list[Decision]:
    """All runs of one file. Those in quarantine came first, so the first free rows are theirs."""
    free = [row for row in rows if row.id not in used][waiting:]
    why = _quarantined(rows, free, len(claims), users)
    if why is not None:
        return [one for run, _ in claims for one in run.decided(Status.QUARANTINED, why, None)]
    pairs = zip(claims, free[: len(claims)], strict=True)
    return [one for (run, how), row in pairs for one in _by_row(run, row, how)]


def _quarantined(
    rows: Sequence[DocumentRow], free: Sequence[DocumentRow], runs: int, users: Collection[int]
) -> Reason | None:
    owners = {row.user_id for row in rows}
    if len(owners) > 1:
        return Reason.SEVERAL_USERS
    if runs > len(free):
        return Reason.MORE_RUNS_THAN_ROWS
    if not all(owner in users for owner in owners):
        return Reason.MISSING_USER
    return None


def _by_row(run: Run, row: DocumentRow, how: Reason) -> list[Decision]:
    match row.state:
        case RowState.LIVE:
            return run.decided(Status.ASSIGNED, how, row)
        case RowState.DELETED:
            return run.decided(Status.DISCARDED, Reason.DELETED, None)
        case RowState.LEFT_BEHIND:
            return run.decided(Status.QUARANTINED, Reason.ROW_NOT_MOVED, None)
