"""import-sql: every row arrives as it was or is named with the reason; or nothing happened."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.command import downgrade, upgrade

from rollout.errors import PreconditionError, RolloutError
from rollout.import_sql import ImportReport, TargetNotEmptyError, import_sql
from rollout.import_target import ComparisonError, ConnectionBusyError, CopyError, TargetError
from rollout.legacy_rows import TABLES, SetAside
from rollout.legacy_sqlite import (
    AlreadyMovedError,
    MarkError,
    SourceError,
    SourceLockedError,
    SourceSchemaError,
    SourceUrlError,
)
from src import models
from src.database import Role
from tests.support.database import Database
from tests.support.legacy_file import (
    ACCOUNT,
    ADA,
    ARGS,
    BOB,
    LOST_TALK,
    NOON,
    ROWS,
    TALK,
    Legacy,
    loosen,
    make_legacy_file,
)
from tests.support.legacy_schema import ALEMBIC_INI, LEGACY_HEAD, alembic_config

pytestmark = pytest.mark.migration


class FullDisk(sqlite3.Connection):
    """A connection for whose last write there is no room."""

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if statement == "COMMIT":
            raise sqlite3.OperationalError("database or disk is full")
        return super().execute(statement, *values)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_legacy_file(tmp_path_factory.mktemp("legacy") / "victus.db").path


@pytest.fixture
def legacy(filled: Path, tmp_path: Path) -> Legacy:
    """A file as the old release left it: users, unicode, NULs, microseconds, JSON and orphans."""
    copy = tmp_path / "victus.db"
    copy.write_bytes(filled.read_bytes())
    return Legacy(copy)


ASIDE = [
    SetAside("conversations", LOST_TALK, "user_id 40 is not among the users that are moved"),
    SetAside(
        "messages",
        "é",
        f"conversation_id {LOST_TALK} is not among the conversations that are moved",
    ),
    SetAside("documents", "9", "user_id 40 is not among the users that are moved"),
    SetAside("trace_steps", "2", "trace_id no such trace is not among the traces that are moved"),
]
MOVED = {
    "users": 2,
    "conversations": 1,
    "messages": 2,
    "conversation_memories": 1,
    "user_facts": 3,
    "documents": 1,
    "traces": 1,
    "trace_steps": 1,
    "pending_actions": 1,
    "oauth_accounts": 1,
    "passkeys": 1,
    "password_reset_tokens": 1,
}


STALLING_IMPORT = """
import sys
from rollout.import_sql import import_sql

def stall(line):
    if line.startswith("copied messages"):
        print(line, flush=True)
        sys.stdin.read()

