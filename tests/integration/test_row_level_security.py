"""A user's chunks are the user's alone, twice over: with the predicate gone, and with row-level security gone."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import psycopg
import pytest
from pgvector.psycopg import register_vector
from psycopg_pool import PoolTimeout

from src.database import Role
from src.tools.rag_tools import pgvector_store
from src.tools.rag_tools.documents import Documents
from src.tools.rag_tools.pgvector_store import (
    PgvectorStore,
    Pool,
    RoleError,
    SchemaError,
    check_role,
    insert_chunks,
    open_pool,
)
from src.tools.rag_tools.store import Chunk, StoreError, Vector, chunk_id
from tests.support.embeddings import HashEmbeddings

ANN, BOB = 1, 2
ANNS_DOCUMENT, BOBS_DOCUMENT = 10, 20
SECRET = "Bob's account number is 4711."
ALL = "SELECT user_id, content FROM document_chunks ORDER BY user_id, ordinal"
SCOPE = "SELECT set_config('app.user_id', %s, false)"


def vector(text: str) -> Vector:
    return np.array(HashEmbeddings().embed_query(text), np.float32)


def chunks(document_id: int, *texts: str) -> list[Chunk]:
    return [
        Chunk(chunk_id(document_id, ordinal, text), document_id, ordinal, text, {"file_name": "a"}, vector(text))
        for ordinal, text in enumerate(texts)
    ]


@pytest.fixture
def pool(database: Any) -> Iterator[Pool]:
    """One connection, so that each user gets the one that another has just used."""
    with open_pool(database.conninfo(Role.APP), 1, name="one") as made:
        yield made


@pytest.fixture
def store(pool: Pool) -> PgvectorStore:
    made = PgvectorStore(pool)
    for user, document, texts in (
        (ANN, ANNS_DOCUMENT, ("Ann likes tea.", "Ann has a cat.")),
        (BOB, BOBS_DOCUMENT, (SECRET,)),
    ):
        with made.transaction(user) as connection:
            insert_chunks(connection, user, chunks(document, *texts))
    return made


@pytest.fixture
def app(database: Any, store: PgvectorStore) -> Iterator[psycopg.Connection[Any]]:
    with database.connect(Role.APP, autocommit=True) as connection:
        yield connection


@pytest.fixture
def superuser(database: Any) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database.superuser_conninfo(), autocommit=True) as connection:
        yield connection


# -- the predicate forgotten


def test_without_a_user_the_backends_role_sees_nothing(app: psycopg.Connection[Any]) -> None:
    assert app.execute(ALL).fetchall() == []
    app.execute(SCOPE, ("",))
    assert app.execute(ALL).fetchall() == []


def test_without_the_predicate_a_user_sees_only_their_own(app: psycopg.Connection[Any]) -> None:
    app.execute(SCOPE, (str(ANN),))
    assert {user for user, _ in app.execute(ALL)} == {ANN}
    app.execute(SCOPE, (str(BOB),))
    assert app.execute(ALL).fetchall() == [(BOB, SECRET)]


def test_without_the_predicate_a_user_changes_and_deletes_only_their_own(
    app: psycopg.Connection[Any], store: PgvectorStore
) -> None:
    app.execute(SCOPE, (str(ANN),))
    assert app.execute("UPDATE document_chunks SET content = 'x'").rowcount == 2
    assert app.execute("DELETE FROM document_chunks").rowcount == 2
    assert [hit.content for hit in store.search(BOB, vector(SECRET), 3)] == [SECRET]


def test_nobody_writes_a_chunk_for_somebody_else(app: psycopg.Connection[Any]) -> None:
    register_vector(app)
    app.execute(SCOPE, (str(ANN),))
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        insert_chunks(app, BOB, chunks(11, "Planted by Ann."))
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        app.execute("UPDATE document_chunks SET user_id = %s", (BOB,))


def test_a_setting_that_is_no_number_is_an_error_and_shows_nothing(app: psycopg.Connection[Any]) -> None:
    app.execute(SCOPE, ("1 OR true",))
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        app.execute(ALL)


def test_the_backends_role_cannot_switch_row_level_security_off(app: psycopg.Connection[Any]) -> None:
    app.execute("SET row_security = off")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        app.execute(ALL)
    for statement in (
        "ALTER TABLE document_chunks DISABLE ROW LEVEL SECURITY",
        "CREATE POLICY open ON document_chunks USING (true)",
        f"SET ROLE {Role.ROLLOUT}",
        f"SET ROLE {Role.OWNER}",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            app.execute(statement)


# -- row-level security switched off


def test_without_row_level_security_the_predicate_holds_in_every_statement(
    store: PgvectorStore, superuser: psycopg.Connection[Any]
) -> None:
    superuser.execute("ALTER TABLE document_chunks NO FORCE ROW LEVEL SECURITY")
    superuser.execute("ALTER TABLE document_chunks DISABLE ROW LEVEL SECURITY")
    assert {hit.document_id for hit in store.search(ANN, vector(SECRET), 9)} == {ANNS_DOCUMENT}
    assert {row.document_id for row in store.inventory(ANN)} == {ANNS_DOCUMENT}
    assert store.document(ANN, BOBS_DOCUMENT) == []
    store.delete(ANN, BOBS_DOCUMENT)
    assert [hit.content for hit in store.search(BOB, vector(SECRET), 3)] == [SECRET]


def test_a_user_without_chunks_is_answered_with_nothing(store: PgvectorStore) -> None:
    assert store.search(3, vector(SECRET), 9) == []
    assert list(store.inventory(3)) == []


# -- the connection that somebody else has used


def everything(pool: Pool) -> list[Any]:
    """What the connection's next user would see who forgets both scope and predicate."""
    with pool.connection() as connection:
        scope = connection.execute("SELECT current_setting('app.user_id', true)").fetchone()
        assert scope in ((None,), ("",))
        return connection.execute(ALL).fetchall()


