"""A write or read of the store that does not serve may fail or hang in any way: nobody waits, nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from src.tools.rag_tools.migration.router import SECONDARY_WORKERS, Router
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.store import StoreError
from tests.support.routers import router_on, set_stage
from tests.support.seeds import add_users, write_note

pytestmark = pytest.mark.migration

LEDGER = "SELECT store, state FROM vector_ledger WHERE document_id = %s"


def to_stage(database: Any, router: Router, stage: Stage, percent: int = 0) -> None:
    with database.connect(autocommit=True) as connection:
        set_stage(connection, stage, percent)
    router.refresh()


def upload(router: Router, user_id: int, folder: Path, name: str) -> int:
    path = write_note(folder, name, f"What {name} says.")
    document_id = router.receive(user_id, path, name)
    router.index(document_id)
    return document_id


def ledger(database: Any, document_id: int) -> dict[str, str]:
    with database.connect() as connection:
        return dict(connection.execute(LEDGER, (document_id,)).fetchall())


@contextmanager
def nobody_reads_chunks(database: Any) -> Iterator[None]:
    """Inside, every statement on pgvector's table hangs."""
    with psycopg.connect(database.superuser_conninfo()) as locking:
        locking.execute("LOCK TABLE document_chunks IN ACCESS EXCLUSIVE MODE")
        yield


def test_an_upload_is_answered_while_the_other_store_hangs_and_is_settled_afterwards(
    database: Any, tmp_path: Path
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path, SECONDARY_TIMEOUT_SECONDS=0.1) as router:
        to_stage(database, router, Stage.DUALWRITE)
        with nobody_reads_chunks(database):
            document_id = upload(router, owner, tmp_path, "a.md")
            assert ledger(database, document_id) == {"faiss": "done", "pgvector": "owed"}
            assert [hit.document_id for hit in router.query(owner, "anything", 3)] == [document_id]
        router.settler.run(at_once=True)
        assert ledger(database, document_id) == {"faiss": "done", "pgvector": "done"}
        assert len(router.stores.copy_of(Store.PGVECTOR, owner, document_id)) == 1


def test_a_deletion_is_answered_while_the_other_store_hangs_and_is_seen_by_nobody_meanwhile(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path, SECONDARY_TIMEOUT_SECONDS=0.1) as router:
        to_stage(database, router, Stage.DUALWRITE)
        document_id = upload(router, owner, tmp_path, "a.md")
        with nobody_reads_chunks(database):
            router.delete(owner, document_id)
        for _ in range(2):
            with monkeypatch.context() as broken:
                broken.setattr(router.stores.faiss, "search", _away)
                assert router.query(owner, "anything", 3) == [], "neither by falling back on pgvector"
            router.refresh()
        router.settler.run(at_once=True)
        assert ledger(database, document_id) == {"faiss": "done", "pgvector": "done"}


def test_more_uploads_than_there_are_workers_hang_and_each_is_answered(database: Any, tmp_path: Path) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path, connections=SECONDARY_WORKERS + 2, SECONDARY_TIMEOUT_SECONDS=0.1) as router:
        to_stage(database, router, Stage.DUALWRITE)
        with nobody_reads_chunks(database), ThreadPoolExecutor(3) as callers:
            uploads = [
                callers.submit(upload, router, owner, tmp_path, f"{number}.md")
                for number in range(2 * SECONDARY_WORKERS)
            ]
            documents = [each.result(60) for each in uploads]
            assert {hit.document_id for hit in router.query(owner, "anything", 99)} == set(documents)
        for _ in range(2):
            router.settler.run(at_once=True)
        for document_id in documents:
            assert ledger(database, document_id) == {"faiss": "done", "pgvector": "done"}


@pytest.mark.parametrize("error", [RuntimeError("unforeseen"), OSError("no disk"), MemoryError(), StoreError("away")])
@pytest.mark.parametrize(("stage", "broken_store"), [(Stage.DUALWRITE, "pgvector"), (Stage.RAMPDOWN, "faiss")])
def test_whatever_befalls_the_other_store_fails_no_upload(
    database: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: Stage,
    broken_store: str,
    error: Exception,
) -> None:
    def fail(*_: object) -> None:
        raise error

    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        to_stage(database, router, stage)
        with monkeypatch.context() as broken:
            if broken_store == "faiss":
                broken.setattr(router.stores.faiss, "upsert", fail)
            else:
                broken.setattr("src.tools.rag_tools.migration.stores.insert_chunks", fail)
            document_id = upload(router, owner, tmp_path, "a.md")
        assert ledger(database, document_id)[broken_store] == "owed"
        assert len(router.query(owner, "anything", 3)) == 1
        router.settler.run(at_once=True)
        assert ledger(database, document_id) == {"faiss": "done", "pgvector": "done"}


def test_an_abandoned_write_that_lands_after_the_deletion_brings_nothing_back(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hung for longer than the upload waited, and in the meantime the document was deleted."""
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path, SECONDARY_TIMEOUT_SECONDS=0.1) as router:
        to_stage(database, router, Stage.RAMPDOWN)
        go_on, landed, upsert = threading.Event(), threading.Event(), router.stores.faiss.upsert

        def late(*arguments: Any) -> None:
            assert go_on.wait(60)
            try:
                upsert(*arguments)
            finally:
                landed.set()

        monkeypatch.setattr(router.stores.faiss, "upsert", late)
        document_id = upload(router, owner, tmp_path, "a.md")
        router.delete(owner, document_id)
        go_on.set()
        assert landed.wait(60)
        assert router.stores.faiss.count(owner) == 0
        router.settler.run(at_once=True)
        assert ledger(database, document_id) == {"faiss": "done", "pgvector": "done"}
        assert router.stores.faiss.count(owner) == 0
        assert router.query(owner, "anything", 3) == []


def test_a_store_that_fails_to_answer_is_stood_in_for_by_the_other_and_counted(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        to_stage(database, router, Stage.RAMPDOWN)
        document_id = upload(router, owner, tmp_path, "a.md")
        with monkeypatch.context() as broken:
            broken.setattr("src.tools.rag_tools.pgvector_store.PgvectorStore.search", _away)
            assert [hit.document_id for hit in router.query(owner, "anything", 3)] == [document_id]
        for _ in range(2):
            router.refresh()
    with database.connect() as connection:
        counted = dict(connection.execute("SELECT name, sum(count) FROM rollout_counts GROUP BY name").fetchall())
    assert counted == {"fallback": 1, "reads.faiss": 1}


def _away(*_: object) -> Any:
    raise StoreError("the store is away")
