"""`rollout import-sql`: moves the relational tables of the old release from SQLite to PostgreSQL.

The maintenance window is this function: the SQLite file is locked and PostgreSQL's tables are
closed to writers while rows are copied, counted and compared by content. It ends with the mark in
the file (not visible yet), PostgreSQL's commit, the mark's commit. A process that dies before the
first commit leaves both as they were. One that dies between the two leaves the data moved and the
file unmarked; run again, it finds the same content in PostgreSQL and sets the mark.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from rollout.import_target import (
    ComparisonError,
    Connection,
    TargetError,
    advance_sequences,
    close_to_writers,
    connected,
    copy,
    difference,
    read_only,
    revision_problem,
    rows_problem,
    where,
)
from rollout.legacy_rows import TABLES, Reading, SetAside, TableReport
from rollout.legacy_sqlite import LOCK_WAIT_SECONDS, LegacySqlite, legacy_sqlite

Progress = Callable[[str], None]


class TargetNotEmptyError(TargetError):
    """PostgreSQL holds rows already, and they are not those of this file."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What was moved, or would be. `target` names server and database, never a password.

    `checksums_equal`: both databases were compared and hold the same; False in a dry run.
    `resumed`: the rows were there from a run that died before it could mark the file.
    `left_behind`: tables and columns of the file that the old release's schema does not have.
    `problems`: in a dry run, why it could not be executed now.
    """

    source: str
    target: str
    executed: bool
    resumed: bool
    checksums_equal: bool
    tables: tuple[TableReport, ...]
    left_behind: tuple[str, ...]
    problems: tuple[str, ...]
    seconds: float

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables)

    @property
    def set_aside(self) -> tuple[SetAside, ...]:
        return tuple(row for table in self.tables for row in table.set_aside)


def import_sql(
    source_url: str,
    target: Connection | str,
    *,
    execute: bool = False,
    progress: Progress = lambda _line: None,
    lock_wait: float = LOCK_WAIT_SECONDS,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    clock: Callable[[], float] = time.monotonic,
) -> ImportReport:
    """Moves the tables; without `execute` only says what would be moved and what is in the way.

    `target`: the owner's or the bulk role's connection, idle, or its conninfo. Waits `lock_wait`
    seconds for who else uses either database. Raises SourceError and TargetError where something
    has to be put right first, CopyError and ComparisonError where it failed; both databases are
    then as they were.
    """
    began = clock()
    reading = Reading()
    resumed, problems = False, list[str]()
    with legacy_sqlite(source_url, lock=execute, wait=lock_wait) as source:
        left_behind = source.check({table.name: table.names for table in TABLES})
        with connected(target) as connection:
            if execute:
                resumed = _move(source, connection, reading, progress, lock_wait, now())
            else:
                problems = _look(source, connection, reading, progress)
            name = where(connection)
    return ImportReport(
        source=str(source.path.absolute()),
        target=name,
        executed=execute,
        resumed=resumed,
        checksums_equal=execute,
        tables=tuple(reading.tables.values()),
        left_behind=tuple(left_behind),
        problems=tuple(problems),
        seconds=clock() - began,
    )


def _look(source: LegacySqlite, connection: Connection, reading: Reading, progress: Progress) -> list[str]:
    _read(source, reading, progress)
    with connection.transaction():
        read_only(connection)
        revision = revision_problem(connection)
        problems = [revision] if revision else [rows_problem(connection)]
    return [problem for problem in problems if problem]


def _move(
    source: LegacySqlite,
    connection: Connection,
    reading: Reading,
    progress: Progress,
    wait: float,
    at: datetime,
) -> bool:
    """Whether the rows were in PostgreSQL already, from a run that died before it could mark."""
    with connection.transaction():
        if problem := revision_problem(connection):
            raise TargetError(problem)
        close_to_writers(connection, wait)
        held = rows_problem(connection)
        if held:
            _read(source, reading, progress)
        else:
            _copy(source, connection, reading, progress)
        _compare(connection, reading, held, progress)
        advance_sequences(connection, reading.highest)
        source.mark_moved(at, where(connection))
    source.commit()
    return held is not None


def _read(source: LegacySqlite, reading: Reading, progress: Progress) -> None:
    for table in TABLES:
        for _row in reading.rows(source, table):
            pass
        progress(_line("read", reading.tables[table.name]))


def _copy(source: LegacySqlite, connection: Connection, reading: Reading, progress: Progress) -> None:
    for table in TABLES:
        copy(connection, table, reading.rows(source, table))
        progress(_line("copied", reading.tables[table.name]))


def _compare(connection: Connection, reading: Reading, held: str | None, progress: Progress) -> None:
    found = [difference(connection, table, reading.tables[table.name]) for table in TABLES]
    differences = [one for one in found if one]
    if differences and held:
        raise TargetNotEmptyError(held)
    if differences:
        raise ComparisonError(
            f"PostgreSQL did not keep what was copied: {'; '.join(differences)}; nothing was"
            " imported: look for triggers or rules on these tables, then try again"
        )
    progress(f"compared {len(TABLES)} tables: the same in both databases")


def _line(done: str, table: TableReport) -> str:
    aside = f", {len(table.set_aside)} set aside" if table.set_aside else ""
    return f"{done} {table.table}: {table.rows} rows{aside}"
