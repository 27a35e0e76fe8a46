"""PostgreSQL's side of `rollout import-sql`: is it ready, copy, compare, advance the sequences.

All of it runs in one transaction of the caller. Only the sequences are outside of any transaction:
one that was advanced and then not needed leaves a gap in the ids, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg import errors, sql
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from rollout.errors import PreconditionError, UsageError
from rollout.legacy_rows import TABLES, MovedTable, Row, TableReport
from rollout.legacy_sqlite import ImportSqlError
from rollout.legacy_values import Checksum

ALEMBIC_INI = Path(__file__).resolve().parents[1] / "alembic.ini"
FETCHED_ROWS = 2000

Connection = psycopg.Connection[Any]


class TargetError(ImportSqlError, PreconditionError):
    """PostgreSQL is not ready to take the tables."""


class CopyError(ImportSqlError):
    """PostgreSQL refused a row or a statement."""


class ComparisonError(ImportSqlError):
    """What PostgreSQL holds after the copy is not what was read."""


class ConnectionBusyError(ImportSqlError, UsageError):
    """The caller's connection cannot be used."""


@contextmanager
def connected(target: Connection | str) -> Iterator[Connection]:
    """The connection given, or one of our own; the driver's errors come as ImportSqlError."""
    with _translated():
        if isinstance(target, str):
            with psycopg.connect(target) as connection:
                yield connection
        elif target.info.transaction_status is TransactionStatus.IDLE:
            yield target
        else:
            raise ConnectionBusyError(
                "the connection is inside a transaction; commit it first: the import needs its own"
            )


def where(connection: Connection) -> str:
    """Server, database and role, without the password."""
    info = connection.info
    return make_conninfo(host=info.host, port=info.port, dbname=info.dbname, user=info.user)


def read_only(connection: Connection) -> None:
    """Until the end of the transaction."""
    _run(connection, "SET TRANSACTION READ ONLY")


def close_to_writers(connection: Connection, wait: float) -> None:
    """Until the end of the transaction; who only reads is not held up."""
    _run(connection, "SELECT set_config('lock_timeout', %s, true)", [f"{int(wait * 1000)}ms"])
    names = sql.SQL(", ").join(sql.Identifier(table.name) for table in TABLES)
    _run(connection, sql.SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(names))


def revision_problem(connection: Connection) -> str | None:
    """Why the schema is not the newest, or None."""
    head = _newest_revision()
    stamped = _run(connection, "SELECT to_regclass('alembic_version') IS NOT NULL")
    found = _run(connection, "SELECT version_num FROM alembic_version") if stamped[0][0] else []
    if [row[0] for row in found] == [head]:
        return None
    at = ", ".join(row[0] for row in found) or "no revision"
    return f"{where(connection)} is at {at}, {head} is needed; run `alembic upgrade head` on it"


def rows_problem(connection: Connection) -> str | None:
    """Which tables hold rows already, and how many, or None."""
    counts = {
        table.name: _run(connection, sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table.name)))[0][0]
        for table in TABLES
    }
    held = ", ".join(f"{name} ({count})" for name, count in counts.items() if count)
    if not held:
        return None
    return (
        f"{where(connection)} holds rows already: {held}; import into a database"
        " whose tables are empty, or empty these if their rows are not needed"
    )


def copy(connection: Connection, table: MovedTable, rows: Iterable[Row]) -> None:
    """Writes the rows. Raises CopyError with the server's reason."""
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(table.name), sql.SQL(", ").join(map(sql.Identifier, table.names))
    )
    try:
        with connection.cursor() as cursor, cursor.copy(statement) as copying:
            for row in rows:
                copying.write_row(row)
    except (errors.IntegrityError, errors.DataError, errors.RaiseException) as error:
        raise CopyError(
            f"PostgreSQL refused rows of {table.name}: {_reason(error)};"
            " nothing was imported: mend those rows in the SQLite file, then try again"
        ) from error


def difference(connection: Connection, table: MovedTable, read: TableReport) -> str | None:
    """What is not the same in PostgreSQL as it was read from SQLite, or None."""
    held = Checksum()
    query = sql.SQL("SELECT {} FROM {} ORDER BY {}").format(
        sql.SQL(", ").join(map(sql.Identifier, table.names)),
        sql.Identifier(table.name),
        sql.SQL(table.postgres_order),
    )
    with connection.cursor("import_sql", row_factory=tuple_row) as cursor:
        cursor.itersize = FETCHED_ROWS
        for row in cursor.execute(query):
            held.add(row)
    if (held.rows, held.sha256) == (read.rows, read.sha256):
        return None
    return (
        f"{table.name}: {held.rows} rows with checksum {held.sha256[:12]} in PostgreSQL,"
        f" {read.rows} with {read.sha256[:12]} in SQLite"
    )


def advance_sequences(connection: Connection, highest: Mapping[str, int]) -> None:
    """So that the next ids are beyond `highest`; a sequence that is further along stays."""
    for table in TABLES:
        if table.has_sequence and highest.get(table.name, 0) > 0:
            _run(
                connection,
                "SELECT setval(name, greatest(%s, pg_sequence_last_value(name)))"
                " FROM (SELECT pg_get_serial_sequence(%s, 'id')::regclass AS name) AS sequence",
                [highest[table.name], table.name],
            )


def _newest_revision() -> str | None:
    if not ALEMBIC_INI.is_file():
        raise TargetError(
            f"{ALEMBIC_INI} does not exist; run the command from a checkout of the project,"
            " which has the revisions that PostgreSQL is compared with"
        )
    return ScriptDirectory.from_config(Config(str(ALEMBIC_INI))).get_current_head()


def _run(connection: Connection, statement: Any, values: list[Any] | None = None) -> list[tuple[Any, ...]]:
    with connection.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(statement, values)
        return cursor.fetchall() if cursor.description else []


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except errors.LockNotAvailable as error:
        raise TargetError(
            "the tables in PostgreSQL are in use; stop the backend that writes to them, then try again"
        ) from error
    except errors.InsufficientPrivilege as error:
        raise TargetError(f"the role may not do it: {_reason(error)}; connect as the owner of the tables") from error
    except psycopg.OperationalError as error:
        raise TargetError(
            f"PostgreSQL is away: {_reason(error)}; try again: if the import had been finished"
            " after all, the next run finds the rows there and only marks the file"
        ) from error
    except psycopg.Error as error:
        raise CopyError(f"PostgreSQL refused: {_reason(error)}; nothing was imported") from error


def _reason(error: psycopg.Error) -> str:
    """The server's sentence; its detail would show a row's content."""
    return error.diag.message_primary or str(error)
