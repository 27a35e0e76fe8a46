"""What an owner assignment does to whom: the report that on-call reads before it is done.

Built from the decisions and the rows alone, so a dry run and the real run tell the same. It looks
whether uploads are still on the disk and changes nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rollout.output import printable
from rollout.owner_rules import (
    Decision,
    DocumentRow,
    Earlier,
    Rows,
    RowState,
    Status,
    file_of,
    normal,
)

SHOWN = 20


@dataclass(frozen=True, slots=True)
class UserName:
    """How a person is told from another in a report."""

    email: str
    username: str


@dataclass(frozen=True, slots=True)
class Known:
    """What the databases say. `decided`: docstore ids that need no decision any more;
    `decided_before`: how many of them by status."""

    rows: Sequence[DocumentRow]
    users: Mapping[int, UserName]
    earlier: Earlier = field(default_factory=Earlier)
    decided: frozenset[str] = frozenset()
    decided_before: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UserLine:
    """`lost`: chunks in quarantine under a path or filename of theirs; one chunk may count for
    several users, for whose it is nobody knows. The names are None for a user who is gone."""

    user_id: int
    email: str | None
    username: str | None
    kept: int
    lost: int


@dataclass(frozen=True, slots=True)
class SourceLine:
    source: str
    runs: int
    chunks: int


@dataclass(frozen=True, slots=True)
class ReasonLine:
    """What nobody is served for one reason, largest source first."""

    reason: str
    runs: int
    chunks: int
    sources: tuple[SourceLine, ...]


@dataclass(frozen=True, slots=True)
class RowLine:
    document_id: int
    user_id: int
    path: str


@dataclass(frozen=True, slots=True)
class AssignmentReport:
    """The chunks decided by this run. `version` is None in a dry run, or where none were left.

    `documents_without_chunks`: rows that no run belongs to, in quarantine neither.
    `decided_before`: by status, the chunks that earlier runs or on-call decided.
    """

    executed: bool
    version: int | None
    assigned: int
    quarantined: int
    discarded: int
    decided_before: dict[str, int]
    users: tuple[UserLine, ...]
    unserved: tuple[ReasonLine, ...]
    documents_without_chunks: tuple[RowLine, ...]
    documents_without_file: tuple[RowLine, ...]

    @property
    def chunks(self) -> int:
        return self.assigned + self.quarantined + self.discarded

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "chunks": self.chunks}


def counts(decisions: Iterable[Decision]) -> dict[str, Any]:
    """Chunks by status and by reason: the short form that is kept with an assignment."""
    found = Counter((one.status, one.reason) for one in decisions)
    by_status = {status.value: 0 for status in Status}
    for (status, _), number in found.items():
        by_status[status.value] += number
    return {**by_status, "reasons": {reason.value: n for (_, reason), n in found.items()}}


def build(
    decisions: Sequence[Decision],
    known: Known,
    *,
    uploads: Path | None,
    version: int | None = None,
    executed: bool = False,
) -> AssignmentReport:
    """`uploads`: the folder of uploads; None: files are not looked for."""
    by_status = Counter(decision.status for decision in decisions)
    rows = Rows(known.rows)
    live = [row for row in known.rows if row.state is RowState.LIVE]
    owning = {one.document_id for one in decisions} | known.earlier.used
    contested = _contested(rows, decisions, known.earlier.waiting)
    return AssignmentReport(
        executed=executed,
        version=version,
        assigned=by_status[Status.ASSIGNED],
        quarantined=by_status[Status.QUARANTINED],
        discarded=by_status[Status.DISCARDED],
        decided_before=dict(known.decided_before),
        users=_user_lines(decisions, known, rows),
        unserved=_reason_lines(decisions),
        documents_without_chunks=_row_lines(
            row for row in live if row.id not in owning and file_of(row) not in contested
        ),
        documents_without_file=_row_lines(
            row for row in live if uploads is not None and upload_of(row, uploads) is None
        ),
    )


def upload_of(row: DocumentRow, uploads: Path) -> Path | None:
    """The row's file: in the folder of uploads, else where its path says; None where it is gone."""
    path = normal(row.path) or normal(row.filename)
    found = (place for place in (uploads / Path(path).name, Path(path)) if place.is_file())
    return next(found, None)


def render(report: AssignmentReport, *, shown: int = SHOWN) -> str:
    """Plain text, at most `shown` lines of each list."""
    return "\n".join(_lines(report, shown))


