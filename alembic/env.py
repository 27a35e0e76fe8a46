"""How Alembic reaches the database, and what it compares with the models.

Each revision is a transaction of its own, so a process that dies leaves the database at the last
revision that was finished; a revision that leaves the transaction (an index built concurrently)
has to be one that can be run again.
"""

from __future__ import annotations

import time
from logging.config import fileConfig
from typing import Any

from sqlalchemy import Connection, create_engine, make_url, pool, text

import src.models  # noqa: F401  fills Base.metadata
from alembic import context
from src.database import Base, Role, sqlalchemy_url

UPGRADE_LOCK = 0x56494354  # "VICT"; any constant does, as long as it stays
LOCK_TIMEOUT = "5s"
WAIT_SECONDS = 600.0
POLL_SECONDS = 0.2

config = context.config
target_metadata = Base.metadata


class UpgradeLockedError(Exception):
    """Another upgrade of this database did not end in time."""


def database_url() -> str:
    """The URL that the caller handed over, else the owner's."""
    return str(config.attributes.get("url") or sqlalchemy_url(Role.OWNER))


def include_name(name: str | None, kind: str, _parents: Any) -> bool:
    """Leaves out tables that no model declares: they are written in SQL, and stay."""
    return kind != "table" or name in target_metadata.tables


def include_object(_object: Any, _name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:
    """Leaves out indexes that no model declares."""
    return not (kind == "index" and reflected and compare_to is None)


def options(dialect: str) -> dict[str, Any]:
    return {
        "target_metadata": target_metadata,
        "include_name": include_name,
        "include_object": include_object,
        "compare_server_default": True,
        "render_as_batch": dialect == "sqlite",
        "transaction_per_migration": True,
    }


def run_offline() -> None:
    """Prints the SQL instead of running it."""
    url = make_url(database_url())
    context.configure(dialect_name=url.get_backend_name(), literal_binds=True, **options(url.get_backend_name()))
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    engine = create_engine(database_url(), poolclass=pool.NullPool)
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            wait_for_other_upgrades(connection)
        context.configure(connection=connection, **options(connection.dialect.name))
        with context.begin_transaction():
            context.run_migrations()


def wait_for_other_upgrades(connection: Connection) -> None:
    """Takes the upgrade lock, which lasts as long as the connection, then bounds every other wait.

    Asked for again and again: a session that waits inside pg_advisory_lock holds a snapshot, for
    which the other upgrade's CREATE INDEX CONCURRENTLY would wait in turn, for ever.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": UPGRADE_LOCK}):
        connection.rollback()
        if time.monotonic() > deadline:
            raise UpgradeLockedError(
                f"another upgrade of this database has been running for {WAIT_SECONDS:.0f} s;"
                " wait for it, or end its session (pg_locks, locktype 'advisory'), then try again"
            )
        time.sleep(POLL_SECONDS)
    connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
    connection.commit()


if config.cmd_opts is not None and config.config_file_name is not None:
    # Only for the command: a program that upgrades through Alembic's API has its own logging.
    fileConfig(config.config_file_name, disable_existing_loggers=False)

if context.is_offline_mode():
    run_offline()
else:
    run_online()
