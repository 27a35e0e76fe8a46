"""Behind PgBouncer in transaction mode, where users take turns on one connection, nobody is left another's scope."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from src.config import settings
from src.database import Role
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.settings import MigrationSettings
from src.tools.rag_tools.migration.stages import Stage
from src.tools.rag_tools.pgvector_store import PgvectorStore, Pool, open_pool
from src.tools.rag_tools.store import StoreError
from tests.support.bouncer import Bouncer, bouncer, needs_pgbouncer
from tests.support.routers import HashEmbeddings, add_users, set_stage, write_note

pytestmark = [pytest.mark.migration, needs_pgbouncer]

TURNS = 60
UNSCOPED = "SELECT count(*), coalesce(current_setting('app.user_id', true), '') FROM document_chunks"


@pytest.fixture
def one(database: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bouncer]:
    """With a single connection to PostgreSQL."""
    monkeypatch.setattr(settings, "DATABASE_PREPARE", False)
    with bouncer(database, size=1) as made:
        yield made


def client(one: Bouncer) -> Pool:
    return open_pool(one.conninfo(Role.APP), 2, name="client")


def owners(database: Any, directory: Path, pool: Pool) -> dict[int, int]:
    """A document for each of two users, written through PgBouncer; returns user and document."""
    with database.connect(autocommit=True) as connection:
        set_stage(connection, Stage.COMPLETE, 100)
    router = Router(pool, HashEmbeddings(), settings=MigrationSettings(FAISS_INDEX_PATH=directory / "faiss_index"))
    router.start(loops=False)
    made = {}
    for user in add_users(database, 2):
        path = write_note(directory, f"{user}.md", f"What user {user} knows.")
        made[user] = router.receive(user, path, path.name)
        router.index(made[user])
    router.close()
    return made


def test_two_users_in_turns_on_one_connection_find_their_own_and_leave_no_scope_behind(
    one: Bouncer, database: Any, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        pools = [stack.enter_context(client(one)) for _ in range(2)]
        documents = owners(database, tmp_path, pools[0])
        onlooker = stack.enter_context(psycopg.connect(one.conninfo(Role.APP), autocommit=True, prepare_threshold=None))
        pids = set()
        for turn in range(TURNS):
            user = list(documents)[turn % 2]
            store = PgvectorStore(pools[turn % 2])
            found = store.search(user, vector(user), 20)
            assert [hit.document_id for hit in found] == [documents[user]]
            assert onlooker.execute(UNSCOPED).fetchone() == (0, "")
            pids.add(onlooker.execute("SELECT pg_backend_pid()").fetchone())
        assert len(pids) == 1


def test_two_users_at_once_on_one_connection_never_find_the_others(one: Bouncer, database: Any, tmp_path: Path) -> None:
    with ExitStack() as stack:
        pools = [stack.enter_context(client(one)) for _ in range(2)]
        documents = owners(database, tmp_path, pools[0])
        together = threading.Barrier(2)

        def ask(pool: Pool, user: int) -> set[int]:
            together.wait()
            store = PgvectorStore(pool)
            return {hit.document_id for _ in range(TURNS) for hit in store.search(user, vector(user), 20)}

        with ThreadPoolExecutor(2) as threads:
            asked = [threads.submit(ask, pool, user) for pool, user in zip(pools, documents, strict=True)]
            assert [each.result() for each in asked] == [{document} for document in documents.values()]


def test_a_write_and_a_failed_read_leave_no_scope_and_no_time_limit_behind(
    one: Bouncer, database: Any, tmp_path: Path
) -> None:
    with client(one) as pool:
        documents = owners(database, tmp_path, pool)
        (user, document), (other, _) = documents.items()
        with psycopg.connect(one.conninfo(Role.APP), autocommit=True, prepare_threshold=None) as onlooker:
            before = onlooker.execute("SHOW statement_timeout").fetchone()
            PgvectorStore(pool).delete(user, document)
            with pytest.raises(StoreError):
                PgvectorStore(pool).search(other, vector(other)[:5], 3)
            assert onlooker.execute(UNSCOPED).fetchone() == (0, "")
            assert onlooker.execute("SHOW statement_timeout").fetchone() == before


def vector(user: int) -> Any:
    import numpy as np

    return np.array(HashEmbeddings().embed_query(f"What user {user} knows."), np.float32)
