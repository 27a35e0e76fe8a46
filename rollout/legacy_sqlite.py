"""The old release's SQLite file: opening it, checking what it is, reading it, marking it as moved.

Opened for the move, the file is locked until the end, so nobody writes what would be left behind;
opened for a look, it is read-only. The mark is part of the one transaction that holds the lock: if
the process dies before `commit`, the file is as it was.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from rollout.errors import PreconditionError, RolloutError, UsageError

LEGACY_HEAD = "4f95b897a5b8"
MARK = "victus_moved"
LOCK_WAIT_SECONDS = 5.0
_PRIMARY_CODE = 0xFF  # SQLite's extended codes hold the primary one in their lowest byte


class ImportSqlError(RolloutError):
    """The relational tables could not be moved; but for MarkError nothing has changed."""


class SourceUrlError(ImportSqlError, UsageError):
    """The source is not given as the URL of an SQLite file."""


class SourceError(ImportSqlError, PreconditionError):
    """The SQLite file cannot be used as it is."""


class SourceLockedError(SourceError):
    """Somebody else has the file in use: the maintenance window has not begun."""


class SourceSchemaError(SourceError):
    """The file's tables are not those of the old release's last revision."""


class MarkError(SourceError):
    """The data was moved, and only the mark in the file is missing."""


class AlreadyMovedError(SourceError):
    """The data was moved before, and lives elsewhere now."""


@dataclass(frozen=True, slots=True)
class LegacySqlite:
    """An open legacy database. Errors of SQLite come as SourceError while it is open."""

    path: Path
    connection: sqlite3.Connection

    def check(self, expected: Mapping[str, Sequence[str]]) -> list[str]:
        """What will be left behind: tables and columns beyond `expected` (columns by table).

        Raises AlreadyMovedError, SourceSchemaError, or SourceError for a damaged file.
        """
        self._refuse_moved()
        self._refuse_damaged()
        self._refuse_other_revision()
        found = self._columns()
        self._refuse_missing(found, expected)
        return _surplus(found, expected)

    def rows(self, table: str, columns: Sequence[str], order: str) -> Iterator[tuple[Any, ...]]:
        """The rows as SQLite holds them, in the order of an SQL expression, without loading all.

        Bytes that are not UTF-8 are escaped as lone surrogates.
        """
        names = ", ".join(f'"{column}"' for column in columns)
        yield from self.connection.execute(f'SELECT {names} FROM "{table}" ORDER BY {order}')

    def mark_moved(self, at: datetime, target: str) -> None:
        """Says in the file where its data went; visible after `commit`."""
        self.connection.execute(f"CREATE TABLE {MARK} (moved_at TEXT NOT NULL, target TEXT NOT NULL)")
        self.connection.execute(f"INSERT INTO {MARK} VALUES (?, ?)", (at.isoformat(), target))

    def commit(self) -> None:
        """Makes the mark last. Raises MarkError: the data is moved by then."""
        try:
            self.connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise MarkError(
                f"the data is in PostgreSQL, but {self.path} could not be marked as moved: {error};"
                " mend that and run the same command again, which then only sets the mark"
            ) from error

    def _refuse_moved(self) -> None:
        if MARK not in self._tables():
            return
        for moved_at, target in self.connection.execute(f"SELECT moved_at, target FROM {MARK}"):
            raise AlreadyMovedError(
                f"{self.path} was moved to {target} at {moved_at};"
                " point DATABASE_URL there, this file is only kept as it was"
            )

    def _refuse_damaged(self) -> None:
        # Rows are read through indexes; one that lost entries would hide rows without an error.
        complaints = [text for (text,) in self.connection.execute("PRAGMA integrity_check(5)")]
        if complaints != ["ok"]:
            raise SourceError(
                f"{self.path} is damaged: {'; '.join(complaints)};"
                " repair a copy with `sqlite3 FILE .recover`, or take the last good backup"
            )

    def _refuse_other_revision(self) -> None:
        if "alembic_version" not in self._tables():
            return
        stamps = [name for (name,) in self.connection.execute("SELECT * FROM alembic_version")]
        if stamps not in ([], [LEGACY_HEAD]):
            raise SourceSchemaError(
                f"{self.path} is at revision {', '.join(stamps)}, {LEGACY_HEAD} is needed;"
                f" bring a copy there (`alembic upgrade {LEGACY_HEAD}`, or `alembic downgrade"
                f" {LEGACY_HEAD}` if a newer release has been there), then import the copy"
            )

    def _refuse_missing(self, found: Mapping[str, set[str]], expected: Mapping[str, Sequence[str]]) -> None:
        missing = [table for table in expected if table not in found]
        missing += [
            f"{table}.{column}"
            for table, columns in expected.items()
            for column in columns
            if table in found and column not in found[table]
        ]
        if missing:
            raise SourceSchemaError(
                f"{self.path} lacks {', '.join(missing)}: these are not the tables of revision"
                f" {LEGACY_HEAD}; name the old release's file, or bring it to that revision"
            )

    def _tables(self) -> set[str]:
        rows = self.connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
        return {name for (name,) in rows if not name.startswith("sqlite_")}

    def _columns(self) -> dict[str, set[str]]:
        rows = self.connection.execute(
            "SELECT t.name, c.name FROM sqlite_schema t, pragma_table_info(t.name) c"
            " WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
        )
        found: dict[str, set[str]] = {}
        for table, column in rows:
            found.setdefault(table, set()).add(column)
        return found


@contextmanager
def legacy_sqlite(url: str, *, lock: bool, wait: float = LOCK_WAIT_SECONDS) -> Iterator[LegacySqlite]:
    """The file of a URL like `sqlite:///./victus.db`; with `lock`, for this process alone.

    What was not committed at the end is rolled back. Raises SourceUrlError and SourceError.
    """
    path = _path(url)
    with _translated(path):
        uri = f"{path.resolve().as_uri()}?mode={'rw' if lock else 'ro'}"
        connection = sqlite3.connect(uri, uri=True, timeout=wait, isolation_level=None)
        connection.text_factory = _decoded
        try:
            # Exclusive from the start: no reader can then make the last commit wait.
            connection.execute("BEGIN EXCLUSIVE" if lock else "BEGIN")
            yield LegacySqlite(path, connection)
        finally:
            connection.close()


def _path(url: str) -> Path:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise SourceUrlError(f"{url!r} is no database URL; write sqlite:///PATH") from error
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise SourceUrlError(f"{url!r} names no SQLite file; write sqlite:///PATH")
    path = Path(str(parsed.database))
    if not path.is_file():
        raise SourceError(
            f"{path.absolute()} does not exist or is no file;"
            " name the old release's database, by default sqlite:///./victus.db in its folder"
        )
    return path


def _surplus(found: Mapping[str, set[str]], expected: Mapping[str, Sequence[str]]) -> list[str]:
    tables = [f"table {name}" for name in found if name not in {*expected, "alembic_version", MARK}]
    columns = [
        f"column {table}.{column}" for table, columns in expected.items() for column in found[table].difference(columns)
    ]
    return sorted(tables) + sorted(columns)


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        match code if code is None else code & _PRIMARY_CODE:
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                raise SourceLockedError(
                    f"{path} is in use by another process; stop the old release and whatever else"
                    " opens the file, then try again"
                ) from error
            case sqlite3.SQLITE_NOTADB:
                raise SourceError(f"{path} is no SQLite database; name the old release's file") from error
            case _:
                raise SourceError(
                    f"{path} cannot be read or marked: {error}; check that this user may write the"
                    " file and its folder, and that the disk is neither full nor failing"
                ) from error
