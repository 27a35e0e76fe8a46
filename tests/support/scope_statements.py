"""The two walls around a user's chunks, each taken away in turn: predicates, and row-level security."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from src.tools import rag_tools
from src.tools.rag_tools import pgvector_store
from src.tools.rag_tools.giants import make_giant
from tests.support import statements
from tests.support.backend import User
from tests.support.database import Database
from tests.support.obedient_model import order
from tests.support.scope import SECRET, TEXT, Attempt, Reach, World
from tests.support.scope_http import Sending
from tests.support.scope_pool import vector_of

WITHOUT_PREDICATE = {
    "SEARCH_GIANT": ("WHERE user_id = %(user_id)s", "WHERE %(user_id)s > 0"),
    "SEARCH": ("WHERE user_id = %(user_id)s", "WHERE %(user_id)s > 0"),
    "INVENTORY": ("WHERE user_id = %s", "WHERE %s > 0"),
    "DOCUMENT": ("WHERE user_id = %s AND", "WHERE %s > 0 AND"),
    "DELETE": ("WHERE user_id = %s AND", "WHERE %s > 0 AND"),
}
"""The statements on `document_chunks` that name a user, and how each loses the predicate."""


def statement_attempts() -> Iterator[Attempt]:
    """Each statement, as the service runs it; the user in the scope is whoever asks."""
    yield Attempt("statements", "GET /api/search", _http)
    yield Attempt("statements", "the agent's search", _agent)
    yield Attempt("statements", "search", _search)
    yield Attempt(
        "statements", "document", lambda world, user: SECRET in str(_store().document(user.id, world.document))
    )
    yield Attempt("statements", "inventory", _inventory)
    yield Attempt("statements", "delete", _delete)


def giant_attempts() -> Iterator[Attempt]:
    """The same where owner and stranger have so many chunks that they are searched in another way."""
    for attempt in statement_attempts():
        yield Attempt("a giant's statements", attempt.name, _as_giants(attempt.reach))


def _as_giants(reach: Reach) -> Reach:
    def among_giants(world: World, user: User) -> bool:
        giants = _store().giants
        with giants.pool.connection() as connection:
            for each in (world.owner, world.stranger):
                make_giant(connection, each.id)
            giants.load(connection)
            try:
                return reach(world, user)
            finally:
                connection.execute("DELETE FROM giant_users")
                giants.load(connection)

    return among_giants


@contextmanager
def without_predicate() -> Iterator[None]:
    """Every statement on the chunks asks for everybody's; the suite's own look at what ran does not count these."""
    broken: list[str] = []
    with pytest.MonkeyPatch.context() as changes:
        for name, (predicate, none) in WITHOUT_PREDICATE.items():
            statement: str = getattr(pgvector_store, name)
            assert predicate in statement, f"{name} has no predicate on user_id"
            broken.append(statement.replace(predicate, none))
            changes.setattr(pgvector_store, name, broken[-1])
        yield
    for statement in broken:
        statements.ran.pop(statement, None)


@contextmanager
def without_row_level_security(database: Database) -> Iterator[None]:
    """The tables let everybody see everything."""
    with psycopg.connect(database.superuser_conninfo(), autocommit=True) as superuser:
        _alter(superuser, "NO FORCE", "DISABLE")
        try:
            yield
        finally:
            _alter(superuser, "ENABLE", "FORCE")


def _alter(superuser: psycopg.Connection[Any], *words: str) -> None:
    for word in words:
        for table in ("document_chunks", "chunk_halves"):
            superuser.execute(f"ALTER TABLE {table} {word} ROW LEVEL SECURITY")


def _store() -> pgvector_store.PgvectorStore:
    return rag_tools.service().pgvector


def _http(world: World, user: User) -> bool:
    return Sending(world, user).shows("GET", "/api/search", params={"q": TEXT, "k": "20"})


def _search(_world: World, user: User) -> bool:
    return SECRET in str(_store().search(user.id, vector_of(TEXT), 9))


def _agent(world: World, user: User) -> bool:
    """The question itself tells the secret, so only what the tool returned is looked at."""
    world.chat(user, order("query_uploaded_documents", query=TEXT))
    return SECRET in world.model.chats[-1].body["messages"][-1]["content"]


def _inventory(world: World, user: User) -> bool:
    return world.document in {row.document_id for row in _store().inventory(user.id)}


def _delete(world: World, user: User) -> bool:
    """Whether the owner's chunks are gone after the user's deletion of them."""
    document = world.upload(world.owner, f"{world.name(world.owner)}.txt", TEXT)
    _store().delete(user.id, document)
    with psycopg.connect(world.database.superuser_conninfo()) as superuser:
        left = superuser.execute("SELECT 1 FROM document_chunks WHERE document_id = %s", (document,)).fetchone()
    return left is None
