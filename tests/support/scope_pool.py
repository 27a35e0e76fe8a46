"""Attempts on one connection of the pool, which the owner has just used: again and again, as whoever gets it next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np

from src.database import Role
from src.tools import rag_tools
from src.tools.rag_tools.pgvector_store import PgvectorStore, open_pool
from src.tools.rag_tools.store import StoreError, Vector
from tests.support.backend import User
from tests.support.scope import QUESTION, SECRET, Attempt, World

BEFORE: dict[str, Callable[[PgvectorStore, int, Vector], object]] = {
    "searched": lambda store, owner, vector: store.search(owner, vector, 3),
    "listed": lambda store, owner, _vector: list(store.inventory(owner)),
    "listed half": lambda store, owner, _vector: next(iter(store.inventory(owner))),
    "deleted": lambda store, owner, _vector: store.delete(owner, 2**31 - 1),
    "failed": lambda store, owner, _vector: _failed(store, owner),
}
ASKED: dict[str, Callable[[PgvectorStore, World, int, Vector], str]] = {
    "search": lambda store, _world, user, vector: str(store.search(user, vector, 50)),
    "document": lambda store, world, user, _vector: str(store.document(user, world.document)),
    "inventory": lambda store, world, user, _vector: "".join(
        SECRET for row in store.inventory(user) if row.document_id == world.document
    ),
    "without predicate": lambda store, _world, user, _vector: _everything(store, user),
    "without scope": lambda store, world, user, _vector: (
        _everything(store, user) if user == world.owner.id else _without_scope(store)
    ),
}
SCOPED = [name for name in ASKED if not name.startswith("without")]
"""Those that name the user in the statement itself."""
ROUNDS = 6
"""Beyond psycopg's threshold for preparing a statement."""


def pool_attempts(questions: Sequence[str] = tuple(ASKED)) -> Iterator[Attempt]:
    """Each question on the connection that the owner has just used, again and again."""
    for before_name, before in BEFORE.items():
        for question in questions:
            name = f"{question} after the owner {before_name}"
            yield Attempt("another's connection", name, _pooled(before, ASKED[question]))


def _pooled(
    before: Callable[[PgvectorStore, int, Vector], object], asked: Callable[[PgvectorStore, World, int, Vector], str]
) -> Callable[[World, User], bool]:
    def reach(world: World, user: User) -> bool:
        vector = vector_of(QUESTION)
        with open_pool(world.database.conninfo(Role.APP), 1, name="one") as pool:
            store, heard = PgvectorStore(pool), []
            for _ in range(ROUNDS):
                before(store, world.owner.id, vector)
                heard.append(SECRET in asked(store, world, user.id, vector))
        return any(heard) if user is world.stranger else all(heard)

    return reach


def vector_of(text: str) -> Vector:
    return np.array(rag_tools.service().embeddings.embed_query(text), np.float32)


def _failed(store: PgvectorStore, owner: int) -> None:
    with suppress(StoreError), store.transaction(owner) as connection:
        connection.execute("SELECT 1 / 0")


def _without_scope(store: PgvectorStore) -> str:
    with store.pool.connection() as connection:
        return str(connection.execute("SELECT content FROM document_chunks").fetchall())


def _everything(store: PgvectorStore, user: int) -> str:
    """What a statement without the predicate sees, in the user's scope."""
    with store.transaction(user) as connection:
        return str(connection.execute("SELECT content FROM document_chunks").fetchall())