def test_after_a_search_the_connection_remembers_nothing_of_its_user(store: PgvectorStore, pool: Pool) -> None:
    for _ in range(8):  # beyond psycopg's threshold for preparing a statement
        assert len(store.search(BOB, vector(SECRET), 3)) == 1
        assert everything(pool) == []
        assert {hit.document_id for hit in store.search(ANN, vector(SECRET), 3)} == {ANNS_DOCUMENT}


def test_after_a_write_a_listing_or_a_failure_it_remembers_nothing_either(store: PgvectorStore, pool: Pool) -> None:
    store.delete(BOB, 404)
    assert everything(pool) == []
    assert len(list(store.inventory(BOB))) == 1
    assert everything(pool) == []
    with pytest.raises(ZeroDivisionError), store.transaction(BOB):
        raise ZeroDivisionError
    assert everything(pool) == []
    with pytest.raises(StoreError), store.transaction(BOB) as connection:
        connection.execute("SELECT 1 / 0")
    assert everything(pool) == []


def test_an_inventory_that_is_given_up_halfway_leaves_nothing_open(store: PgvectorStore, pool: Pool) -> None:
    listing = store.inventory(ANN)
    next(listing)
    listing.close()  # type: ignore[attr-defined]  # it is a generator
    assert everything(pool) == []


