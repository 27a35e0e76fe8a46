"""Attempts that need both stores: each store asked directly, the ways round a store, and legacy chunks.

They go with FAISS.
"""

from __future__ import annotations

import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings

from src.tools import rag_tools
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from src.tools.rag_tools.migration.targeting import bucket
from src.tools.rag_tools.store import StoreError, Vector
from src.utils.context import acting_as
from tests.support.backend import User
from tests.support.obedient_model import order
from tests.support.routers import set_stage
from tests.support.scope import QUESTION, SECRET, TEXT, Attempt, Reach, World
from tests.support.scope_context import TOOLS, context_attempts
from tests.support.scope_http import ACTS, Sending, id_attempts, named_attempts
from tests.support.scope_names import name_attempts
from tests.support.scope_pool import vector_of

SOME = -1
"""Between the places of the owner and of the stranger on the ramp: each is served by another store."""
STAGES = [(stage, percent) for stage in Stage for percent in ((0, SOME, 100) if stage is Stage.LIVE else (0,))]
LEGACY = 2 * 3 * len(STAGES)
"""One for each run of an attempt that assigns one."""
DOCUMENT = """
INSERT INTO documents (user_id, filename, path, status, created_at, updated_at)
VALUES (%s, 'legacy.txt', '', 'ready', now(), now()) RETURNING id
"""
ASSIGN = """
INSERT INTO legacy_chunks (docstore_id, position, source, document_id, user_id, ordinal, status, reason)
VALUES (%s, %s, 'uploads/legacy.txt', %s, %s, 0, 'assigned', 'path')
"""
LEDGER = """
INSERT INTO vector_ledger (document_id, store, user_id, wanted, state, next_attempt_at)
VALUES (%s, 'faiss', %s, 'present', 'done', now()), (%s, 'pgvector', %s, 'present', 'owed', now())
"""
OWE = (
    "UPDATE vector_ledger SET state = %s, next_attempt_at = 'infinity' WHERE user_id = ANY (%s) AND wanted = 'present'"
)


def service() -> Router:
    return rag_tools.service()


def to_stage(world: World, stage: Stage, percent: int) -> None:
    """The next transition, on which the backend then acts; both stores have what they should have in it."""
    places = [bucket(user.id) for user in (world.owner, world.stranger)]
    with world.database.connect(autocommit=True) as connection:
        set_stage(connection, stage, round(sum(places) / 2) if percent == SOME else percent)
    service().breaker.succeeded()
    refresh()
    settle()
    if percent == SOME:
        view = service().flags.view()
        assert {view.serving(user.id) for user in (world.owner, world.stranger)} == set(Store)


def refresh() -> None:
    """Twice: what is adopted by the first poll is reported by the second."""
    service().refresh()
    service().refresh()


def settle() -> None:
    service().settler.run(at_once=True)
    refresh()


# -- the attempts of every stage


def stage_attempts(schema: dict[str, Any], stage: Stage) -> Iterator[Attempt]:
    """Those that reach a store, by whatever way the stage goes."""
    for attempt in (*id_attempts(schema), *named_attempts(schema)):
        if attempt.name.startswith(("GET /api/search", "GET /api/documents/")):
            yield attempt
    yield from (one for one in context_attempts() if one.name.startswith("query_uploaded_documents"))
    for attempt in name_attempts():
        if attempt.kind == "names: question" or attempt.name.startswith(("plain,", "path,")):
            yield attempt
    yield from agent_attempts()
    yield from store_attempts()
    yield from _within("both stores owe", both_owe, _routed()) if len(ROUTING[stage].writes) == 2 else ()
    if Stage.OFF is not stage is not Stage.COMPLETE:
        yield from _within("pgvector away", pgvector_away, _routed())
        yield from _within("FAISS away", faiss_away, _routed())
    for store in ROUTING[stage].writes:
        yield Attempt("an owner is assigned", f"to a legacy chunk while {store} is searched", _assigned(store))
    yield Attempt("an owner is assigned", "to a legacy chunk during searches", _assigned(None))


def agent_attempts() -> Iterator[Attempt]:
    for name in ("user_id", "document_id"):
        yield Attempt("prompt in chat", f"query_uploaded_documents with {name}", _told(name))


def store_attempts() -> Iterator[Attempt]:
    """Each store asked directly, in the user's name, for the owner's."""
    for store in Store:
        for k in (1, 3, 50, 10_000):
            yield Attempt("a store", f"{store}: the nearest {k}", _searched(store, k))
        yield Attempt("a store", f"{store}: inventory", _inventory(store))
        yield Attempt("a store", f"{store}: the document", _copied(store))
    for k in (1, 50):
        both = tuple(Store)
        yield Attempt("a store", f"both: the nearest {k}", _merged(both, k))


def _told(name: str) -> Reach:
    def reach(world: World, user: User) -> bool:
        said = order("query_uploaded_documents", query=QUESTION, **{name: world.owner.id})
        return SECRET in world.chat(user, said)

    return reach


def _searched(store: Store, k: int) -> Reach:
    return lambda _world, user: SECRET in str(service().stores[store].search(user.id, vector_of(QUESTION), k))


