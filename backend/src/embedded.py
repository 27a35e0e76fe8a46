"""A PostgreSQL server of our own for `DATABASE_URL=embedded:PATH`: shared, gone after the last.

Owns the folder PATH. Each process that uses the server holds `users.lock` shared; at its exit,
whoever then gets it exclusively stops the server, and a process that wants to start waits for that.
`start.lock` lets one process at a time bring the server up.

The kernel drops a dead process' locks, so a kill -9 blocks nobody. A server that outlives its last
user is adopted by the next one; a killed server is started again, and recovers, when it is next
asked for. Every process checks roles, database and extension, so half a first start is mended.
"""

from __future__ import annotations

import atexit
import os
import threading
from dataclasses import dataclass
from multiprocessing import util as multiprocessing_util
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from src.database import Role
from src.embedded_cluster import (
    EmbeddedServerError,
    Postmaster,
    create_cluster,
    find_postmaster,
    ready_postmaster,
    stop_postmaster,
)
from src.utils.file_lock import Mode, acquire, holding

DATABASE = "victus"
SUPERUSER = "postgres"
ROLE_ATTRIBUTES = {
    Role.OWNER: "LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS",
    Role.APP: "LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS",
    Role.ROLLOUT: "LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE BYPASSRLS",
}


@dataclass(slots=True)
class EmbeddedServer:
    """The server in `home`, which this process keeps alive until it exits or calls `leave`."""

    home: Path
    _lock: int
    _postmaster: Postmaster

    @property
    def pid(self) -> int:
        """The server's own process id."""
        return self._postmaster.pid

    def conninfo(self, role: Role, database: str = DATABASE) -> str:
        """libpq's connection string for `role`."""
        return _conninfo(self._postmaster, str(role), database)

    def superuser_conninfo(self, database: str = DATABASE) -> str:
        """libpq's connection string for the superuser."""
        return _conninfo(self._postmaster, SUPERUSER, database)

    def create_database(self, name: str, template: str | None = None) -> None:
        """A database of the owner's with pgvector: empty, or a copy of `template`."""
        _create_database(self._postmaster, name, template)

    def drop_database(self, name: str) -> None:
        """Removes the database if it exists, and disconnects whoever uses it."""
        drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        with _superuser(self._postmaster) as connection:
            connection.execute(drop)


def start(path: Path | str) -> EmbeddedServer:
    """The running server in the folder `path`, started if need be; one per process and folder.

    Raises EmbeddedServerError when it does not come up.
    """
    home = Path(path).expanduser().resolve()
    with _guard:
        server = _servers.get(home)
        if server is None:
            return _enter(home)
        if find_postmaster(_pgdata(home)) != server._postmaster:
            server._postmaster = _bring_up(home)
        return server


def leave(path: Path | str) -> bool:
    """Ends this process' use of the server; True if nobody else uses it, so that it is stopped."""
    home = Path(path).expanduser().resolve()
    with _guard:
        server = _servers.pop(home, None)
        if server is not None:
            # Closed, not unlocked: a child that was forked off a moment ago still counts by it.
            os.close(server._lock)
        return _stop_if_unused(home)


def _enter(home: Path) -> EmbeddedServer:
    home.mkdir(parents=True, exist_ok=True)
    lock = acquire(home / "users.lock", Mode.SHARED)
    try:
        server = EmbeddedServer(home, lock, _bring_up(home))
    except BaseException:
        os.close(lock)
        raise
    _servers[home] = server
    return server


def _bring_up(home: Path) -> Postmaster:
    with holding(home / "start.lock"):
        create_cluster(_pgdata(home))
        while True:
            postmaster = ready_postmaster(_pgdata(home))
            try:
                _prepare(postmaster)
            except psycopg.OperationalError as error:
                if find_postmaster(_pgdata(home)) == postmaster:
                    raise EmbeddedServerError(
                        f"the embedded PostgreSQL server in {home} runs, but roles and database"
                        f" could not be checked; its log says why: {_pgdata(home) / 'log'}"
                    ) from error
                continue  # it was stopped or killed since it was ready
            return postmaster


def _stop_if_unused(home: Path) -> bool:
    try:
        lock = acquire(home / "users.lock", Mode.EXCLUSIVE_NOW)
    except (BlockingIOError, FileNotFoundError):
        return False
    try:
        stop_postmaster(_pgdata(home))
    finally:
        os.close(lock)
    return True


def _prepare(postmaster: Postmaster) -> None:
    """Makes what every database here needs and what is not there yet."""
    with _superuser(postmaster) as connection:
        roles = {row[0] for row in connection.execute("SELECT rolname FROM pg_roles")}
        for role in ROLE_ATTRIBUTES.keys() - roles:
            create = sql.SQL("CREATE ROLE {} " + ROLE_ATTRIBUTES[role])
            connection.execute(create.format(sql.Identifier(role)))
        known = "SELECT 1 FROM pg_database WHERE datname = %s"
        missing = connection.execute(known, [DATABASE]).fetchone() is None
    if missing:
        _create_database(postmaster, DATABASE, None)
    else:
        _add_vector(postmaster, DATABASE)


def _create_database(postmaster: Postmaster, name: str, template: str | None) -> None:
    create = sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE {}").format(
        sql.Identifier(name), sql.Identifier(Role.OWNER), sql.Identifier(template or "template1")
    )
    with _superuser(postmaster) as connection:
        connection.execute(create)
    if template is None:
        _add_vector(postmaster, name)


def _add_vector(postmaster: Postmaster, database: str) -> None:
    with _superuser(postmaster, database) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")


def _superuser(postmaster: Postmaster, database: str = SUPERUSER) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(_conninfo(postmaster, SUPERUSER, database), autocommit=True)


def _conninfo(postmaster: Postmaster, user: str, database: str) -> str:
    return make_conninfo(host=postmaster.socket_dir, port=postmaster.port, user=user, dbname=database)


def _pgdata(home: Path) -> Path:
    return home / "pgdata"


def _leave_all() -> None:
    for home in list(_servers):
        leave(home)


def _after_fork() -> None:
    """A forked child counts by a lock of its own, not by its share of its parent's."""
    global _guard
    _guard = threading.Lock()
    for server in _servers.values():
        shared = server._lock
        server._lock = acquire(server.home / "users.lock", Mode.SHARED)
        os.close(shared)


def _leave_at_end_of_child(_: object) -> None:
    multiprocessing_util.Finalize(None, _leave_all, exitpriority=-100)


_servers: dict[Path, EmbeddedServer] = {}
_guard = threading.Lock()
atexit.register(_leave_all)
os.register_at_fork(after_in_child=_after_fork)
# A child made by multiprocessing ends without running what atexit holds.
multiprocessing_util.register_after_fork(EmbeddedServer, _leave_at_end_of_child)
