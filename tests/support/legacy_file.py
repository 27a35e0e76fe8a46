"""A legacy SQLite file with what real ones have: unicode, NULs, microseconds, JSON, orphans."""

from __future__ import annotations

import json
import sqlite3
import uuid
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from alembic.command import upgrade
from sqlalchemy import create_engine, insert, pool

from src import models
from tests.support.legacy_schema import LEGACY_HEAD, alembic_config, legacy_metadata

NOON = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC)
ADA, BOB, GONE = 3, 8, 40
TALK, LOST_TALK, TRACE = (str(uuid.UUID(int=n)) for n in (1, 2, 3))
ACCOUNT = uuid.UUID("0c6cf2a0-6b6c-4f7e-9a56-9d9f6f0f3a51")
ARGS = json.dumps({"query": "naïve “quotes”\\n", "k": [1, 2.5, None]})


@dataclass(frozen=True)
class Legacy:
    """A legacy SQLite file, and SQL on it behind the models' back."""

    path: Path

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"

    def run(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.path)) as connection, connection:
            return connection.execute(statement, values).fetchall()

    @property
    def marks(self) -> list[tuple[Any, ...]]:
        exists = self.run("SELECT count(*) FROM sqlite_schema WHERE name = 'victus_moved'")
        return self.run("SELECT * FROM victus_moved") if exists == [(1,)] else []


def make_legacy_file(path: Path) -> Legacy:
    """Made by Alembic, filled with ROWS; as in the old release, no foreign key is enforced."""
    legacy = Legacy(path)
    upgrade(alembic_config(legacy.url), LEGACY_HEAD)
    engine = create_engine(legacy.url, poolclass=pool.NullPool)
    tables = legacy_metadata().tables
    with engine.begin() as connection:
        for model, rows in ROWS.items():
            for row in rows:
                connection.execute(insert(tables[model.__tablename__]).values(**row))
    return legacy


def loosen(legacy: Legacy, table: str, before: str, after: str) -> None:
    """Makes the file one whose tables were declared more loosely; the rows stay."""
    [(declared,)] = legacy.run("SELECT sql FROM sqlite_schema WHERE name = ?", (table,))
    assert before in declared
    names = ", ".join(name for _, name, *_rest in legacy.run(f"PRAGMA table_info({table})"))
    looser = declared.replace(f"CREATE TABLE {table}", "CREATE TABLE looser")
    legacy.run(looser.replace(before, after))
    legacy.run(f"INSERT INTO looser ({names}) SELECT {names} FROM {table}")
    legacy.run(f"DROP TABLE {table}")
    legacy.run(f"ALTER TABLE looser RENAME TO {table}")


ROWS: dict[Any, list[dict[str, Any]]] = {
    models.User: [
        {
            "id": ADA,
            "email": "ada@example.org",
            "username": "ada",
            "hashed_password": None,
            "full_name": "Ada Lovelace\0née Byron",
            "is_active": True,
            "is_verified": True,
            "provider": "google",
            "created_at": NOON,
            "last_login": NOON.astimezone(timezone(timedelta(hours=-7))),
        },
        {"id": BOB, "email": "bob@example.org", "username": "bób 🦉", "is_active": False},
    ],
    models.Conversation: [
        {"id": TALK, "user_id": ADA, "title": "\0", "pinned": True, "deleted_at": NOON},
        {"id": LOST_TALK, "user_id": GONE, "created_at": NOON},
    ],
    models.Message: [
        {
            "id": "m1",
            "conversation_id": TALK,
            "user_id": ADA,
            "role": "user",
            "content": "line 1\nline\t2 \\N \\. \u2028 漢字 'quoted' \"double\"",
            "token_count": 0,
            "metadata_json": ARGS,
        },
        {
            "id": "M2",
            "conversation_id": TALK,
            "user_id": BOB,
            "role": "assistant",
            "content": "",
        },
        {
            "id": "é",
            "conversation_id": LOST_TALK,
            "user_id": ADA,
            "role": "tool",
            "content": "its conversation was set aside",
        },
    ],
    models.ConversationMemory: [
        {
            "id": "c1",
            "conversation_id": TALK,
            "user_id": ADA,
            "summary_text": "short",
            "summary_version": 4,
            "summarized_until_message_id": "m1",
            "summarized_until_created_at": NOON,
        }
    ],
    models.UserFact: [
        {"id": 5, "user_id": str(ADA), "key": "city", "value": "Łódź"},
        {"id": 6, "user_id": "default_user", "key": "city", "value": "Graz"},
        {"id": 7, "user_id": "41", "key": "city", "value": "of a user who is gone"},
    ],
    models.Document: [
        {"id": 2, "user_id": ADA, "filename": "plan.pdf", "path": "uploads/plan.pdf"},
        {"id": 9, "user_id": GONE, "filename": "plan.pdf", "path": "uploads/plan.pdf"},
    ],
    models.Trace: [{"id": TRACE, "user_id": None, "name": "ask", "metadata_json": "{}"}],
    models.TraceStep: [
        {"id": 1, "trace_id": TRACE, "tool_name": "search", "args": ARGS, "duration_ms": 12.625},
        {"id": 2, "trace_id": "no such trace", "tool_name": "search"},
    ],
    models.PendingAction: [{"id": "a1", "user_id": ADA, "tool_name": "mail", "args": ARGS}],
    models.OAuthAccount: [{"id": ACCOUNT, "user_id": ADA, "provider": "google", "provider_user_id": "108"}],
    models.Passkey: [{"id": 1, "user_id": BOB, "credential_id": "cred", "public_key": "pk", "sign_count": 17}],
    models.PasswordResetToken: [{"id": 3, "user_id": BOB, "token_hash": "hash", "expires_at": NOON}],
}