def _merged(stores: Sequence[Store], k: int) -> Reach:
    return lambda _world, user: (
        SECRET in str(service().stores.search(stores, user.id, vector_of(QUESTION), k, frozenset()))
    )


def _inventory(store: Store) -> Reach:
    return lambda world, user: world.document in {row.document_id for row in service().stores[store].inventory(user.id)}


def _copied(store: Store) -> Reach:
    return lambda world, user: SECRET in str(service().stores.copy_of(store, user.id, world.document))


def _routed() -> dict[str, Reach]:
    """A question as a user asks it, by whichever way."""
    return {
        "GET /api/search": lambda world, user: ACTS["GET", "/api/search"](Sending(world, user)),
        "query_uploaded_documents": _tool,
        "search": lambda _world, user: SECRET in str(service().search(user.id, vector_of(QUESTION), 50)),
    }


def _tool(world: World, user: User) -> bool:
    with acting_as(user.id):
        return SECRET in TOOLS["query_uploaded_documents"](world)


# -- a store away, or owing


def _within(what: str, state: Callable[[World], Any], reaches: dict[str, Reach]) -> Iterator[Attempt]:
    for name, reach in reaches.items():
        yield Attempt(what, name, _in_state(state, reach))


def _in_state(state: Callable[[World], Any], reach: Reach) -> Reach:
    def held(world: World, user: User) -> bool:
        with state(world):
            return reach(world, user)

    return held


@contextmanager
def both_owe(world: World) -> Iterator[None]:
    """Both stores owe both users something, so both are asked and their answers merged."""
    users = [world.owner.id, world.stranger.id]
    with world.database.connect(autocommit=True) as connection:
        connection.execute(OWE, ("owed", users))
        refresh()
        try:
            view = service().flags.view()
            assert all(view.reads(user) == tuple(Store) for user in users)
            yield
        finally:
            connection.execute(OWE, ("done", users))
            refresh()


@contextmanager
def pgvector_away(world: World) -> Iterator[None]:
    with world.database.connect(autocommit=True) as connection:
        connection.execute("REVOKE SELECT ON document_chunks FROM victus_app")
        try:
            yield
        finally:
            connection.execute("GRANT SELECT ON document_chunks TO victus_app")
            service().breaker.succeeded()


@contextmanager
def faiss_away(_world: World) -> Iterator[None]:
    """The journal cannot be read; a real one that is broken would stay so."""

    def away() -> int:
        raise StoreError("the journal cannot be read")

    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(service().stores.faiss.journal, "position", away)
        yield


# -- legacy chunks, nobody's until an owner is assigned


class _Wordless(Embeddings):
    """Vectors are given with the texts."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        raise NotImplementedError

    def embed_query(self, text: str) -> list[float]:
        raise NotImplementedError


def legacy_text(number: int) -> str:
    return f"{TEXT} Legacy note number {number}."


def legacy_name(number: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"legacy {number}"))


def write_legacy_index(directory: Path, vectors: Any) -> None:
    """An index as the old release left it, with a chunk for each of the vectors."""
    with warnings.catch_warnings():
        # It announces at import that it is no longer maintained.
        warnings.simplefilter("ignore", DeprecationWarning)
        from langchain_community.vectorstores import FAISS
    pairs = [(legacy_text(number), row.tolist()) for number, row in enumerate(vectors)]
    sources = [{"source": "uploads/legacy.txt"} for _ in pairs]
    names = [legacy_name(number) for number in range(len(pairs))]
    FAISS.from_embeddings(pairs, _Wordless(), metadatas=sources, ids=names).save_local(str(directory))


_numbers = iter(range(10_000))


def _assigned(store: Store | None) -> Reach:
    """The next legacy chunk becomes the owner's while the user searches for exactly its text."""

    def reach(world: World, user: User) -> bool:
        number = next(_numbers)
        vector = vector_of(legacy_text(number))
        found = _searching(store, user.id, vector, number)
        assert not found(), "a legacy chunk is served before it is anybody's"
        seen, stop = list[bool](), threading.Event()

        def search() -> None:
            while not stop.is_set():
                seen.append(found())

        thread = threading.Thread(target=search)
        thread.start()
        try:
            _assign(world, number)
            refresh()
            settle()
        finally:
            stop.set()
            thread.join(30)
        return found() or (user is world.stranger and any(seen))

    return reach


def _searching(store: Store | None, user_id: int, vector: Vector, number: int) -> Callable[[], bool]:
    asked = service() if store is None else service().stores[store]
    return lambda: legacy_text(number) in [hit.content for hit in asked.search(user_id, vector, 20)]


def _assign(world: World, number: int) -> None:
    owner = world.owner.id
    with world.database.connect() as connection:
        (document,) = connection.execute(DOCUMENT, (owner,)).fetchone() or (0,)
        connection.execute(ASSIGN, (legacy_name(number), number, document, owner))
        connection.execute(LEDGER, (document, owner, document, owner))
        connection.execute("INSERT INTO owner_assignments (actor, counts) VALUES ('test', '{}')")
