"""The relational database: engine, sessions, and how each role connects.

Importing this module starts and opens nothing; an embedded server is started by the first connect.
Nothing here outlives the process, so a crash leaves nothing to repair.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker

from src.config import settings

if TYPE_CHECKING:
    from src.embedded import EmbeddedServer

EMBEDDED = "embedded:"
_POSTGRES = re.compile(r"^postgres(?:ql)?(?:\+\w+)?://")
_PASSWORD = re.compile(r"(://[^:/]*:).*@")
_PASSWORD_PARAMETER = re.compile(r"(password=)[^&\s]*")


class DatabaseError(Exception):
    """The database could not be used as asked; the message says what to do next."""


class DatabaseUrlError(DatabaseError):
    """A database URL is missing or cannot be read."""


class DocumentsNeedPostgresError(DatabaseError):
    """SQLite is configured, and what was asked for needs PostgreSQL."""


class Role(StrEnum):
    """Who connects. The value is the role's name in PostgreSQL."""

    OWNER = "victus_owner"
    APP = "victus_app"
    ROLLOUT = "victus_rollout"


class Base(DeclarativeBase):
    """What every table of the backend derives from."""


def conninfo(role: Role) -> str:
    """libpq's connection string for `role`; starts the embedded server where one is configured.

    Raises DocumentsNeedPostgresError on SQLite, DatabaseUrlError on a missing or unreadable URL.
    """
    url = _configured(role)
    if url.startswith(EMBEDDED):
        return _embedded(url).conninfo(role)
    if not _POSTGRES.match(url):
        raise _not_postgres(url)
    try:
        return make_conninfo(_POSTGRES.sub("postgresql://", url))
    except psycopg.ProgrammingError:
        raise DatabaseUrlError(
            f"{hide_password(url)!r}, configured for {role}, is no PostgreSQL URL;"
            " write it as postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
        ) from None  # libpq's own message quotes the password


def sqlalchemy_url(role: Role) -> str:
    """SQLAlchemy's URL for `role`, password included; starts an embedded server."""
    url = _configured(role)
    if not url.startswith(EMBEDDED):
        return _POSTGRES.sub("postgresql+psycopg://", url)
    return url_of(_embedded(url).conninfo(role))


def url_of(connection: str) -> str:
    """SQLAlchemy's URL for what libpq's string `connection` says, password included."""
    parameters = {key: str(value) for key, value in conninfo_to_dict(connection).items()}
    name = parameters.pop("dbname", None)
    url = URL.create("postgresql+psycopg", database=name, query=parameters)
    return url.render_as_string(hide_password=False)


def hide_password(url: str) -> str:
    """`url` as it may be logged."""
    return _PASSWORD_PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1***@", url))


def get_db() -> Iterator[Session]:
    """A session for one request, closed afterwards."""
    db = SessionLocal()
    try:
        yield db
    finally:
        db.close()


def make_engine(url: str) -> Engine:
    """An engine for `url` (SQLite, PostgreSQL or `embedded:PATH`) that has not connected yet."""
    if url.startswith(EMBEDDED):
        return create_engine(
            "postgresql+psycopg://",
            creator=lambda: psycopg.connect(_embedded(url).conninfo(Role.APP)),
            pool_pre_ping=True,
            pool_size=settings.DATABASE_POOL_SIZE,
        )
    if _POSTGRES.match(url):
        return create_engine(
            _POSTGRES.sub("postgresql+psycopg://", url),
            connect_args={} if settings.DATABASE_PREPARE else {"prepare_threshold": None},
            pool_pre_ping=True,
            pool_size=settings.DATABASE_POOL_SIZE,
        )
    made = create_engine(url)
    if made.dialect.name == "sqlite":
        event.listen(made, "connect", _enforce_foreign_keys)
    return made


def _configured(role: Role) -> str:
    match role:
        case Role.APP:
            return settings.DATABASE_URL
        case Role.OWNER:
            return settings.DATABASE_ADMIN_URL or settings.DATABASE_URL
        case Role.ROLLOUT:
            return _rollout_url()


def _rollout_url() -> str:
    if settings.DATABASE_ROLLOUT_URL:
        return settings.DATABASE_ROLLOUT_URL
    if _POSTGRES.match(settings.DATABASE_URL):
        raise DatabaseUrlError(
            f"no URL is set for the role {Role.ROLLOUT} of {hide_password(settings.DATABASE_URL)};"
            " set DATABASE_ROLLOUT_URL to one that connects as it"
        )
    return settings.DATABASE_URL


def _not_postgres(url: str) -> DatabaseError:
    if not url.startswith("sqlite"):
        return DatabaseUrlError(
            f"{hide_password(url)!r} names a database that is not supported;"
            " set DATABASE_URL to postgresql://... or embedded:PATH"
        )
    advice = "set DATABASE_URL to postgresql://... or embedded:PATH"
    # migration
    advice += f", then run `rollout import-sql {hide_password(url)}` to move what the old one holds"
    # end of migration
    return DocumentsNeedPostgresError(
        f"documents need PostgreSQL with pgvector, but the database is {hide_password(url)}; {advice}"
    )


def _embedded(url: str) -> EmbeddedServer:
    from src import embedded  # loads the server's package: only who asks for it pays

    return embedded.start(Path(url.removeprefix(EMBEDDED)))


def _enforce_foreign_keys(connection: sqlite3.Connection, _record: Any) -> None:
    connection.execute("PRAGMA foreign_keys = ON")


engine = make_engine(settings.DATABASE_URL)
SessionLocal = sessionmaker(autocommit=False, autoflush=False, bind=engine)