import_sql(*sys.argv[1:], execute=True, progress=stall)
"""


def move(legacy: Legacy, database: Database, role: Role = Role.OWNER, **options: Any) -> ImportReport:
    return import_sql(legacy.url, database.conninfo(role), execute=True, lock_wait=0.2, **options)


def ask(database: Database, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(database.conninfo(Role.OWNER)) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        return connection.execute(query.encode()).fetchall()


def order(database: Database, *statements: str) -> None:
    with psycopg.connect(database.conninfo(Role.OWNER)) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def counts(database: Database) -> dict[str, int]:
    return {table.name: ask(database, f"SELECT count(*) FROM {table.name}")[0][0] for table in TABLES}


def nothing_happened(legacy: Legacy, database: Database) -> bool:
    return not any(counts(database).values()) and not legacy.marks


@pytest.mark.parametrize("role", [Role.OWNER, Role.ROLLOUT])
def test_every_row_arrives_or_is_named_with_its_reason(legacy: Legacy, database: Database, role: Role) -> None:
    report = move(legacy, database, role)
    assert report.executed
    assert report.checksums_equal
    assert not report.resumed
    assert {table.table: table.rows for table in report.tables} == MOVED == counts(database)
    assert report.rows == sum(MOVED.values())
    assert list(report.set_aside) == ASIDE


def test_values_arrive_with_their_types(legacy: Legacy, database: Database) -> None:
    move(legacy, database)
    users = ask(
        database,
        "SELECT email, username, hashed_password, is_active, is_verified, created_at, last_login"
        " FROM users ORDER BY id",
    )
    assert users[0] == ("ada@example.org", "ada", None, True, True, NOON, NOON)
    assert users[1][1:5] == ("bób 🦉", None, False, False)
    content, metadata = ask(database, "SELECT content, metadata_json FROM messages WHERE id = 'm1'")[0]
    assert content == ROWS[models.Message][0]["content"]
    assert json.loads(metadata) == json.loads(ARGS)
    assert ask(database, "SELECT id FROM oauth_accounts") == [(ACCOUNT,)]
    assert ask(database, "SELECT duration_ms FROM trace_steps") == [(12.625,)]
    assert ask(database, "SELECT user_id FROM user_facts ORDER BY id")[1] == ("default_user",)


def test_moved_documents_are_ready(legacy: Legacy, database: Database) -> None:
    move(legacy, database)
    assert ask(database, "SELECT id, status, error, deleted_at FROM documents") == [(2, "ready", None, None)]


def test_nul_becomes_a_space_and_is_counted(legacy: Legacy, database: Database) -> None:
    report = move(legacy, database)
    assert ask(database, f"SELECT full_name FROM users WHERE id = {ADA}") == [("Ada Lovelace née Byron",)]
    assert ask(database, "SELECT title FROM conversations") == [(" ",)]
    repaired = {table.table: table.repaired for table in report.tables if table.repaired}
    assert repaired == {"users": 1, "conversations": 1}


def test_text_that_is_not_utf_8_is_repaired_and_counted(legacy: Legacy, database: Database) -> None:
    legacy.run("UPDATE user_facts SET value = CAST(x'4772fc6e' AS TEXT) WHERE id = 5")
    report = move(legacy, database)
    assert ask(database, "SELECT value FROM user_facts WHERE id = 5") == [("Gr\ufffdn",)]
    assert report.tables[4].repaired == 1


def test_null_takes_the_default_where_the_new_schema_needs_a_value(legacy: Legacy, database: Database) -> None:
    loosen(legacy, "users", "is_verified BOOLEAN DEFAULT 0 NOT NULL", "is_verified BOOLEAN")
    legacy.run("UPDATE users SET is_verified = NULL")
    report = move(legacy, database)
    assert report.tables[0].defaulted == 2
    assert ask(database, "SELECT DISTINCT is_verified FROM users") == [(False,)]


@pytest.mark.parametrize(
    ("statement", "aside"),
    [
        (
            f"UPDATE users SET created_at = 'yesterday' WHERE id = {BOB}",
            SetAside("users", str(BOB), "created_at is 'yesterday', not a date and time"),
        ),
        (
            "UPDATE messages SET token_count = 3000000000 WHERE id = 'M2'",
            SetAside("messages", "M2", "token_count is 3000000000, not an integer of 32 bits"),
        ),
        (
            "UPDATE conversations SET pinned = 'maybe'",
            SetAside("conversations", TALK, "pinned is 'maybe', not true or false"),
        ),
        (
            "UPDATE oauth_accounts SET id = 'x'",
            SetAside("oauth_accounts", "x", "id is 'x', not a UUID"),
        ),
    ],
)
def test_a_value_that_its_column_cannot_hold_sets_its_row_aside(
    legacy: Legacy, database: Database, statement: str, aside: SetAside
) -> None:
    legacy.run(statement)
    assert aside in move(legacy, database).set_aside


def test_a_uuid_with_dashes_is_the_same_uuid(legacy: Legacy, database: Database) -> None:
    earlier = uuid.UUID(int=ACCOUNT.int - 1)
    legacy.run(
        "INSERT INTO oauth_accounts (id, user_id, provider, provider_user_id) VALUES (?, ?, 'microsoft', '7')",
        (str(earlier).upper(), ADA),
    )
    move(legacy, database)
    assert ask(database, "SELECT id FROM oauth_accounts ORDER BY id") == [(earlier,), (ACCOUNT,)]


def test_new_ids_are_beyond_everything_that_was_ever_named(legacy: Legacy, database: Database) -> None:
    """A new user must not become the one whose facts or documents were left behind."""
    move(legacy, database)
    order(
        database,
        "INSERT INTO users (email, username) VALUES ('new@example.org', 'new')",
        "INSERT INTO documents (user_id, filename, path) VALUES (3, 'a', 'a')",
        "INSERT INTO passkeys (user_id, credential_id, public_key) VALUES (3, 'new', 'pk')",
    )
    assert ask(database, "SELECT max(id) FROM users") == [(42,)]
    assert ask(database, "SELECT max(id) FROM documents") == [(10,)]
    assert ask(database, "SELECT max(id) FROM passkeys") == [(2,)]


def test_a_dry_run_tells_the_same_and_changes_nothing(legacy: Legacy, database: Database) -> None:
    before = legacy.path.read_bytes()
    dry = import_sql(legacy.url, database.conninfo(Role.OWNER))
    assert not dry.executed
    assert not dry.checksums_equal
    assert dry.problems == ()
    assert nothing_happened(legacy, database)
    assert legacy.path.read_bytes() == before
    assert dry.tables == move(legacy, database).tables


def test_a_dry_run_needs_no_maintenance_window(legacy: Legacy, database: Database) -> None:
    with closing(sqlite3.connect(legacy.path, isolation_level=None)) as backend:
        backend.execute("BEGIN IMMEDIATE")
        assert import_sql(legacy.url, database.conninfo(Role.OWNER), lock_wait=0.2).rows


def test_a_dry_run_names_what_would_be_refused(legacy: Legacy, database: Database) -> None:
    order(database, "INSERT INTO users (email, username) VALUES ('x@example.org', 'x')")
    [problem] = import_sql(legacy.url, database.conninfo(Role.OWNER)).problems
    assert "users (1)" in problem


def test_progress_and_duration_are_told(legacy: Legacy, database: Database) -> None:
    told: list[str] = []
    ticks = iter((100.0, 107.5))
    report = move(legacy, database, progress=told.append, clock=lambda: next(ticks))
    assert report.seconds == 7.5
    assert told[0] == "copied users: 2 rows"
    assert told[2] == "copied messages: 2 rows, 1 set aside"
    assert told[-1] == "compared 12 tables: the same in both databases"


def test_the_file_says_where_its_data_went_and_is_not_moved_twice(legacy: Legacy, database: Database) -> None:
    secret = psycopg.conninfo.make_conninfo(database.conninfo(Role.OWNER), password="s3cret")
    report = import_sql(legacy.url, secret, execute=True, now=lambda: NOON)
    assert legacy.marks == [(NOON.isoformat(), report.target)]
    assert database.name in report.target
    assert "s3cret" not in report.target
    for execute in (True, False):
        with pytest.raises(AlreadyMovedError) as refusal:
            import_sql(legacy.url, secret, execute=execute)
        assert database.name in str(refusal.value)
        assert NOON.isoformat() in str(refusal.value)


def test_a_connection_may_be_handed_over_and_stays_open(legacy: Legacy, database: Database) -> None:
    with psycopg.connect(database.conninfo(Role.ROLLOUT), autocommit=True) as connection:
        assert import_sql(legacy.url, connection, execute=True).checksums_equal
        assert connection.execute("SELECT count(*) FROM users").fetchone() == (2,)


def test_a_connection_inside_a_transaction_is_refused(legacy: Legacy, database: Database) -> None:
    with psycopg.connect(database.conninfo(Role.OWNER)) as connection:
        connection.execute("SELECT 1")
        with pytest.raises(ConnectionBusyError):
            import_sql(legacy.url, connection, execute=True)


def test_a_failure_in_the_middle_leaves_both_as_they_were(legacy: Legacy, database: Database) -> None:
    trigger(database, "traces", "RAISE EXCEPTION 'no more'")
    with pytest.raises(CopyError, match=r"traces: no more"):
        move(legacy, database)
    assert nothing_happened(legacy, database)
    order(database, "DROP TRIGGER meddle ON traces")
    assert move(legacy, database).checksums_equal


def test_what_postgresql_changes_on_the_way_fails_the_comparison(legacy: Legacy, database: Database) -> None:
    trigger(database, "messages", "NEW.content = NEW.content || ' '; RETURN NEW")
    with pytest.raises(ComparisonError, match=r"messages: 2 rows"):
        move(legacy, database)
    assert nothing_happened(legacy, database)


def test_what_postgresql_drops_on_the_way_fails_the_comparison(legacy: Legacy, database: Database) -> None:
    trigger(database, "password_reset_tokens", "RETURN NULL")
    with pytest.raises(ComparisonError, match=r"password_reset_tokens: 0 rows"):
        move(legacy, database)
    assert nothing_happened(legacy, database)


def test_two_rows_with_one_unique_value_are_refused_by_name(legacy: Legacy, database: Database) -> None:
    loosen(legacy, "passkeys", "UNIQUE (credential_id)", "CHECK (1)")
    legacy.run("INSERT INTO passkeys (user_id, credential_id, public_key) VALUES (8, 'cred', 'k')")
    with pytest.raises(CopyError, match="passkeys_credential_id_key"):
        move(legacy, database)
    assert nothing_happened(legacy, database)


def test_a_run_that_died_before_the_mark_is_finished_by_the_next(
    legacy: Legacy, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("rollout.legacy_sqlite.LegacySqlite.commit", die)
        with pytest.raises(SystemExit):
            move(legacy, database)
    assert counts(database) == MOVED
    assert legacy.marks == []
    report = move(legacy, database)
    assert report.resumed
    assert report.checksums_equal
    assert len(legacy.marks) == 1
    assert counts(database) == MOVED


def test_a_mark_that_cannot_be_written_is_told_and_set_by_the_next_run(
    legacy: Legacy, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("sqlite3.connect", partial(sqlite3.connect, factory=FullDisk))
        with pytest.raises(MarkError, match="run the same command again"):
            move(legacy, database)
    assert legacy.marks == []
    assert counts(database) == MOVED
    assert move(legacy, database).resumed


def test_rows_of_somebody_else_are_never_mixed_with(legacy: Legacy, database: Database) -> None:
    order(
        database,
        "INSERT INTO users (id, email, username) VALUES (3, 'eve@example.org', 'eve')",
        "INSERT INTO user_facts (user_id, key) VALUES ('3', 'a'), ('3', 'b')",
    )
    with pytest.raises(TargetNotEmptyError, match=r"users \(1\), user_facts \(2\)"):
        move(legacy, database)
    assert legacy.marks == []
    assert counts(database) == {**dict.fromkeys(MOVED, 0), "users": 1, "user_facts": 2}


def test_a_target_that_is_not_at_head_is_refused(legacy: Legacy, database: Database) -> None:
    config = alembic_config(database.url(Role.OWNER))
    downgrade(config, LEGACY_HEAD)
    with pytest.raises(TargetError, match="alembic upgrade head"):
        move(legacy, database)
    downgrade(config, "base")
    order(database, "DROP TABLE alembic_version")
    with pytest.raises(TargetError, match="no revision"):
        move(legacy, database)
    assert legacy.marks == []


def test_a_target_that_somebody_writes_to_is_refused(legacy: Legacy, database: Database) -> None:
    with psycopg.connect(database.conninfo(Role.OWNER)) as backend:
        backend.execute("INSERT INTO users (email, username) VALUES ('b@example.org', 'b')")
        with pytest.raises(TargetError, match="stop the backend"):
            move(legacy, database)
        backend.rollback()
    assert nothing_happened(legacy, database)


def test_a_target_that_is_away_is_told(legacy: Legacy, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="PostgreSQL is away"):
        import_sql(legacy.url, f"host={tmp_path} dbname=none", execute=True)
    assert legacy.marks == []


def test_a_role_that_may_not_write_is_refused(legacy: Legacy, database: Database) -> None:
    order(database, "REVOKE INSERT ON users FROM victus_rollout")
    with pytest.raises(TargetError, match="connect as the owner"):
        move(legacy, database, Role.ROLLOUT)
    assert nothing_happened(legacy, database)


def test_a_file_in_use_by_the_old_release_is_refused(legacy: Legacy, database: Database) -> None:
    with closing(sqlite3.connect(legacy.path, isolation_level=None)) as backend:
        backend.execute("BEGIN IMMEDIATE")
        with pytest.raises(SourceLockedError, match="stop the old release"):
            move(legacy, database)
    assert nothing_happened(legacy, database)


def test_nobody_writes_to_either_database_meanwhile(legacy: Legacy, database: Database) -> None:
    def meddle(_line: str) -> None:
        with (
            closing(sqlite3.connect(legacy.path, timeout=0)) as old,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            old.execute("DELETE FROM users")
        with (
            database.connect(Role.APP, options="-c lock_timeout=10ms") as new,
            pytest.raises(psycopg.errors.LockNotAvailable),
        ):
            new.execute("INSERT INTO users (email, username) VALUES ('m@example.org', 'm')")

    assert move(legacy, database, progress=meddle).checksums_equal


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("victus.db", SourceUrlError),
        ("postgresql://localhost/victus", SourceUrlError),
        ("sqlite://", SourceUrlError),
        ("sqlite:///:memory:", SourceUrlError),
        ("sqlite:////nowhere/victus.db", SourceError),
    ],
)
def test_a_source_that_is_no_file_is_refused(url: str, error: type[RolloutError]) -> None:
    with pytest.raises(error) as refusal:
        import_sql(url, "never used")
    assert refusal.value.exit_code == (2 if error is SourceUrlError else 5)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "victus.db"
    other.write_bytes(b"%PDF-1.7\n" * 1000)
    with pytest.raises(SourceError, match="no SQLite database"):
        import_sql(f"sqlite:///{other}", "never used")
    other.write_bytes(b"")
    with pytest.raises(SourceSchemaError, match="lacks users, conversations"):
        import_sql(f"sqlite:///{other}", "never used")


def test_a_damaged_file_is_refused(legacy: Legacy) -> None:
    [(page,)] = legacy.run("SELECT rootpage FROM sqlite_schema WHERE name = 'users'")
    [(size,)] = legacy.run("PRAGMA page_size")
    with legacy.path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(SourceError, match="damaged"):
        import_sql(legacy.url, "never used")


@pytest.mark.parametrize("revision", ["ec4f65823ae4", "head"])
def test_another_revision_is_refused_with_the_way_to_the_right_one(legacy: Legacy, revision: str) -> None:
    config = alembic_config(legacy.url)
    (downgrade if revision != "head" else upgrade)(config, revision)
    with pytest.raises(SourceSchemaError, match=f"alembic upgrade {LEGACY_HEAD}") as refusal:
        import_sql(legacy.url, "never used")
    assert refusal.value.exit_code == PreconditionError.exit_code


def test_a_file_without_a_stamp_is_taken_if_its_tables_match(legacy: Legacy, database: Database) -> None:
    legacy.run("DROP TABLE alembic_version")
    assert move(legacy, database).checksums_equal


def test_a_file_without_a_stamp_is_refused_if_its_tables_differ(legacy: Legacy) -> None:
    legacy.run("DROP TABLE alembic_version")
    legacy.run("DROP TABLE passkeys")
    legacy.run("ALTER TABLE traces DROP COLUMN status")
    with pytest.raises(SourceSchemaError, match=r"lacks passkeys, traces.status"):
        import_sql(legacy.url, "never used")


def test_what_the_old_schema_does_not_have_is_named_as_left_behind(legacy: Legacy, database: Database) -> None:
    legacy.run("CREATE TABLE notes (id INTEGER)")
    legacy.run("ALTER TABLE users ADD COLUMN nickname TEXT")
    report = move(legacy, database)
    assert report.left_behind == ("table notes", "column users.nickname")


@pytest.mark.parametrize("execute", [False, True])
def test_a_file_in_wal_mode_is_read_with_what_is_only_in_the_log(
    legacy: Legacy, database: Database, execute: bool
) -> None:
    with closing(sqlite3.connect(legacy.path, isolation_level=None)) as backend:
        backend.execute("PRAGMA journal_mode = WAL")
        backend.execute("INSERT INTO users (id, email, username) VALUES (9, 'w', 'w')")
        report = import_sql(legacy.url, database.conninfo(Role.OWNER), execute=execute)
    assert report.tables[0].rows == 3
    assert len(legacy.marks) == execute


def test_a_killed_import_leaves_both_as_they_were(legacy: Legacy, database: Database) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", STALLING_IMPORT, legacy.url, database.conninfo(Role.OWNER)],
        cwd=ALEMBIC_INI.parent,
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with command:
        assert command.stdout is not None
        assert command.stdout.readline() == b"copied messages: 2 rows, 1 set aside\n"
        command.kill()
    assert nothing_happened(legacy, database)
    assert import_sql(legacy.url, database.conninfo(Role.OWNER), execute=True).checksums_equal


def trigger(database: Database, table: str, body: str) -> None:
    order(
        database,
        f"CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN {quoted(body)}; END'",
        f"CREATE TRIGGER meddle BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION meddle()",
    )


def quoted(body: str) -> str:
    return body.replace("'", "''")


def die(_source: object) -> None:
    raise SystemExit("killed")
