"""The embedded server under real processes: shared, gone after the last, clean after a kill -9."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from src import embedded
from src.database import Role
from src.embedded import EmbeddedServer
from src.embedded_cluster import find_postmaster

ROOT = Path(__file__).resolve().parents[2]

USER = """
import json, sys
from src import embedded
from src.database import Role

def report():
    server = embedded.start(sys.argv[1])
    told = {"pid": server.pid, "admin": server.superuser_conninfo("victus")}
    print(json.dumps(told), flush=True)

if __name__ == "__main__":
    report()
"""
UNTIL_CLOSED = """
    for line in sys.stdin:
        report()
"""
# The child outlives its parent, and says who answers it once the test has closed its input.
FORKED = """
    import os, psycopg
    if os.fork() == 0:
        sys.stdin.read()
        with psycopg.connect(embedded.start(sys.argv[1]).conninfo(Role.APP)) as connection:
            print(connection.execute("SELECT current_user").fetchone()[0], flush=True)
"""
MULTIPROCESSING = """
    import multiprocessing
    multiprocessing.get_context("fork").Process(target=sys.stdin.read).start()
"""


class Process:
    """A process that uses the embedded server in `folder` until `end` or `kill`."""

    def __init__(self, folder: Path, then: str = UNTIL_CLOSED) -> None:
        path = os.pathsep.join([str(ROOT / "backend"), str(ROOT)])
        self.popen = subprocess.Popen(
            [sys.executable, "-c", USER + then, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )

    def told(self) -> dict[str, Any]:
        """What it says next: the server's process id, and how the superuser connects."""
        line = self.popen.stdout.readline()
        assert line, f"the process ended with {self.popen.wait()}"
        return json.loads(line)

    def ask_again(self) -> dict[str, Any]:
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()
        return self.told()

    def end(self) -> str:
        """Lets it end; returns what it still said. Its forked children have ended as well."""
        self.popen.stdin.close()
        rest = self.popen.stdout.read()
        self.popen.stdout.close()
        assert self.popen.wait() == 0
        return rest

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.popen.stdin.close()
        self.popen.stdout.close()


@contextmanager
def process(folder: Path, then: str = UNTIL_CLOSED) -> Iterator[Process]:
    started = Process(folder, then)
    try:
        yield started
    finally:
        if started.popen.poll() is None:
            started.kill()


def server_pid(folder: Path) -> int | None:
    found = find_postmaster(folder / "pgdata")
    return found and found.pid


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def query(conninfo: str, statement: str) -> Any:
    with psycopg.connect(conninfo) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchone() if cursor.description else None


def kill_server(pid: int) -> None:
    server = psutil.Process(pid)
    server.kill()
    server.wait()


def test_processes_that_start_at_once_share_one_server_which_ends_with_the_last(
    server_folder: Path,
) -> None:
    with process(server_folder) as first, process(server_folder) as second:
        pid = first.told()["pid"]
        assert second.told()["pid"] == pid
        first.end()
        assert server_pid(server_folder) == pid
        second.end()
        assert server_pid(server_folder) is None
        assert not is_running(pid)


def test_killing_one_process_leaves_the_server_to_the_other(server_folder: Path) -> None:
    with process(server_folder) as killed, process(server_folder) as other:
        killed.told()
        told = other.told()
        killed.kill()
        assert query(told["admin"], "SELECT 1") == (1,)
        other.end()
        assert server_pid(server_folder) is None


def test_the_server_of_a_killed_last_process_is_adopted_and_then_stopped(
    server_folder: Path,
) -> None:
    with process(server_folder) as killed:
        pid = killed.told()["pid"]
        killed.kill()
    assert server_pid(server_folder) == pid
    with process(server_folder) as following:
        assert following.told()["pid"] == pid
        following.end()
    assert server_pid(server_folder) is None


def test_a_killed_server_is_recovered_when_it_is_asked_for_again(server_folder: Path) -> None:
    with process(server_folder) as user:
        before = user.told()
        query(before["admin"], "CREATE TABLE kept AS SELECT 42 AS answer")
        kill_server(before["pid"])
        after = user.ask_again()
        assert after["pid"] != before["pid"]
        assert query(after["admin"], "SELECT answer FROM kept") == (42,)
        user.end()


def test_a_killed_server_is_recovered_by_the_next_process_though_its_number_is_used_again(
    server_folder: Path,
) -> None:
    with process(server_folder) as user:
        before = user.told()
        query(before["admin"], "CREATE TABLE kept AS SELECT 42 AS answer")
        user.kill()
    kill_server(before["pid"])
    for name in "postmaster.pid", ".s.PGSQL.5432.lock":
        file = server_folder / "pgdata" / name
        file.write_text(file.read_text().replace(str(before["pid"]), str(os.getpid()), 1))
    with process(server_folder) as following:
        after = following.told()
        assert query(after["admin"], "SELECT answer FROM kept") == (42,)
        following.end()


