"""Who connects to what, from the settings alone; nothing is started here."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from src import database
from src.config import settings
from src.database import DatabaseUrlError, DocumentsNeedPostgresError, Role

POSTGRES = "postgresql://victus_app:s3cret@db:5433/victus"


@pytest.fixture(autouse=True)
def no_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, "sqlite:///./victus.db")


def configure(monkeypatch: pytest.MonkeyPatch, app: str, owner: str | None = None, rollout: str | None = None) -> None:
    monkeypatch.setattr(settings, "DATABASE_URL", app)
    monkeypatch.setattr(settings, "DATABASE_ADMIN_URL", owner)
    monkeypatch.setattr(settings, "DATABASE_ROLLOUT_URL", rollout)


@pytest.mark.parametrize("role", Role)
def test_sqlite_is_refused_with_what_to_do_about_it(role: Role) -> None:
    with pytest.raises(DocumentsNeedPostgresError) as refusal:
        database.conninfo(role)
    for part in ("sqlite:///./victus.db", "DATABASE_URL", "embedded:PATH"):
        assert part in str(refusal.value)
    assert "rollout import-sql" in str(refusal.value)  # migration


@pytest.mark.parametrize("role", Role)
def test_sqlite_has_one_url_for_every_role(role: Role) -> None:
    assert database.sqlalchemy_url(role) == "sqlite:///./victus.db"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_any_postgresql_scheme_connects_by_psycopg(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    configure(monkeypatch, POSTGRES.replace("postgresql", scheme))
    assert conninfo_to_dict(database.conninfo(Role.APP)) == {
        "user": "victus_app",
        "password": "s3cret",
        "host": "db",
        "port": "5433",
        "dbname": "victus",
    }
    expected = POSTGRES.replace("postgresql", "postgresql+psycopg")
    assert database.sqlalchemy_url(Role.APP) == expected


def test_each_role_has_its_own_url(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, POSTGRES, "postgresql://owner@db/victus", "postgresql://bulk@db/victus")
    users = [conninfo_to_dict(database.conninfo(role))["user"] for role in Role]
    assert users == ["owner", "victus_app", "bulk"]


def test_the_owner_without_a_url_of_its_own_connects_as_the_app(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure(monkeypatch, POSTGRES)
    assert database.conninfo(Role.OWNER) == database.conninfo(Role.APP)


def test_bulk_work_never_borrows_the_apps_url(monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, POSTGRES)
    with pytest.raises(DatabaseUrlError, match="set DATABASE_ROLLOUT_URL") as refusal:
        database.conninfo(Role.ROLLOUT)
    assert "s3cret" not in str(refusal.value)


@pytest.mark.parametrize("url", ["mysql://root:s3cret@db/victus", "postgresql://db:s3cret@[/x"])
def test_a_url_that_cannot_be_used_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    configure(monkeypatch, url)
    with pytest.raises(DatabaseUrlError) as refusal:
        database.conninfo(Role.APP)
    assert "s3cret" not in "".join(traceback.format_exception(refusal.value, limit=0))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (POSTGRES, "postgresql://victus_app:***@db:5433/victus"),
        ("postgresql://db/victus?password=s3cret&x=1", "postgresql://db/victus?password=***&x=1"),
        ("postgresql://u:a@b:s3cret@db/victus", "postgresql://u:***@db/victus"),
        ("postgresql://u@db/victus", "postgresql://u@db/victus"),
        ("sqlite:///./victus.db", "sqlite:///./victus.db"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert database.hide_password(url) == shown


def test_an_embedded_server_is_started_by_the_first_connect_and_knows_every_role(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[Path] = []

    def start(path: Path) -> SimpleNamespace:
        started.append(path)
        return SimpleNamespace(conninfo=lambda role: f"host=/sockets user={role} dbname=victus")

    monkeypatch.setattr("src.embedded.start", start)
    configure(monkeypatch, "embedded:some/folder", rollout=None)
    engine = database.make_engine(settings.DATABASE_URL)
    assert engine.dialect.name == "postgresql"
    assert started == []
    for role in Role:
        assert database.conninfo(role) == f"host=/sockets user={role} dbname=victus"
    url = f"postgresql+psycopg:///victus?host=%2Fsockets&user={Role.OWNER}"
    assert database.sqlalchemy_url(Role.OWNER) == url
    assert set(started) == {Path("some/folder")}


@pytest.fixture
def sqlite() -> Iterator[database.Engine]:
    engine = database.make_engine("sqlite://")
    yield engine
    engine.dispose()


def test_sqlite_enforces_foreign_keys(sqlite: database.Engine) -> None:
    with sqlite.connect() as connection:
        connection.execute(text("CREATE TABLE users (id INTEGER PRIMARY KEY)"))
        connection.execute(text("CREATE TABLE documents (user_id INTEGER REFERENCES users)"))
        with pytest.raises(IntegrityError):
            connection.execute(text("INSERT INTO documents VALUES (1)"))


def test_a_session_is_closed_when_the_request_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    session = SimpleNamespace(close=lambda: closed.append("closed"))
    monkeypatch.setattr(database, "SessionLocal", lambda: session)
    request = database.get_db()
    assert next(request) is session
    with pytest.raises(RuntimeError, match="handler"):
        request.throw(RuntimeError("the handler failed"))
    assert closed == ["closed"]
