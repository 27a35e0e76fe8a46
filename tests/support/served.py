"""The backend as it runs in production: a server process with workers, asked over HTTP.

Its lines on stdout are read as they come, so a test waits for an event of the log instead of some time. A line to a
chosen worker is made by stopping the others for that moment: all of them listen on one socket.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

from src.database import Role
from tests.support.commands import base_environment
from tests.support.database import Database

STARTED = "service.start.done"
STOPPED = "service.stop.done"
SECRET_KEY = "f" * 40
PASSWORD = "correct horse battery"
SECONDS = 120.0
"""Longer than anything here takes; a test that waits so long has failed."""
UVICORN = ("-m", "uvicorn", "src.main:app", "--timeout-keep-alive", "600", "--timeout-worker-healthcheck", "60")
SERVE = ("-m", "src.serve")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; `data` is the JSON, or None."""

    status: int
    data: Any
    text: str


@dataclass
class Line:
    """One connection, kept alive, by which the requests of one user go out; nothing is tried twice."""

    port: int
    token: str = ""
    connection: HTTPConnection = field(init=False)

    def __post_init__(self) -> None:
        self.connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """JSON both ways; bytes are sent as the form of an upload."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        if isinstance(body, bytes):
            headers["Content-Type"] = f"multipart/form-data; boundary={BOUNDARY}"
        elif body is not None:
            headers["Content-Type"] = "application/json"
            body = json.dumps(body).encode()
        self.connection.request(method, path, body, headers)
        response = self.connection.getresponse()
        text = response.read().decode()
        told = response.headers.get("content-type", "")
        return Answer(response.status, json.loads(text) if text and "json" in told else None, text)

    def get(self, path: str) -> Any:
        """What a GET answers with; it must succeed."""
        answer = self.ask("GET", path)
        assert answer.status == 200, answer
        return answer.data

    def close(self) -> None:
        self.connection.close()


BOUNDARY = "the-boundary-of-the-form"


def form(name: str, text: str) -> bytes:
    """The body of an upload."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
    return f"{head}Content-Type: text/plain\r\n\r\n{text}\r\n--{BOUNDARY}--\r\n".encode()


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    port: int
    workers: int
    lines: list[dict[str, Any]] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    heard: threading.Condition = field(default_factory=threading.Condition)

    # -- its log

    def listen(self) -> None:
        """Reads what it writes until it ends; runs in a thread of its own."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.heard:
                if line.startswith("{"):
                    self.lines.append(json.loads(line))
                else:
                    self.other.append(line)
                self.heard.notify_all()

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == name]

    def wait_for(self, name: str, count: int) -> None:
        """Until the log has so many events of that name."""
        with self.heard:
            there = self.heard.wait_for(
                lambda: len(self.events(name)) >= count or self.process.poll() is not None, SECONDS
            )
        assert there, self.told()
        assert len(self.events(name)) >= count, self.told()

    def told(self) -> str:
        """The end of its log, for a test that fails."""
        return "\n".join([*self.other[-40:], *(json.dumps(line) for line in self.lines[-40:])])

    def faults(self) -> list[dict[str, Any]]:
        """What it logged as an error."""
        return [line for line in self.lines if line.get("level") in ("error", "critical")]

    # -- its processes

    @property
    def pids(self) -> list[int]:
        """The workers, the oldest first."""
        children = psutil.Process(self.process.pid).children()
        workers = [child for child in children if _is_worker(child)]
        return [child.pid for child in sorted(workers, key=lambda child: child.create_time())]

    def line_to(self, pid: int, token: str = "") -> Line:
        """A connection that this worker has accepted; every request on it goes there."""
        others = [each for each in self.pids if each != pid]
        for each in others:
            os.kill(each, signal.SIGSTOP)
        try:
            line = Line(self.port, token)
            assert line.ask("GET", "/healthz").status == 200
        finally:
            for each in others:
                os.kill(each, signal.SIGCONT)
        return line

    def stop(self) -> int:
        """SIGTERM; returns the exit code once it has ended."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)


def environment(database: Database, folder: Path, **settings: str) -> dict[str, str]:
    """The settings of a backend on the database and with its files in the folder."""
    return {
        "ENVIRONMENT": "production",
        "SECRET_KEY": SECRET_KEY,
        "DATABASE_URL": database.url(Role.APP),
        "DATABASE_ADMIN_URL": database.url(Role.OWNER),
        "DATABASE_ROLLOUT_URL": database.url(Role.ROLLOUT),
        "EMBEDDING_PROVIDER": "local",
        "FAISS_INDEX_PATH": str(folder / "faiss_index"),
        "UPLOAD_DIR": str(folder / "uploads"),
        **settings,
    }


@contextmanager
def served(
    folder: Path, settings: Mapping[str, str], *, workers: int = 4, command: tuple[str, ...] = UVICORN
) -> Iterator[Served]:
    """A server whose workers are all ready; killed with them afterwards if it still runs."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, *command, "--port", str(port), "--workers", str(workers)],
        cwd=folder,
        env={**base_environment(), **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    made = Served(process, port, workers)
    listener = threading.Thread(target=made.listen, name="log")
    listener.start()
    try:
        made.wait_for(STARTED, workers)
        _wait_for_listener(port)
        yield made
    finally:
        _end(process)
        listener.join()
        if process.stdout is not None:
            process.stdout.close()


def register(line: Line, name: str) -> tuple[int, str]:
    """A new account: its id and a token."""
    account = {"email": f"{name}@example.org", "username": name, "password": PASSWORD}
    made = line.ask("POST", "/auth/register", account)
    assert made.status == 201, made
    login = line.ask("POST", "/auth/login", {"username": name, "password": PASSWORD})
    assert login.status == 200, login
    return made.data["id"], login.data["access_token"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_listener(port: int) -> None:
    """A worker says that it has started, and listens a moment later; nothing tells of that but an answer."""
    end = time.monotonic() + SECONDS
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < end, f"nobody listens on port {port}"
        time.sleep(0.01)


def _is_worker(child: psutil.Process) -> bool:
    try:
        return any("spawn_main" in word for word in child.cmdline())
    except psutil.NoSuchProcess:  # also one that has ended and was not waited for yet
        return False


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in family:
        if each.is_running():
            each.kill()
    process.wait()