def test_a_search_that_is_not_done_in_time_leaves_a_connection_that_works(
    store: PgvectorStore, pool: Pool, superuser: psycopg.Connection[Any]
) -> None:
    hurried = PgvectorStore(pool, read_timeout_ms=50)
    backend = _backend(pool)
    for _ in range(3):
        with superuser.transaction():
            superuser.execute("LOCK TABLE document_chunks IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(StoreError, match="in time") as late:
                hurried.search(BOB, vector(SECRET), 3)
        assert isinstance(late.value.__cause__, psycopg.errors.QueryCanceled)
        assert everything(pool) == []
        assert [hit.content for hit in hurried.search(BOB, vector(SECRET), 3)] == [SECRET]
    assert _backend(pool) == backend, "the same connection throughout"


def test_the_time_limit_of_a_search_binds_no_later_statement(
    store: PgvectorStore, pool: Pool, superuser: psycopg.Connection[Any]
) -> None:
    PgvectorStore(pool, read_timeout_ms=50).search(BOB, vector(SECRET), 3)
    with pool.connection() as connection:
        assert connection.execute("SHOW statement_timeout").fetchone() == ("0",)


def test_a_search_outlives_a_connection_that_the_server_closed(
    store: PgvectorStore, pool: Pool, superuser: psycopg.Connection[Any]
) -> None:
    superuser.execute("SELECT pg_terminate_backend(%s)", (_backend(pool),))
    assert [hit.content for hit in store.search(BOB, vector(SECRET), 3)] == [SECRET]
    assert everything(pool) == []


def test_a_write_on_a_connection_that_the_server_closed_is_refused_and_the_next_one_works(
    store: PgvectorStore, pool: Pool, superuser: psycopg.Connection[Any]
) -> None:
    superuser.execute("SELECT pg_terminate_backend(%s)", (_backend(pool),))
    with pytest.raises(StoreError, match="away or refused"):
        store.delete(BOB, BOBS_DOCUMENT)
    store.delete(BOB, BOBS_DOCUMENT)
    assert store.search(BOB, vector(SECRET), 3) == []


def test_a_search_that_finds_every_connection_taken_waits_for_one_once(
    database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_pool(database.conninfo(Role.APP), 1, name="full") as pool, pool.connection():
        waits: list[float] = []

        def full(timeout: float | None = None) -> Any:
            waits.append(timeout or 0.0)
            raise PoolTimeout("no connection in time")

        monkeypatch.setattr(pool, "getconn", full)
        with pytest.raises(StoreError, match="no connection in time"):
            PgvectorStore(pool).search(BOB, vector(SECRET), 3)
        assert len(waits) == 1


def test_who_searches_while_so_many_do_waits_and_is_refused_in_the_end(
    store: PgvectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pgvector_store, "WAIT_SECONDS", 0.05)
    with ExitStack() as others:
        for _ in range(pgvector_store.SEARCHES_AT_ONCE):
            others.enter_context(store._turn())
        with pytest.raises(StoreError, match="others have been searching"):
            store.search(BOB, vector(SECRET), 3)
    assert store.search(BOB, vector(SECRET), 3)


def test_a_search_that_fails_gives_its_turn_back(store: PgvectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgvector_store, "WAIT_SECONDS", 0.05)
    for _ in range(pgvector_store.SEARCHES_AT_ONCE + 1):
        with pytest.raises(StoreError, match="refused the search"):
            store.search(BOB, vector(SECRET)[:3], 3)
    assert store.search(BOB, vector(SECRET), 3)


def test_users_who_search_at_once_on_few_connections_each_see_their_own(database: Any, store: PgvectorStore) -> None:
    with open_pool(database.conninfo(Role.APP), 2, name="two") as shared:
        both, seen = PgvectorStore(shared), dict[int, set[int]]()
        start = threading.Barrier(4)

        def search(user: int) -> None:
            start.wait(30)
            found = {hit.document_id for _ in range(25) for hit in both.search(user, vector(SECRET), 9)}
            seen[user] = seen.get(user, set()) | found

        threads = [threading.Thread(target=search, args=(user,)) for user in (ANN, BOB, ANN, BOB)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert seen == {ANN: {ANNS_DOCUMENT}, BOB: {BOBS_DOCUMENT}}


# -- roles


def test_the_backends_role_is_accepted(app: psycopg.Connection[Any]) -> None:
    check_role(app)


@pytest.mark.parametrize(
    ("role", "why"), [(Role.OWNER, "owns the table"), (Role.ROLLOUT, "bypasses it"), (None, "is a superuser")]
)
def test_a_role_that_row_level_security_does_not_hold_is_refused(database: Any, role: Role | None, why: str) -> None:
    conninfo = database.superuser_conninfo() if role is None else database.conninfo(role)
    with psycopg.connect(conninfo) as connection, pytest.raises(RoleError, match=why):
        check_role(connection)
    with open_pool(conninfo, 1, name="wrong") as pool, pytest.raises(RoleError, match="victus_app"):
        Documents(pool, HashEmbeddings()).start(loops=False)


def test_a_member_of_the_owner_is_refused_as_the_owner_is(superuser: psycopg.Connection[Any]) -> None:
    name = f"member_{uuid.uuid4().hex}"
    superuser.execute(f"CREATE ROLE {name} IN ROLE {Role.OWNER}")
    try:
        superuser.execute(f"SET ROLE {name}")
        with pytest.raises(RoleError, match="owns the table"):
            check_role(superuser)
    finally:
        superuser.execute("RESET ROLE")
        superuser.execute(f"DROP ROLE {name}")


def test_a_database_without_the_table_is_refused(superuser: psycopg.Connection[Any]) -> None:
    superuser.execute("DROP TABLE document_chunks CASCADE")
    with pytest.raises(SchemaError, match="alembic upgrade head"):
        check_role(superuser)


def test_a_database_without_pgvector_is_refused_at_once_and_says_what_to_run(database: Any) -> None:
    """As a new one is, before Alembic has run: what is missing is told, not that nobody answered."""
    name = f"bare_{uuid.uuid4().hex}"
    database.server.create_database(name)
    try:
        with psycopg.connect(database.server.superuser_conninfo(name), autocommit=True) as superuser:
            superuser.execute("DROP EXTENSION IF EXISTS vector")
        with (
            open_pool(database.server.conninfo(Role.APP, name), 1, name="bare") as pool,
            pytest.raises(SchemaError, match="alembic upgrade head"),
        ):
            Documents(pool, HashEmbeddings()).start(loops=False)
    finally:
        database.server.drop_database(name)


def test_bulk_work_may_copy_and_the_backend_may_not(database: Any, app: psycopg.Connection[Any]) -> None:
    copy = "COPY document_chunks (user_id, id, document_id, ordinal, content, content_sha256, metadata, embedding)"
    row = (BOB, uuid.uuid4(), 21, 0, "More of Bob.", b"x", "{}", str(vector("more").tolist()))
    app.execute(SCOPE, (str(BOB),))
    with pytest.raises(psycopg.errors.FeatureNotSupported), app.cursor().copy(f"{copy} FROM STDIN") as stream:
        stream.write_row(row)
    with database.connect(Role.ROLLOUT) as bulk:
        with bulk.cursor().copy(f"{copy} FROM STDIN") as stream:
            stream.write_row(row)
        assert bulk.execute("SELECT count(*) FROM document_chunks").fetchone() == (4,)


# migration
# -- what a cause may ask across users


@pytest.mark.migration
def test_the_function_tells_the_owner_of_a_chunk_and_nothing_else(
    app: psycopg.Connection[Any], superuser: psycopg.Connection[Any]
) -> None:
    secret = chunk_id(BOBS_DOCUMENT, 0, SECRET)
    app.execute(SCOPE, (str(ANN),))
    assert app.execute("SELECT chunk_owner(%s)", (secret,)).fetchone() == (BOB,)
    assert app.execute("SELECT chunk_owner(%s)", (uuid.uuid4(),)).fetchone() == (None,)
    returned = superuser.execute("SELECT pg_get_function_result('chunk_owner(uuid)'::regprocedure)").fetchone()
    assert returned == ("integer",)
    assert {user for user, _ in app.execute(ALL)} == {ANN}, "and opens nothing for the caller"


@pytest.mark.migration
def test_nobody_but_our_roles_may_ask_for_the_owner(superuser: psycopg.Connection[Any]) -> None:
    name = f"stranger_{uuid.uuid4().hex}"
    superuser.execute(f"CREATE ROLE {name}")
    try:
        superuser.execute(f"SET ROLE {name}")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            superuser.execute("SELECT chunk_owner(%s)", (uuid.uuid4(),))
    finally:
        superuser.execute("RESET ROLE")
        superuser.execute(f"DROP ROLE {name}")


@pytest.mark.migration
def test_the_function_is_not_misled_by_a_callers_own_tables(app: psycopg.Connection[Any]) -> None:
    """It runs with its owner's rights, so what it reads must not depend on the caller's search path."""
    app.execute("CREATE TEMPORARY TABLE document_chunks (user_id integer, id uuid)")
    planted = uuid.uuid4()
    app.execute("INSERT INTO pg_temp.document_chunks VALUES (99, %s)", (planted,))
    assert app.execute("SELECT chunk_owner(%s)", (planted,)).fetchone() == (None,)


# end of migration
def _backend(pool: Pool) -> int:
    with pool.connection() as connection:
        return connection.info.backend_pid