def test_a_server_that_is_stopping_is_waited_for_not_joined(server_folder: Path) -> None:
    with process(server_folder) as user:
        before = user.told()
        user.kill()
    with psycopg.connect(before["admin"], autocommit=True) as connection:
        os.kill(before["pid"], signal.SIGTERM)  # it stops once this connection is closed
        connection.execute("SELECT 1")
        with process(server_folder) as following:
            connection.close()
            after = following.told()
            assert after["pid"] != before["pid"]
            following.end()


def test_a_forked_child_keeps_the_server_after_its_parent(server_folder: Path) -> None:
    with process(server_folder, FORKED) as parent:
        pid = parent.told()["pid"]
        assert parent.popen.wait() == 0
        assert server_pid(server_folder) == pid
        assert parent.end() == "victus_app\n"
    assert server_pid(server_folder) is None


def test_a_child_of_multiprocessing_stops_the_server_when_it_is_the_last(
    server_folder: Path,
) -> None:
    with process(server_folder, MULTIPROCESSING) as parent:
        parent.told()
        parent.end()
    assert server_pid(server_folder) is None


def test_half_a_first_start_is_mended_by_the_next(server_folder: Path) -> None:
    (server_folder / "pgdata.new-killed").mkdir()
    with process(server_folder) as user:
        told = user.told()
        admin = told["admin"].replace("dbname=victus", "dbname=postgres")
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute("DROP DATABASE victus WITH (FORCE)")
            connection.execute("DROP ROLE victus_rollout")
        with process(server_folder) as following:
            following.told()
            assert query(told["admin"], "SELECT '[1]'::vector::text") == ("[1]",)
            roles = "SELECT count(*) FROM pg_roles WHERE rolname LIKE 'victus%'"
            assert query(told["admin"], roles) == (3,)
            following.end()
        user.end()
    assert not list(server_folder.glob("pgdata.new-*"))


def test_a_folder_whose_name_is_too_long_for_a_socket_serves_all_the_same(
    server_folder: Path,
) -> None:
    folder = server_folder / "a folder" / ("long" * 30)
    with process(folder) as user:
        told = user.told()
        socket_dir = Path(str(query(told["admin"], "SHOW unix_socket_directories")[0]))
        assert socket_dir != folder / "pgdata"
        user.end()
    shutil.rmtree(socket_dir)


@pytest.mark.parametrize(("role", "bypasses"), [(Role.OWNER, False), (Role.APP, False), (Role.ROLLOUT, True)])
def test_a_role_may_log_in_and_only_rollout_bypasses_row_level_security(
    postgres: EmbeddedServer, role: Role, bypasses: bool
) -> None:
    attributes = (
        "SELECT rolname, rolcanlogin, rolbypassrls, rolsuper, rolcreaterole, rolcreatedb"
        " FROM pg_roles WHERE rolname = current_user"
    )
    found = query(postgres.conninfo(role), attributes)
    assert found == (str(role), True, bypasses, False, False, False)


def test_the_database_is_the_owners_and_has_pgvector(postgres: EmbeddedServer) -> None:
    owner = "SELECT datdba::regrole::text FROM pg_database WHERE datname = current_database()"
    assert query(postgres.conninfo(Role.OWNER), owner) == ("victus_owner",)
    version = "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
    (found,) = query(postgres.conninfo(Role.APP), version)
    assert tuple(map(int, found.split("."))) >= (0, 8, 4)


def test_a_commit_waits_for_the_disk(server_folder: Path) -> None:
    """On a server of its own: the one that the tests share does not wait."""
    server = embedded.start(server_folder)
    try:
        assert query(server.conninfo(Role.APP), "SHOW fsync") == ("on",)
        assert query(server.conninfo(Role.APP), "SHOW synchronous_commit") == ("on",)
    finally:
        embedded.leave(server_folder)


def test_a_test_database_is_a_copy_and_is_gone_when_dropped(postgres: EmbeddedServer) -> None:
    postgres.create_database("to_copy")
    query(postgres.conninfo(Role.OWNER, "to_copy"), "CREATE TABLE copied AS SELECT 7 AS seven")
    postgres.create_database("a_copy", "to_copy")
    assert query(postgres.conninfo(Role.OWNER, "a_copy"), "SELECT seven FROM copied") == (7,)
    with psycopg.connect(postgres.conninfo(Role.OWNER, "a_copy")):
        postgres.drop_database("a_copy")
    postgres.drop_database("a_copy")
    postgres.drop_database("to_copy")
    names = "SELECT count(*) FROM pg_database WHERE datname IN ('a_copy', 'to_copy')"
    assert query(postgres.superuser_conninfo(), names) == (0,)
