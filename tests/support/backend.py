"""The HTTP backend in this process, for tests: on a database of their own, with local embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog
from argon2 import PasswordHasher
from fastapi.testclient import TestClient
from pydantic import SecretStr
from structlog.typing import Processor

from src.log import describe_exception, without_secrets
from tests.support.database import Database

SECRET_KEY = "k" * 40
# structlog's own default prints every local variable of a failure, which takes seconds.
PROCESSORS: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    describe_exception,
    without_secrets,
    structlog.processors.JSONRenderer(),
]
CHEAP = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
PASSWORD = "correct horse battery"


@dataclass
class Backend:
    """A running backend; `client` is not logged in."""

    client: TestClient
    uploads: Path
    users: dict[str, User] = field(default_factory=dict)

    def user(self, name: str) -> User:
        """The account of that name, made and logged in when it is first asked for."""
        if name not in self.users:
            self.users[name] = self._register(name)
        return self.users[name]

    def indexed(self) -> None:
        """Returns once every upload that was acknowledged so far was indexed, or could not be."""
        app: Any = self.client.app
        app.state.indexing._threads.submit(lambda: None).result()  # one worker: it comes last

    def files(self) -> list[Path]:
        """What lies in the upload folder."""
        return sorted(self.uploads.iterdir()) if self.uploads.exists() else []

    def _register(self, name: str) -> User:
        account = {"email": f"{name}@example.org", "username": name, "password": PASSWORD}
        made = self.client.post("/auth/register", json=account)
        assert made.status_code == 201, made.text
        login = self.client.post("/auth/login", json={"username": name, "password": PASSWORD})
        assert login.status_code == 200, login.text
        return User(self.client, made.json()["id"], login.json()["access_token"])


@dataclass(frozen=True)
class User:
    """Somebody with an account; `get` and so on are requests with their token."""

    client: TestClient
    id: int
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def request(self, method: str, path: str, **parts: Any) -> Any:
        return self.client.request(method, path, headers=self.headers, **parts)

    def get(self, path: str, **parts: Any) -> Any:
        return self.request("GET", path, **parts)

    def post(self, path: str, **parts: Any) -> Any:
        return self.request("POST", path, **parts)

    def delete(self, path: str) -> Any:
        return self.request("DELETE", path)

    def upload(self, name: str, content: bytes, content_type: str = "text/plain") -> Any:
        return self.post("/api/upload", files={"file": (name, content, content_type)})

    def chat(self, message: str, conversation_id: str | None = None) -> list[tuple[str, Any]]:
        """The events of the answer, each with its data."""
        body = {"message": message, "conversation_id": conversation_id}
        answer = self.post("/api/chat", json=body)
        assert answer.status_code == 200, answer.text
        return events(answer.text)


def events(stream: str) -> list[tuple[str, Any]]:
    """The server-sent events of a whole stream."""
    found = []
    for block in stream.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


@contextmanager
def running_backend(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Backend]:
    """The backend, on the database that `src.config.settings` names, in the folder `folder`.

    `settings` change src.config.settings for as long as it runs.
    """
    from src.auth import passwords
    from src.config import settings as configured
    from src.main import create_app

    monkeypatch.chdir(folder)
    monkeypatch.setattr(passwords, "_hasher", CHEAP)
    changes = {
        "SECRET_KEY": SecretStr(SECRET_KEY),
        "UPLOAD_DIR": folder / "uploads",
        "EMBEDDING_PROVIDER": "local",
        "OPENAI_API_KEY": None,
        "INDEX_WORKERS": 1,
        **settings,
    }
    for name, value in changes.items():
        monkeypatch.setattr(configured, name, value)
    structlog.configure(processors=PROCESSORS)
    try:
        with TestClient(create_app(configured), raise_server_exceptions=False) as client:
            yield Backend(client, folder / "uploads")
    finally:
        structlog.reset_defaults()


@contextmanager
def away(database: Database) -> Iterator[None]:
    """PostgreSQL as good as away: no connection to the database is left, and none can be made."""
    with psycopg.connect(database.server.superuser_conninfo(), autocommit=True) as server:
        server.execute(f'ALTER DATABASE "{database.name}" ALLOW_CONNECTIONS false')
        server.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s",
            [database.name],
        )
        try:
            yield
        finally:
            server.execute(f'ALTER DATABASE "{database.name}" ALLOW_CONNECTIONS true')


@contextmanager
def sqlite_database(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A new SQLite database with all tables, which the settings and SessionLocal use."""
    import src.database as module
    import src.models  # noqa: F401  fills Base.metadata
    from src.config import settings as configured

    monkeypatch.setattr(configured, "DATABASE_URL", f"sqlite:///{folder}/victus.db")
    engine, previous = module.make_engine(configured.DATABASE_URL), module.engine
    module.Base.metadata.create_all(engine)
    monkeypatch.setattr(module, "engine", engine)
    module.SessionLocal.configure(bind=engine)
    try:
        yield
    finally:
        module.SessionLocal.configure(bind=previous)
        engine.dispose()
