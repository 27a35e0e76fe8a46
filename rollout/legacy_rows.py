"""The twelve tables that are moved, and which of their rows PostgreSQL can hold.

As the old release ran it, SQLite enforced no foreign keys. A row that would break one, or that has
a value which its column cannot hold, is set aside with the reason: it stays in the SQLite file.
Nothing here writes; a row is judged alike however often it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

from sqlalchemy import Column, ColumnDefault, Table

from rollout.legacy_sqlite import LegacySqlite
from rollout.legacy_values import (
    MAX_INTEGER,
    Checksum,
    Converter,
    UnreadableError,
    converter,
    integer,
    text,
    uuid_,
)
from src import models

NEW_COLUMNS = {"documents": {"status", "error", "updated_at", "deleted_at"}}
"""Columns that the old release did not have; PostgreSQL's defaults fill them."""

Row = tuple[Any, ...]
Keys = Mapping[str, set[Any]]
"""The primary keys accepted so far, by table."""


@dataclass(frozen=True, slots=True)
class MovedColumn:
    """`refers_to`: the table of its foreign key. `default`: for null where null is not allowed."""

    name: str
    convert: Converter
    nullable: bool
    default: Any
    refers_to: str | None


@dataclass(frozen=True, slots=True)
class MovedTable:
    """A table that is moved. Its primary key, `id`, is the first column."""

    name: str
    columns: tuple[MovedColumn, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def has_sequence(self) -> bool:
        return self.columns[0].convert is integer

    @property
    def sqlite_order(self) -> str:
        """SQL that orders by id as `postgres_order` does; SQLite holds a UUID as text."""
        return "lower(replace(id, '-', ''))" if self.columns[0].convert is uuid_ else "id"

    @property
    def postgres_order(self) -> str:
        return 'id COLLATE "C"' if self.columns[0].convert is text else "id"


@dataclass(frozen=True, slots=True)
class Accepted:
    """A row to move. `repaired`: texts changed on the way; `defaulted`: nulls that were filled."""

    row: Row
    repaired: int
    defaulted: int


@dataclass(frozen=True, slots=True)
class SetAside:
    """A row that PostgreSQL cannot hold, and why."""

    table: str
    id: str
    reason: str


def judge(table: MovedTable, raw: Row, accepted: Keys) -> Accepted | SetAside:
    """`raw`, as SQLite held it, with the types of `table`; or why it has to stay behind."""
    values = []
    repaired = defaulted = 0
    for column, held in zip(table.columns, raw, strict=True):
        value = column.default if held is None and not column.nullable else held
        try:
            converted = _converted(column, value, accepted)
        except UnreadableError as error:
            return SetAside(table.name, str(raw[0]), f"{column.name} {error}")
        values.append(converted)
        defaulted += held is None and converted is not None
        repaired += isinstance(held, str) and column.convert is text and held != converted
    return Accepted(tuple(values), repaired, defaulted)


def user_named(table: MovedTable, raw: Row) -> int | None:
    """The user id that a row names, whether or not the row is moved and the user exists."""
    name = "id" if table.name == "users" else "user_id"
    for column, held in zip(table.columns, raw, strict=True):
        if column.name == name:
            with suppress(UnreadableError):
                return integer(held)
    return None


def _converted(column: MovedColumn, value: Any, accepted: Keys) -> Any:
    if value is None:
        if column.nullable:
            return None
        raise UnreadableError("is empty, and needed")
    converted = column.convert(value)
    if column.refers_to is not None and converted not in accepted[column.refers_to]:
        raise UnreadableError(f"{converted} is not among the {column.refers_to} that are moved")
    return converted


def _moved_column(column: Column[Any]) -> MovedColumn:
    given = column.default
    refers_to = [key.column.table.name for key in column.foreign_keys]
    return MovedColumn(
        name=column.name,
        convert=converter(column),
        nullable=bool(column.nullable),
        default=given.arg if isinstance(given, ColumnDefault) and given.is_scalar else None,
        refers_to=refers_to[0] if refers_to else None,
    )


def _moved_table(table: Table) -> MovedTable:
    new = NEW_COLUMNS.get(table.name, set())
    columns = tuple(_moved_column(column) for column in table.columns if column.name not in new)
    return MovedTable(table.name, columns)


# In an order in which no row comes before one that it refers to.
TABLES = tuple(
    _moved_table(cast(Table, model.__table__))
    for model in (
        models.User,
        models.Conversation,
        models.Message,
        models.ConversationMemory,
        models.UserFact,
        models.Document,
        models.Trace,
        models.TraceStep,
        models.PendingAction,
        models.OAuthAccount,
        models.Passkey,
        models.PasswordResetToken,
    )
)
PARENTS = {column.refers_to for table in TABLES for column in table.columns if column.refers_to is not None}


@dataclass(frozen=True, slots=True)
class TableReport:
    """One table. `rows`: moved, or to be moved. `sha256`: over these rows, in the order of id.

    `repaired`: texts in which NUL or broken UTF-8 was replaced. `defaulted`: nulls filled with the
    column's default.
    """

    table: str
    rows: int
    sha256: str
    repaired: int
    defaulted: int
    set_aside: tuple[SetAside, ...]


@dataclass(slots=True)
class Reading:
    """What has been read of the source so far. `highest`: the largest id ever seen, by table."""

    tables: dict[str, TableReport] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)
    _accepted: dict[str, set[Any]] = field(default_factory=lambda: {name: set() for name in PARENTS})

    def rows(self, source: LegacySqlite, table: MovedTable) -> Iterator[Row]:
        """The rows to move; once they are exhausted, the table's report is in `tables`."""
        checksum, aside = Checksum(), list[SetAside]()
        repaired = defaulted = 0
        for raw in source.rows(table.name, table.names, table.sqlite_order):
            self._note_ids(table, raw)
            match judge(table, raw, self._accepted):
                case SetAside() as left:
                    aside.append(left)
                case Accepted() as taken:
                    if table.name in PARENTS:
                        self._accepted[table.name].add(taken.row[0])
                    checksum.add(taken.row)
                    repaired += taken.repaired
                    defaulted += taken.defaulted
                    yield taken.row
        self.tables[table.name] = TableReport(
            table.name, checksum.rows, checksum.sha256, repaired, defaulted, tuple(aside)
        )

    def _note_ids(self, table: MovedTable, raw: Row) -> None:
        """Of rows set aside too: nobody may be given an id that a row or a chunk still names."""
        if table.has_sequence and isinstance(raw[0], int):
            self._raise_highest(table.name, raw[0])
        user = user_named(table, raw)
        if user is not None:
            self._raise_highest("users", user)

    def _raise_highest(self, table: str, seen: int) -> None:
        if seen < MAX_INTEGER:
            self.highest[table] = max(seen, self.highest.get(table, 0))
