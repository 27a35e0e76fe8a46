"""A real PgBouncer in transaction mode before the embedded PostgreSQL, on a Unix socket of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from src.database import Role, url_of
from tests.support.database import Database

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
UP = "process up"

needs_pgbouncer = pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed")

CONFIGURATION = """
[databases]
{database} = host={host} port={port} dbname={database}
[pgbouncer]
listen_addr =
listen_port = 6432
unix_socket_dir = {folder}
auth_type = trust
auth_file = {folder}/users.txt
pool_mode = transaction
default_pool_size = {size}
max_client_conn = 500
log_connections = 0
log_disconnections = 0
"""


class Bouncer:
    """Where a client connects, as `Database` says where PostgreSQL is."""

    def __init__(self, folder: Path, database: Database) -> None:
        self.folder = folder
        self.database = database

    def conninfo(self, role: Role = Role.APP) -> str:
        return make_conninfo(self.database.conninfo(role), host=str(self.folder), port="6432")

    def url(self, role: Role = Role.APP) -> str:
        return url_of(self.conninfo(role))


@contextmanager
def bouncer(database: Database, *, size: int = 20) -> Iterator[Bouncer]:
    """`size` connections to the server for each role, shared by all clients, transaction by transaction."""
    folder = Path(tempfile.mkdtemp(prefix="victus-pgbouncer-"))
    try:
        _configure(folder, database, size)
        command = [str(PROGRAM), *_as_user(folder, database), str(folder / "pgbouncer.ini")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                _wait_until_up(process)
                yield Bouncer(folder, database)
            finally:
                process.kill()
    finally:
        shutil.rmtree(folder)


def _configure(folder: Path, database: Database, size: int) -> None:
    server = conninfo_to_dict(database.conninfo(Role.APP))
    (folder / "users.txt").write_text("".join(f'"{role}" ""\n' for role in Role))
    (folder / "pgbouncer.ini").write_text(
        CONFIGURATION.format(database=database.name, host=server["host"], port=server["port"], folder=folder, size=size)
    )
    folder.chmod(0o755)


def _as_user(folder: Path, database: Database) -> list[str]:
    """It refuses to run as root, and must reach PostgreSQL's socket: then as the user who owns that."""
    if os.getuid() != 0:
        return []
    owner = Path(str(conninfo_to_dict(database.conninfo(Role.APP))["host"])).owner()
    shutil.chown(folder, owner)
    return ["-u", owner]


def _wait_until_up(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if UP in line:
            return
    raise AssertionError(f"pgbouncer ended: {''.join(told)}")
