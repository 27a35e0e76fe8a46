"""The service itself: readiness, metrics, request ids, faults, and how it starts and stops."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from structlog.testing import capture_logs
from uvicorn.config import STARTUP_FAILURE

from src.database import Role
from src.tools import rag_tools
from tests.support.backend import PASSWORD, SECRET_KEY, Backend, away, running_backend
from tests.support.database import Database

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 240


@pytest.fixture
def backend(configured_database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    with running_backend(tmp_path, monkeypatch) as running:
        yield running


def test_a_ready_process_says_so_with_its_stage(backend: Backend) -> None:
    answer = backend.client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["ready"] is True
    assert answer.json()["parts"]["documents"]["ready"] is True


def test_without_the_database_the_process_lives_but_is_not_ready(
    backend: Backend, configured_database: Database
) -> None:
    with away(configured_database):
        answer = backend.client.get("/readyz")
        assert answer.status_code == 503
        parts = answer.json()["parts"]
        assert [part["ready"] for part in parts.values()] == [False, False]
        assert all(part["reason"] for part in parts.values())
        assert backend.client.get("/healthz").status_code == 200
    # Each pooled connection that the outage broke is found broken once.
    assert any(backend.client.get("/readyz").status_code == 200 for _ in range(20))


def test_requests_are_counted_by_route_and_never_by_path(backend: Backend) -> None:
    ada = backend.user("ada")
    ada.get("/api/documents/4711")
    backend.client.get("/no/such/path-4711")
    text = backend.client.get("/metrics").text
    line = r'http_requests_total\{method="GET",route="/api/documents/\{document_id\}",status="404"\} \d'
    assert re.search(line, text)
    assert 'route="none",status="404"' in text
    assert "4711" not in text


def test_a_requests_id_is_taken_over_where_it_is_harmless_and_given_back(backend: Backend) -> None:
    for given, taken in [("abc-123", True), ("x" * 65, False), ("a\tb", False), ('"}', False)]:
        with capture_logs(processors=[merge]) as logs:
            answer = backend.client.get("/healthz", headers={"X-Request-ID": given})
        told = answer.headers["X-Request-ID"]
        assert (told == given) is taken
        assert [entry["request_id"] for entry in logs] == [told]


def merge(logger: Any, method: str, event: Any) -> Any:
    from structlog.contextvars import merge_contextvars

    return merge_contextvars(logger, method, event)


def test_a_fault_of_ours_is_told_with_the_requests_id_and_nothing_else(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = backend.user("ada")

    def break_down(*_: object) -> None:
        raise RuntimeError("the text of a private document")

    monkeypatch.setattr(rag_tools.service(), "query", break_down)
    with capture_logs() as logs:
        answer = ada.get("/api/search", params={"q": "anything"})
    assert answer.status_code == 500
    assert answer.headers["X-Request-ID"] in answer.json()["detail"]
    assert "private" not in answer.text
    assert "http.request.failed" in [entry["event"] for entry in logs]


def test_unknown_paths_and_methods_are_answered_in_the_same_form(backend: Backend) -> None:
    ada = backend.user("ada")
    for answer, status in [
        (backend.client.get("/nothing"), 404),
        (backend.client.get("/auth/login"), 405),
        (ada.get("/api/nothing"), 404),
        (ada.request("PATCH", "/api/facts"), 405),
        (backend.client.get("/api/nothing"), 401),
    ]:
        assert answer.status_code == status
        assert set(answer.json()) == {"detail"}


def test_a_body_above_a_megabyte_is_refused_before_it_is_read(backend: Backend) -> None:
    ada = backend.user("ada")
    answer = ada.post("/api/chat", content=b"x" * (2**20 + 1))
    assert answer.status_code == 413
    answer = ada.post("/api/chat", content=iter([b"x" * 2**20, b"x"]))
    assert answer.status_code == 413
    assert backend.client.post("/auth/login", content=b"x" * (2**20 + 1)).status_code == 413


# -- as a process of its own


def environment(database: Database, folder: Path, **changes: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'backend'}:{ROOT}",
        "DATABASE_URL": database.url(Role.APP),
        "EMBEDDING_PROVIDER": "local",
        "UPLOAD_DIR": str(folder / "uploads"),
        "SECRET_KEY": SECRET_KEY,
        **changes,
    }


def uvicorn(folder: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "uvicorn", "src.main:app", *options]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def status_of(port: int, token: str, path: str) -> int:
    """For paths that are longer than the usual client sends."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    with closing(connection):
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status


def test_with_the_default_secret_key_the_service_does_not_start(database: Database, tmp_path: Path) -> None:
    env = environment(database, tmp_path)
    del env["SECRET_KEY"]
    process = uvicorn(tmp_path, env, "--port", "0")
    try:
        said, _ = process.communicate(timeout=START_SECONDS)
    finally:
        process.kill()
    assert "SECRET_KEY is the default" in said
    # What uvicorn's supervisor takes for final: with --workers it ends as well.
    assert process.returncode == STARTUP_FAILURE


def test_a_process_serves_logs_json_without_questions_and_stops_when_asked(database: Database, tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        env = environment(database, tmp_path)
        command = [sys.executable, "-m", "uvicorn", "src.main:app", "--fd", str(listening.fileno())]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=env, pass_fds=[listening.fileno()],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            # The socket listens already: the first request waits in its queue for the start.
            base = f"http://127.0.0.1:{port}"
            with httpx2.Client(base_url=base, timeout=START_SECONDS, trust_env=False) as client:
                account = {"email": "ada@example.org", "username": "ada", "password": PASSWORD}
                assert client.post("/auth/register", json=account).status_code == 201
                token = client.post("/auth/login", json=account).json()["access_token"]
                client.headers["Authorization"] = f"Bearer {token}"
                assert client.get("/api/search", params={"q": "a private question"}).json() == []
                assert client.get("/api/search", params={"q": "x" * 60_000}).status_code == 422
                assert status_of(port, token, "/api/search?q=" + "x" * 100_000) in (400, 414, 422)
                assert client.post("/api/chat", json={"message": "x" * 100_000}).status_code == 422
                large = {"file": ("large.txt", b"x" * 60_000_000, "text/plain")}
                assert client.post("/api/upload", files=large).status_code == 413
        finally:
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=START_SECONDS)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines if line["event"].startswith("service.")] == [
        "service.start.done",
        "service.stop.done",
    ]
    assert "private question" not in said
    assert PASSWORD not in said
    assert token not in said
    assert sum(line["event"] == "http.request.done" for line in lines) >= 4
    assert process.returncode in (0, -signal.SIGTERM)
