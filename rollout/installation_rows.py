"""The relational database of a made installation: `victus.db` at the old release's last revision.

Tables are reflected, not taken from the models: those describe the newest schema, this is the old
one. Rows are written in one transaction, so a process that dies midway leaves an empty schema.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from alembic.config import Config
from sqlalchemy import DateTime, MetaData, Table, create_engine

from alembic import command
from rollout.errors import PreconditionError
from rollout.installation_files import InstallationError

LEGACY_HEAD = "4f95b897a5b8"
OPENED_ON = datetime(2024, 3, 1, 9, tzinfo=UTC)
WINDOW = 12
"""Messages that the old release gave to the model word for word; older ones were summarised."""
FACTS = (
    ("preferred language", "Python"),
    ("time zone", "Europe/Berlin"),
    ("team", "Data platform"),
    ("answer style", "short, with an example"),
    ("naïve question?", "welcome — “always” ☺"),
)

Row = dict[str, Any]
Rows = dict[str, list[Row]]


class SchemaMissingError(InstallationError, PreconditionError):
    """The Alembic scripts are not beside this package."""


def write_database(path: Path, users: Mapping[str, int], documents: Sequence[Row], chance: random.Random) -> None:
    """Make `path` with rows in every table; `documents` hold user_id, filename and path each."""
    url = f"sqlite:///{path}"
    _upgrade(url)
    rows: Rows = {
        "users": [_user(name, user_id) for name, user_id in users.items()],
        "documents": [_document(number, row) for number, row in enumerate(documents, 1)],
    }
    for user_id in users.values():
        _add_conversations(rows, user_id, chance)
        _add_facts(rows, user_id, chance)
    _add_agent_rows(rows, min(users.values()), chance)
    _add_sign_in_rows(rows, max(users.values()), chance)
    _insert(url, rows)


def made_uuid(chance: random.Random) -> uuid.UUID:
    """A version 4 UUID, as uuid4() makes them, that the seed decides."""
    return uuid.UUID(int=chance.getrandbits(128), version=4)


def _upgrade(url: str) -> None:
    script = Path(__file__).resolve().parents[1] / "alembic.ini"
    if not script.is_file():
        raise SchemaMissingError(f"{script} does not exist; make the installation from a checkout of the project")
    config = Config(str(script))
    config.attributes["url"] = url
    command.upgrade(config, LEGACY_HEAD)


def _insert(url: str, rows: Rows) -> None:
    engine = create_engine(url)
    tables = MetaData()
    tables.reflect(engine)
    with engine.begin() as connection:
        for name, values in rows.items():
            table = tables.tables[name]
            moments = _moments(table)
            connection.execute(table.insert(), [{**moments, **value} for value in values])
    engine.dispose()


def _moments(table: Table) -> Row:
    """For the columns that SQLite would set to the time of the insert, which no seed decides."""
    return {
        column.name: OPENED_ON
        for column in table.columns
        if isinstance(column.type, DateTime) and column.server_default is not None
    }


def _user(name: str, user_id: int) -> Row:
    return {
        "id": user_id,
        "email": f"{name}@example.org",
        "username": name,
        "hashed_password": "!",  # no password has this hash
        "full_name": name.title(),
        "is_active": True,
        "is_verified": user_id % 2 == 1,
        "provider": "local",
        "created_at": OPENED_ON + timedelta(days=user_id),
    }


def _document(number: int, row: Row) -> Row:
    return {"id": number, **row, "created_at": OPENED_ON + timedelta(days=10, hours=number)}


def _add_conversations(rows: Rows, user_id: int, chance: random.Random) -> None:
    """Three for each user; the last is long enough to have been summarised."""
    for number, messages in enumerate((chance.randint(2, 6), chance.randint(7, 12), 26)):
        conversation = str(made_uuid(chance))
        begun = OPENED_ON + timedelta(days=20 + number, minutes=chance.randint(0, 600))
        said = list(_messages(conversation, user_id, begun, messages, chance))
        rows.setdefault("messages", []).extend(said)
        rows.setdefault("conversations", []).append(
            {
                "id": conversation,
                "user_id": user_id,
                "title": "New Conversation" if number else f"Reading, part {user_id}",
                "pinned": number == 2,
                "archived": number == 1,
                "created_at": begun,
                "updated_at": said[-1]["created_at"],
                "deleted_at": None if number else said[-1]["created_at"] + timedelta(days=1),
            }
        )
        if messages > WINDOW:
            rows.setdefault("conversation_memories", []).append(
                _memory(conversation, user_id, said[-WINDOW - 1], chance)
            )


def _messages(conversation: str, user_id: int, begun: datetime, count: int, chance: random.Random) -> Iterator[Row]:
    for number in range(count):
        asks = number % 2 == 0
        topic = chance.choice(FACTS)[0]
        yield {
            "id": str(made_uuid(chance)),
            "conversation_id": conversation,
            "user_id": user_id,
            "role": "user" if asks else "assistant",
            "content": f"What do my documents say about “{topic}”?"
            if asks
            else f"Your documents mention “{topic}” on {chance.randint(2, 40)} pages.",
            "token_count": chance.randint(8, 60),
            "metadata_json": None if asks else json.dumps({"model": "gpt-4o-mini"}),
            "created_at": begun + timedelta(minutes=number),
        }


def _memory(conversation: str, user_id: int, last: Row, chance: random.Random) -> Row:
    return {
        "id": str(made_uuid(chance)),
        "conversation_id": conversation,
        "user_id": user_id,
        "summary_text": "The user asked what the uploaded documents say about several topics.",
        "summary_version": 1,
        "summarized_until_message_id": last["id"],
        "summarized_until_created_at": last["created_at"],
        "last_summary_token_estimate": chance.randint(200, 900),
    }


def _add_facts(rows: Rows, user_id: int, chance: random.Random) -> None:
    rows.setdefault("user_facts", []).extend(
        {"user_id": str(user_id), "key": key, "value": value} for key, value in chance.sample(FACTS, 3)
    )


def _add_agent_rows(rows: Rows, user_id: int, chance: random.Random) -> None:
    """What the agent left of one question: its trace, one step, one action that waits."""
    trace = str(made_uuid(chance))
    query = json.dumps({"query": "how are dates parsed?"})
    rows["traces"] = [{"id": trace, "user_id": user_id, "name": "chat", "status": "ok"}]
    rows["trace_steps"] = [
        {
            "trace_id": trace,
            "tool_name": "query_uploaded_documents",
            "args": query,
            "decision": "allowed",
            "output": "Relevant information from documents:\n",
            "duration_ms": 41.5,
        }
    ]
    rows["pending_actions"] = [
        {
            "id": str(made_uuid(chance)),
            "user_id": user_id,
            "tool_name": "send_email",
            "risk_level": "high",
            "args": json.dumps({"to": "team@example.org"}),
            "status": "PENDING",
        }
    ]


def _add_sign_in_rows(rows: Rows, user_id: int, chance: random.Random) -> None:
    """One user who also signs in with Google and a passkey, and once forgot the password."""
    rows["oauth_accounts"] = [
        {
            "id": made_uuid(chance).hex,  # as SQLite holds a UUID
            "user_id": user_id,
            "provider": "google",
            "provider_user_id": str(chance.getrandbits(64)),
            "email": "someone@example.org",
        }
    ]
    rows["passkeys"] = [
        {
            "user_id": user_id,
            "credential_id": made_uuid(chance).hex,
            "public_key": made_uuid(chance).hex,
            "sign_count": 7,
        }
    ]
    rows["password_reset_tokens"] = [
        {
            "user_id": user_id,
            "token_hash": made_uuid(chance).hex,
            "expires_at": OPENED_ON + timedelta(hours=1),
            "used_at": OPENED_ON + timedelta(minutes=5),
        }
    ]
