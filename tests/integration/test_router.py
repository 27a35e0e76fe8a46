"""Uploads, searches and deletions through the router, in every stage, on both real stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.tools.rag_tools.documents import DocumentNotFoundError
from src.tools.rag_tools.migration.router import Router, StaleProcessError
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from src.tools.rag_tools.store import DocumentGoneError, StoreError
from tests.support.routers import add_users, router_on, set_stage, write_note

pytestmark = pytest.mark.migration

STAGES = [(stage, percent) for stage in Stage for percent in ((0, 50, 100) if stage is Stage.LIVE else (0,))]


def upload(router: Router, user_id: int, directory: Path, text: str, name: str = "note.md") -> int:
    document_id = router.receive(user_id, write_note(directory, name, text), name)
    router.index(document_id)
    return document_id


def ledger(database: Any, document_id: int) -> dict[str, tuple[str, str]]:
    with database.connect() as connection:
        rows = connection.execute(
            "SELECT store, wanted, state FROM vector_ledger WHERE document_id = %s", (document_id,)
        )
        return {store: (wanted, state) for store, wanted, state in rows}


def to_stage(database: Any, router: Router, stage: Stage, percent: int = 0) -> None:
    with database.connect(autocommit=True) as connection:
        set_stage(connection, stage, percent)
    router.refresh()


@pytest.mark.parametrize(("stage", "percent"), STAGES)
def test_an_upload_is_found_by_its_owner_at_once_and_by_nobody_else(
    database: Any, tmp_path: Path, stage: Stage, percent: int
) -> None:
    owner, stranger = add_users(database, 2)
    with router_on(database, tmp_path) as router:
        to_stage(database, router, stage, percent)
        document_id = upload(router, owner, tmp_path, "The tide turns at four.")
        assert [hit.document_id for hit in router.query(owner, "The tide turns at four.", 3)] == [document_id]
        assert router.query(stranger, "The tide turns at four.", 3) == []
        states = ledger(database, document_id)
    assert {store for store, state in states.items() if state == ("present", "done")} == set(ROUTING[stage].writes)


@pytest.mark.parametrize(("stage", "percent"), STAGES)
def test_a_deleted_document_is_in_no_answer_and_in_no_store_that_the_stage_writes(
    database: Any, tmp_path: Path, stage: Stage, percent: int
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        to_stage(database, router, stage, percent)
        document_id = upload(router, owner, tmp_path, "The tide turns at four.")
        router.delete(owner, document_id)
        assert router.query(owner, "The tide turns at four.", 3) == []
        vector = np.array(router.embeddings.embed_query("The tide turns at four."), np.float32)
        for store in ROUTING[stage].writes:
            assert router.stores[store].search(owner, vector, 3) == []
            assert ledger(database, document_id)[store] == ("absent", "done")
    assert list((tmp_path / "uploads").iterdir()) == []


def test_a_user_cannot_delete_the_document_of_another(database: Any, tmp_path: Path) -> None:
    owner, stranger = add_users(database, 2)
    with router_on(database, tmp_path) as router:
        document_id = upload(router, owner, tmp_path, "Mine.")
        with pytest.raises(DocumentNotFoundError):
            router.delete(stranger, document_id)
        assert len(router.query(owner, "Mine.", 3)) == 1


def test_what_the_secondary_misses_stays_owed_and_is_settled_later(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        to_stage(database, router, Stage.DUALWRITE)
        with monkeypatch.context() as broken:
            broken.setattr("src.tools.rag_tools.migration.stores.insert_chunks", _away)
            document_id = upload(router, owner, tmp_path, "The tide turns at four.")
        assert ledger(database, document_id)[Store.PGVECTOR] == ("present", "owed")
        assert router.settler.run(at_once=True).done == 1
        assert ledger(database, document_id)[Store.PGVECTOR] == ("present", "done")
        held = [router.stores.copy_of(store, owner, document_id) for store in Store]
    assert [chunk.id for chunk in held[0]] == [chunk.id for chunk in held[1]]
    assert [chunk.vector.tobytes() for chunk in held[0]] == [chunk.vector.tobytes() for chunk in held[1]]
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == ["note.md"]


def test_an_upload_that_nobody_was_told_of_is_given_up_when_the_serving_store_fails(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        to_stage(database, router, Stage.RAMPDOWN)
        document_id = router.receive(owner, write_note(tmp_path, "a.md", "text"), "a.md")
        with monkeypatch.context() as broken:
            broken.setattr("src.tools.rag_tools.migration.stores.insert_chunks", _away)
            with pytest.raises(StoreError):
                router.index(document_id)
        assert router.load(document_id).status == "failed"
        router.settler.run(at_once=True)
        assert ledger(database, document_id) == dict.fromkeys(Store, ("absent", "done"))


def test_an_upload_that_was_answered_stays_owed_when_the_serving_store_fails(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        to_stage(database, router, Stage.RAMPDOWN)
        document_id = router.receive(owner, write_note(tmp_path, "a.md", "text"), "a.md")
        with monkeypatch.context() as broken:
            broken.setattr("src.tools.rag_tools.migration.stores.insert_chunks", _away)
            with pytest.raises(StoreError):
                router.index(document_id, answered=True)
        router.settler.run(at_once=True)
        assert router.load(document_id).status == "ready"
        assert len(router.query(owner, "text", 3)) == 1


def test_a_user_whom_the_serving_store_owes_is_read_from_the_other(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as writer, router_on(database, tmp_path) as reader:
        to_stage(database, writer, Stage.SHADOW)
        reader.refresh()
        with monkeypatch.context() as broken:
            broken.setattr("src.tools.rag_tools.migration.stores.insert_chunks", _away)
            document_id = upload(writer, owner, tmp_path, "The tide turns at four.")
        to_stage(database, writer, Stage.LIVE, 100)
        reader.refresh()
        for router in (writer, reader):
            hits = router.query(owner, "The tide turns at four.", 3)
            assert [hit.document_id for hit in hits] == [document_id]


def test_an_upload_two_transitions_behind_is_not_acknowledged(database: Any, tmp_path: Path) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        document_id = router.receive(owner, write_note(tmp_path, "a.md", "text"), "a.md")
        with database.connect(autocommit=True) as connection:
            set_stage(connection, Stage.DUALWRITE)
            set_stage(connection, Stage.SHADOW)
        with pytest.raises(StaleProcessError):
            router.index(document_id)
        router.refresh()
        router.settler.run(at_once=True)
        assert router.load(document_id).status == "ready"


def test_two_transitions_behind_even_a_document_that_another_made_ready_is_not_acknowledged(
    database: Any, tmp_path: Path
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as sleeper, router_on(database, tmp_path) as other:
        document_id = sleeper.receive(owner, write_note(tmp_path, "a.md", "text"), "a.md")
        with database.connect(autocommit=True) as connection:
            set_stage(connection, Stage.DUALWRITE)
            set_stage(connection, Stage.SHADOW)
        other.refresh()
        other.settler.run(at_once=True)
        assert other.load(document_id).status == "ready"
        with pytest.raises(StaleProcessError):
            sleeper.index(document_id)


def test_a_writer_that_wakes_after_the_deletion_leaves_nothing_behind(database: Any, tmp_path: Path) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        to_stage(database, router, Stage.DUALWRITE)
        document_id = router.receive(owner, write_note(tmp_path, "a.md", "text"), "a.md")
        document = router.load(document_id)
        chunks = router.prepare(document)
        router.delete(owner, document_id)
        for store in Store:
            with pytest.raises(DocumentGoneError):
                router.stores.present(store, owner, document_id, chunks)
        assert router.query(owner, "text", 3) == []
        assert router.stores.faiss.count(owner) == 0


def _away(*_: object) -> None:
    raise StoreError("PostgreSQL is away")
