"""A worker that is told to stop: who has its connection already still gets an answer."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
import uvicorn

from src.serve import PatientProtocol, main

SECONDS = 30.0


class Heard(PatientProtocol):
    """Says when the order to stop has reached a connection."""

    told = threading.Event()

    def shutdown(self) -> None:
        super().shutdown()
        self.told.set()


class Worker:
    """A server in a thread; `begun` when a request to /slow is being answered, which ends with `go_on`."""

    def __init__(self, keep_alive: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        Heard.told.clear()
        self.begun, self.go_on, self.ready = threading.Event(), threading.Event(), threading.Event()
        configuration = uvicorn.Config(
            self.app,
            port=self.port,
            http=Heard,
            timeout_keep_alive=keep_alive,
            timeout_graceful_shutdown=5,
            log_config=None,
            interface="asgi3",
        )
        self.server = uvicorn.Server(configuration)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["path"] == "/slow":
            self.begun.set()
            await asyncio.to_thread(self.go_on.wait, SECONDS)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def connect(self) -> HTTPConnection:
        while True:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
            try:
                connection.connect()
            except ConnectionRefusedError:
                assert self.thread.is_alive()
                continue
            return connection

    def stop(self) -> None:
        self.server.should_exit = True
        assert Heard.told.wait(SECONDS)


@pytest.fixture
def keep_alive() -> int:
    return 600


@pytest.fixture
def worker(keep_alive: int) -> Iterator[Worker]:
    made = Worker(keep_alive)
    made.thread.start()
    yield made
    made.server.should_exit = True
    made.go_on.set()
    made.thread.join(SECONDS)
    assert not made.thread.is_alive()


def ask(connection: HTTPConnection, path: str = "/") -> str | None:
    """What the answer says about the connection."""
    connection.request("GET", path)
    return heard(connection)


def heard(connection: HTTPConnection) -> str | None:
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"ok")
    return response.headers.get("connection")


def test_a_connection_made_before_the_stop_is_answered_once_and_told_that_it_was_the_last(worker: Worker) -> None:
    fresh, used = worker.connect(), worker.connect()
    assert ask(used) is None
    worker.stop()
    assert ask(fresh) == "close"
    assert ask(used) == "close"
    for each in (fresh, used):
        each.close()


def test_a_request_in_flight_is_answered_and_told_that_it_was_the_last(worker: Worker) -> None:
    connection = worker.connect()
    connection.request("GET", "/slow")
    assert worker.begun.wait(SECONDS)
    worker.stop()
    worker.go_on.set()
    assert heard(connection) == "close"
    connection.close()


@pytest.mark.parametrize("keep_alive", [0])
def test_connections_on_which_nothing_comes_do_not_hold_the_stop_up(worker: Worker) -> None:
    fresh = worker.connect()
    worker.stop()
    worker.thread.join(SECONDS)
    assert not worker.thread.is_alive()
    fresh.close()


def test_the_command_hands_host_port_and_workers_to_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: given.update(options, app=app))
    main(["--host", "::1", "--port", "81", "--workers", "3"])
    assert (given["app"], given["host"], given["port"], given["workers"]) == ("src.main:app", "::1", 81, 3)
    assert uvicorn.Config("src.main:app", http=given["http"]).http == "src.serve:PatientProtocol"