def _user_lines(decisions: Sequence[Decision], known: Known, rows: Rows) -> tuple[UserLine, ...]:
    kept = Counter(one.user_id for one in decisions if one.user_id is not None)
    quarantined = Counter(one.source for one in decisions if one.status is Status.QUARANTINED)
    lost: Counter[int] = Counter()
    for source, chunks in quarantined.items():
        for user_id in {row.user_id for row in rows.like(source)}:
            lost[user_id] += chunks
    everybody = kept.keys() | lost.keys() | {row.user_id for row in known.rows}
    return tuple(
        _user_line(user_id, known.users.get(user_id), kept[user_id], lost[user_id]) for user_id in sorted(everybody)
    )


def _user_line(user_id: int, name: UserName | None, kept: int, lost: int) -> UserLine:
    email, username = (name.email, name.username) if name is not None else (None, None)
    return UserLine(user_id, email, username, kept, lost)


def _reason_lines(decisions: Sequence[Decision]) -> tuple[ReasonLine, ...]:
    chunks: defaultdict[str, Counter[str]] = defaultdict(Counter)
    found: Counter[tuple[str, str]] = Counter()
    for one in decisions:
        if one.status is not Status.ASSIGNED:
            chunks[one.reason.value][one.source] += 1
            found[one.reason.value, one.source] += one.ordinal == 0
    return tuple(
        ReasonLine(
            reason,
            sum(found[reason, source] for source in sources),
            sources.total(),
            tuple(
                SourceLine(source, found[reason, source], number)
                for source, number in sorted(sources.items(), key=lambda item: (-item[1], item[0]))
            ),
        )
        for reason, sources in sorted(chunks.items())
    )


def _contested(rows: Rows, decisions: Sequence[Decision], waiting: Iterable[str]) -> set[str]:
    """The files of rows that a chunk in quarantine may yet belong to."""
    sources = {one.source for one in decisions if one.status is not Status.ASSIGNED}
    return {file_of(row) for source in sources.union(waiting) for row in rows.like(source)}


def _row_lines(rows: Iterable[DocumentRow]) -> tuple[RowLine, ...]:
    return tuple(RowLine(row.id, row.user_id, row.path) for row in rows)


def _lines(report: AssignmentReport, shown: int) -> Iterator[str]:
    yield (
        f"{report.chunks} chunks decided: {report.assigned} assigned,"
        f" {report.quarantined} quarantined, {report.discarded} discarded"
    )
    if report.decided_before:
        before = ", ".join(f"{n} {status}" for status, n in sorted(report.decided_before.items()))
        yield f"decided before, and left as they are: {before}"
    yield from _table(
        "users",
        ("user", "name", "email", "keeps", "loses"),
        [(u.user_id, u.username or "(gone)", u.email or "", u.kept, u.lost) for u in report.users],
        shown,
    )
    for line in report.unserved:
        yield from _table(
            f"served to nobody, {line.reason}: {line.chunks} chunks in {line.runs} runs",
            ("source", "runs", "chunks"),
            [(one.source or "(none)", one.runs, one.chunks) for one in line.sources],
            shown,
        )
    for title, rows in (
        ("documents without chunks", report.documents_without_chunks),
        ("documents whose file is gone", report.documents_without_file),
    ):
        cells = [(row.document_id, row.user_id, row.path) for row in rows]
        yield from _table(title, ("document", "user", "path"), cells, shown)
    yield _conclusion(report)


def _conclusion(report: AssignmentReport) -> str:
    if report.version is not None:
        return f"\nstored as owner assignment {report.version}"
    if not report.chunks:
        return "\nthere is no chunk left to decide: nothing changed"
    return "\ndry run: nothing changed; run it again with --execute to store these decisions"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], shown: int) -> Iterator[str]:
    """Nothing where there are no rows; numbers stand right."""
    if not rows:
        return
    yield f"\n{title} ({len(rows)})"
    cells = [[printable(str(cell)) for cell in row] for row in rows[:shown]]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    right = [isinstance(cell, int) for cell in rows[0]]
    for row in (list(columns), *cells):
        aligned = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        )
        yield "  " + "  ".join(aligned).rstrip()
    if len(rows) > shown:
        yield f"  ... and {len(rows) - shown} more; --json has all"
