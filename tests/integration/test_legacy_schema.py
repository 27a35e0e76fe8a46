"""The schema: models and revisions agree, and a legacy database is taken as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.command import check, downgrade, stamp, upgrade
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    Connection,
    Engine,
    Inspector,
    create_engine,
    inspect,
    pool,
    select,
    text,
)

import src.models
from src.database import Base, Role
from tests.support.database import Database
from tests.support.legacy_schema import (
    ALEMBIC_INI,
    LEGACY_HEAD,
    NEW_IN_DOCUMENTS,
    alembic_config,
    legacy_metadata,
)

UNIQUE = {
    "users": {("email",), ("username",)},
    "conversation_memories": {("conversation_id",)},
    "passkeys": {("credential_id",)},
    "password_reset_tokens": {("token_hash",)},
}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database's URL, as the owner."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/victus.db"
    url: str = request.getfixturevalue("database").url(Role.OWNER)
    downgrade(alembic_config(url), "base")
    return url


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = create_engine(url, poolclass=pool.NullPool)
    yield engine
    engine.dispose()


def differences(connection: Connection) -> list[Any]:
    """What autogenerate would change; `alembic check` tells it only at head."""
    found: list[Any] = compare_metadata(
        MigrationContext.configure(connection, opts={"compare_server_default": True}), Base.metadata
    )
    return found


def test_the_models_are_the_schema_at_head(url: str) -> None:
    upgrade(alembic_config(url), "head")
    check(alembic_config(url))


def test_at_the_legacy_head_only_the_life_of_a_document_is_missing(url: str, engine: Engine) -> None:
    upgrade(alembic_config(url), LEGACY_HEAD)
    with engine.connect() as connection:
        found = differences(connection)
    assert {(kind, table, column.name) for kind, _schema, table, column in found} == {
        ("add_column", "documents", name) for name in NEW_IN_DOCUMENTS
    }


def test_every_foreign_key_cascades_and_unique_columns_are_unique(url: str, engine: Engine) -> None:
    upgrade(alembic_config(url), LEGACY_HEAD)
    inspector: Inspector = inspect(engine)
    for table in Base.metadata.tables:
        for key in inspector.get_foreign_keys(table):
            assert key["options"].get("ondelete") == "CASCADE", (table, key)
        unique = {tuple(one["column_names"]) for one in inspector.get_unique_constraints(table)}
        assert unique == UNIQUE.get(table, set()), table


def test_up_and_down_and_up_again_is_the_same_schema(url: str, engine: Engine) -> None:
    upgrade(alembic_config(url), "head")
    downgrade(alembic_config(url), "base")
    assert set(inspect(engine).get_table_names()) == {"alembic_version"}
    upgrade(alembic_config(url), "head")
    check(alembic_config(url))


def test_a_database_made_by_the_old_release_is_upgraded_with_its_rows(url: str, engine: Engine) -> None:
    make_legacy(url, engine)
    upgrade(alembic_config(url), "head")
    check(alembic_config(url))
    with engine.connect() as connection:
        document = src.models.Document.__table__
        row = connection.execute(select(document)).mappings().one()
    assert (row["filename"], row["path"]) == ("plan.pdf", "uploads/plan.pdf")
    assert (row["status"], row["error"], row["deleted_at"]) == ("ready", None, None)
    assert row["updated_at"] is not None


def test_stepping_back_to_the_legacy_head_keeps_the_rows(url: str, engine: Engine) -> None:
    make_legacy(url, engine)
    upgrade(alembic_config(url), "head")
    downgrade(alembic_config(url), LEGACY_HEAD)
    with engine.connect() as connection:
        path = connection.scalar(text("SELECT path FROM documents"))
        email = connection.scalar(text("SELECT email FROM users"))
    assert (path, email) == ("uploads/plan.pdf", "ada@example.org")


def test_what_the_old_release_inserts_on_the_new_schema_is_a_ready_document(url: str, engine: Engine) -> None:
    upgrade(alembic_config(url), "head")
    insert_rows(engine)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT status FROM documents")) == "ready"


def test_two_upgrades_at_once_take_turns(database: Database, tmp_path: Path) -> None:
    url = database.url(Role.OWNER)
    downgrade(alembic_config(url), "base")
    commands = [start_upgrade(url, tmp_path) for _ in range(2)]
    outcomes = [(*command.communicate(timeout=120), command.returncode) for command in commands]
    assert [code for _out, _err, code in outcomes] == [0, 0], outcomes
    ran = sum(err.count("Running upgrade") for _out, err, _code in outcomes)
    assert ran == revisions()


def test_the_command_works_from_any_folder_on_the_configured_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/victus.db"
    command = start_upgrade(url, tmp_path)
    _out, err = command.communicate(timeout=120)
    assert command.returncode == 0, err
    assert not (tmp_path / "chat_history.db").exists()
    engine = create_engine(url, poolclass=pool.NullPool)
    assert "users" in inspect(engine).get_table_names()


def test_the_sql_can_be_printed_for_a_database_administrator(
    capsys: pytest.CaptureFixture[str],
) -> None:
    upgrade(alembic_config("postgresql+psycopg://nobody@nowhere/none"), LEGACY_HEAD, sql=True)
    printed = capsys.readouterr().out
    assert "CREATE TABLE users" in printed
    assert printed.count("COMMIT;") == 4


def make_legacy(url: str, engine: Engine) -> None:
    """As the old release did it: tables from the models, stamped afterwards."""
    legacy_metadata().create_all(engine)
    stamp(alembic_config(url), LEGACY_HEAD)
    insert_rows(engine)


def insert_rows(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO users (email, username) VALUES ('ada@example.org', 'ada')"))
        connection.execute(
            text("INSERT INTO documents (user_id, filename, path) SELECT id, 'plan.pdf', 'uploads/plan.pdf' FROM users")
        )


def start_upgrade(url: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "alembic", "-c", str(ALEMBIC_INI), "upgrade", "head"],
        cwd=folder,
        env={**os.environ, "DATABASE_URL": url, "DATABASE_ADMIN_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def revisions() -> int:
    return len(list(ScriptDirectory.from_config(Config(str(ALEMBIC_INI))).walk_revisions()))
