"""Whatever dies, fails or overtakes whom: once what is owed is settled, both stores hold what was acknowledged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.tools.rag_tools import faults
from src.tools.rag_tools.chunking import DocumentUnreadableError
from src.tools.rag_tools.embeddings import EmbeddingError
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from src.tools.rag_tools.store import DocumentGoneError, StoreError
from tests.support.dying import DiedError, at, die, places, recorded
from tests.support.routers import HashEmbeddings, NoisyEmbeddings, add_users, router_on, set_stage, write_note

pytestmark = pytest.mark.migration

SPREAD = [(Stage.OFF, 0), (Stage.DUALWRITE, 0), (Stage.LIVE, 100), (Stage.COMPLETE, 100)]
LEASES_OVER = "UPDATE vector_ledger SET next_attempt_at = clock_timestamp() WHERE state = 'owed'"
LONG_AGO = "UPDATE documents SET updated_at = updated_at - interval '5 minutes'"


@dataclass
class World:
    """Two processes on one database and one directory, and one user."""

    database: Any
    folder: Path
    first: Router
    second: Router
    owner: int
    embeddings: NoisyEmbeddings
    written: int = 0

    def stage(self, stage: Stage, percent: int = 0) -> None:
        with self.database.connect(autocommit=True) as connection:
            set_stage(connection, stage, percent)
        for router in (self.first, self.second):
            router.refresh()

    def note(self) -> Path:
        self.written += 1
        return write_note(self.folder, f"{self.written}.md", f"Note {self.written} says something of its own.")

    def receive(self) -> int:
        path = self.note()
        return self.first.receive(self.owner, path, path.name)

    def upload(self) -> int:
        document_id = self.receive()
        self.first.index(document_id)
        return document_id

    def owed_to(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> int:
        """A document that is ready, and missed by `store`."""
        stage = Stage.DUALWRITE if store is Store.PGVECTOR else Stage.RAMPDOWN
        if self.first.flags.view().stage is not stage:
            self.stage(stage)
        with monkeypatch.context() as broken:
            broken.setattr(*BROKEN[store])
            return self.upload()

    def settle(self) -> None:
        """Both stores, whatever the stage; and what only time brings back."""
        self.second.settler.run(stores=list(Store), at_once=True)
        self.execute(LONG_AGO)
        self.second.resume()
        self.second.sweep(self.folder / "uploads")

    def execute(self, statement: str, *values: object) -> None:
        with self.database.connect(autocommit=True) as connection:
            connection.execute(statement, values)

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self.database.connect() as connection:
            rows: list[tuple[Any, ...]] = connection.execute(statement, values).fetchall()
        return rows

    def documents(self) -> dict[int, str]:
        return dict(self.rows("SELECT id, status FROM documents ORDER BY id"))

    def ledger(self, document_id: int) -> set[tuple[str, str]]:
        return set(self.rows("SELECT wanted, state FROM vector_ledger WHERE document_id = %s", document_id))

    def held(self, document_id: int) -> list[list[tuple[Any, ...]]]:
        """What each store holds of the document, byte for byte."""
        return [
            [
                (chunk.id, chunk.ordinal, chunk.content, dict(chunk.metadata), chunk.vector.tobytes())
                for chunk in self.second.stores.copy_of(store, self.owner, document_id)
            ]
            for store in Store
        ]

    def files(self) -> set[str]:
        return {path.name for path in (self.folder / "uploads").iterdir()}

    def found(self, router: Router) -> set[int]:
        vector = np.array(HashEmbeddings().embed_query("anything"), np.float32)
        return {hit.document_id for hit in router.search(self.owner, vector, 100)}

    def assert_whole(self, document_id: int) -> None:
        faiss, pgvector = self.held(document_id)
        assert faiss
        assert faiss == pgvector
        assert self.documents()[document_id] == "ready"
        assert self.ledger(document_id) == {("present", "done")}

    def assert_absent(self, document_id: int) -> None:
        assert self.held(document_id) == [[], []]
        assert self.ledger(document_id) == {("absent", "done")}
        assert document_id not in self.found(self.first) | self.found(self.second)


@pytest.fixture
def world(database: Any, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as open_:
        embeddings = NoisyEmbeddings()
        first, second = (open_.enter_context(router_on(database, tmp_path, embeddings=embeddings)) for _ in range(2))
        (owner,) = add_users(database, 1)
        yield World(database, tmp_path, first, second, owner, embeddings)


# -- death


@pytest.mark.parametrize(("stage", "percent"), SPREAD)
def test_an_upload_that_dies_anywhere_is_whole_in_both_stores_or_was_never_there(
    world: World, stage: Stage, percent: int
) -> None:
    world.stage(stage, percent)
    with recorded() as passed:
        world.upload()
    assert {"upload.intent", "upload.ready", "kept.link", "ledger.mark", "pgvector.present"} & set(passed)
    for name, nth, after in places(passed):
        with pytest.raises(DiedError), at(name, die, nth=nth, after=after):
            world.upload()
    world.settle()
    received = [name for name, _, after in places(passed) if name != "upload.fsync" and (name, after) != INTENT]
    assert len(world.documents()) == 1 + len(received), "what was not received leaves no row"
    for document_id in world.documents():
        world.assert_whole(document_id)
    assert not [name for name in world.files() if "kept" in name], "what was kept for the stores is gone"


INTENT = ("upload.intent", False)


@pytest.mark.parametrize(("stage", "percent"), SPREAD)
def test_a_deletion_that_dies_anywhere_is_final_once_it_was_committed(world: World, stage: Stage, percent: int) -> None:
    world.stage(stage, percent)
    probe = world.upload()
    with recorded() as passed:
        world.first.delete(world.owner, probe)
    victims = {place: world.upload() for place in places(passed)}
    world.settle()
    for (name, nth, after), document_id in victims.items():
        with pytest.raises(DiedError), at(name, die, nth=nth, after=after):
            world.first.delete(world.owner, document_id)
        world.second.refresh()
        withdrawn = world.documents()[document_id] == "deleted"
        assert withdrawn == ((name, after) != ("delete.intent", False))
        assert (document_id in world.found(world.second)) != withdrawn, "hidden from the first poll on"
    kept_one = victims["delete.intent", 1, False]
    world.settle()
    world.assert_whole(kept_one)
    for document_id in {probe, *victims.values()} - {kept_one}:
        world.assert_absent(document_id)
    assert world.files() == {world.rows("SELECT filename FROM documents WHERE id = %s", kept_one)[0][0]}


@pytest.mark.parametrize("store", Store)
def test_settling_that_dies_anywhere_is_finished_by_another_process(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    owed = world.owed_to(store, monkeypatch)
    with recorded() as passed:
        world.first.settler.run(at_once=True)
    world.assert_whole(owed)
    for name, nth, after in places(passed):
        owed = world.owed_to(store, monkeypatch)
        with pytest.raises(DiedError), at(name, die, nth=nth, after=after):
            world.first.settler.run(at_once=True)
        world.second.settler.run(at_once=True)
        world.assert_whole(owed)
    world.settle()
    assert all(status == "ready" for status in world.documents().values())


def test_an_upload_that_died_before_it_was_ready_is_made_ready_by_settling(world: World) -> None:
    world.stage(Stage.DUALWRITE)
    with pytest.raises(DiedError), at("upload.ready", die):
        world.upload()
    assert list(world.documents().values()) == ["received"]
    assert world.second.settler.run().ready == 1
    assert list(world.documents().values()) == ["ready"]


@pytest.mark.parametrize("first", Store)
def test_a_store_that_has_it_unmarked_and_one_that_is_settled_first_get_the_same_vectors(
    world: World, first: Store
) -> None:
    """FAISS has the document, and the process died before the ledger said so: it must not be embedded anew."""
    world.stage(Stage.DUALWRITE)
    with pytest.raises(DiedError), at("ledger.mark", die):
        world.upload()
    answers = world.embeddings.answers
    for store in (first, first.other):
        world.second.settler.run(stores=[store], at_once=True)
    (document_id,) = world.documents()
    world.assert_whole(document_id)
    assert world.embeddings.answers == answers


# -- others at work meanwhile


@pytest.mark.parametrize("stage", [Stage.DUALWRITE, Stage.RAMPDOWN])
def test_a_deletion_that_overtakes_an_upload_anywhere_wins(world: World, stage: Stage) -> None:
    world.stage(stage)
    document_id = world.receive()
    with recorded() as passed:
        world.first.index(document_id)
    for name, nth, after in places(passed):
        if name in HOLDS_A_LOCK:
            continue
        document_id = world.receive()
        overtake = deletion(world.second, world.owner, document_id)
        with suppress(DocumentGoneError), at(name, overtake, nth=nth, after=after):
            world.first.index(document_id)
        assert not any(name.startswith(f"{world.written}.md") for name in world.files()), (name, after)
        world.settle()
        world.assert_absent(document_id)


@pytest.mark.parametrize("store", Store)
@pytest.mark.parametrize("ready", [True, False])
def test_a_deletion_that_overtakes_settling_anywhere_wins(
    world: World, store: Store, ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def owed() -> int:
        return world.owed_to(store, monkeypatch) if ready else world.receive()

    owed()
    with recorded() as passed:
        world.first.settler.run(at_once=True)
    for name, nth, after in places(passed):
        if name in HOLDS_A_LOCK:
            continue
        document_id = owed()
        overtake = deletion(world.second, world.owner, document_id)
        with at(name, overtake, nth=nth, after=after):
            report = world.first.settler.run(at_once=True)
        assert report.failed == {}, "what was withdrawn meanwhile has not failed"
        assert not any(name.startswith(f"{world.written}.md") for name in world.files()), (name, after)
        world.settle()
        world.assert_absent(document_id)


HOLDS_A_LOCK = {"journal.commit"}


def test_two_processes_that_settle_at_once_share_the_work_and_embed_nothing_twice(world: World) -> None:
    world.stage(Stage.DUALWRITE)
    documents = [world.receive() for _ in range(30)]
    world.execute(LEASES_OVER)
    both = threading.Barrier(2, timeout=30)
    begun = threading.local()

    def meet() -> None:
        if not getattr(begun, "already", False):
            begun.already = True
            both.wait()

    with ThreadPoolExecutor(2) as threads, each_time("settle.claim", meet):
        reports = [
            each.result() for each in [threads.submit(router.settler.run) for router in (world.first, world.second)]
        ]
    assert sum(report.done for report in reports) == 2 * len(documents)
    assert all(report.done for report in reports)
    assert [report.failed for report in reports] == [{}, {}]
    for document_id in documents:
        world.assert_whole(document_id)


def test_an_upload_that_another_process_finished_is_no_failure(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The serving store fails, and before it is given up somebody else has made it ready."""
    world.stage(Stage.RAMPDOWN)
    document_id = world.receive()

    def finish_then_fail() -> None:
        world.second.settler.run(at_once=True)
        raise StoreError("PostgreSQL is away")

    with at("pgvector.present", finish_then_fail):
        world.first.index(document_id)
    world.assert_whole(document_id)
    assert document_id in world.found(world.first)


@pytest.mark.parametrize("stage", [Stage.DUALWRITE, Stage.RAMPDOWN])
@pytest.mark.parametrize("point", ["kept.link", "journal.add", "pgvector.present", "ledger.mark"])
def test_a_writer_that_wakes_after_its_document_was_given_up_gets_an_error_and_leaves_nothing(
    world: World, stage: Stage, point: str
) -> None:
    """It slept before that operation, while another process found the file unreadable."""
    world.stage(stage)
    document_id = world.receive()

    def give_up() -> None:
        assert world.second._give_up(world.second.load(document_id), "nobody can read this")

    with at(point, give_up), pytest.raises(DocumentGoneError):
        world.first.index(document_id, answered=True)
    world.settle()
    world.assert_absent(document_id)
    assert world.documents()[document_id] == "failed"
    assert world.files() == {"1.md"}


@pytest.mark.parametrize("answered", [True, False])
def test_an_upload_that_another_process_finished_in_the_other_store_is_found_at_once(
    world: World, answered: bool
) -> None:
    world.stage(Stage.LIVE, 100)
    document_id = world.receive()

    def finish_then_fail() -> None:
        world.second.settler.run(stores=[Store.FAISS], at_once=True)
        raise StoreError("no space is left beside the uploads")

    with at("kept.write", finish_then_fail):
        world.first.index(document_id, answered=answered)
    assert document_id in world.found(world.first)


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize("said_ready", [True, False])
@pytest.mark.parametrize("point", ["kept.link", "pgvector.present"])
def test_nor_is_it_where_the_other_process_tidied_up_what_this_one_still_needed(
    world: World, monkeypatch: pytest.MonkeyPatch, point: str, said_ready: bool, answered: bool
) -> None:
    """Both stores have it; the other process may not have come to say that it is ready."""
    world.stage(Stage.RAMPDOWN)
    document_id = world.receive()
    if not said_ready:
        monkeypatch.setattr(world.second.settler, "_finish_ready", lambda _: None)
    with at(point, lambda: world.second.settler.run(at_once=True)):
        world.first.index(document_id, answered=answered)
    monkeypatch.undo()
    world.settle()
    world.assert_whole(document_id)
    assert world.files() == {"1.md"}


# -- failures


def test_an_upload_that_was_given_up_can_be_sent_again_as_the_same_file(world: World) -> None:
    world.stage(Stage.DUALWRITE)
    path = world.note()
    world.embeddings.away = EmbeddingError("the embedding service does not answer")
    refused = world.first.receive(world.owner, path, path.name)
    with pytest.raises(EmbeddingError):
        world.first.index(refused)
    world.settle()
    world.assert_absent(refused)
    world.embeddings.away = None
    again = world.first.receive(world.owner, path, path.name)
    world.first.index(again)
    world.settle()
    world.assert_whole(again)
    assert world.documents() == {refused: "failed", again: "ready"}
    assert world.found(world.first) == {again}


def test_an_answered_upload_waits_for_the_embedding_service_to_come_back(world: World) -> None:
    world.stage(Stage.DUALWRITE)
    document_id = world.receive()
    world.embeddings.away = EmbeddingError("the embedding service does not answer")
    with pytest.raises(EmbeddingError):
        world.first.index(document_id, answered=True)
    report = world.second.settler.run(at_once=True)
    assert set(report.failed) == {(document_id, store) for store in Store}
    assert world.ledger(document_id) == {("present", "owed")}
    assert {row[0] for row in world.rows("SELECT last_error FROM vector_ledger")} == {
        "the embedding service does not answer"
    }
    assert world.second.settler.run().done == 0, "not before its time"
    world.embeddings.away = None
    world.execute(LEASES_OVER)
    assert world.second.settler.run().done == 2
    world.assert_whole(document_id)


@pytest.mark.parametrize("answered", [True, False])
def test_a_file_that_nobody_can_read_is_failed_with_the_reason(world: World, answered: bool) -> None:
    world.stage(Stage.DUALWRITE)
    path = write_note(world.folder, "broken.pdf", "This is no PDF.")
    document_id = world.first.receive(world.owner, path, path.name)
    if answered:
        world.first.settler.run(at_once=True)
    else:
        with pytest.raises(DocumentUnreadableError):
            world.first.index(document_id)
    ((status, error),) = world.rows("SELECT status, error FROM documents WHERE id = %s", document_id)
    assert status == "failed"
    assert "damaged, cut short or no PDF" in error
    world.settle()
    world.assert_absent(document_id)


def test_an_upload_whose_file_is_gone_is_set_aside_and_holds_up_nobody(world: World) -> None:
    world.stage(Stage.DUALWRITE)
    lost, path = world.receive(), world.folder / "uploads" / f"{world.written}.md"
    text = path.read_text()
    path.unlink()
    other = world.receive()
    for _ in range(3):
        world.execute(LEASES_OVER)
        report = world.second.settler.run()
    world.assert_whole(other)
    assert set(report.aside) == {(lost, store) for store in Store}
    assert world.ledger(lost) == {("present", "aside")}
    assert "is not there" in report.failed[lost, Store.FAISS]
    path.write_text(text)
    world.execute("UPDATE vector_ledger SET state = 'owed' WHERE state = 'aside'")
    world.settle()
    world.assert_whole(lost)


def test_what_a_store_has_recorded_as_deleted_and_the_ledger_still_wants_is_set_aside_and_shown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    document_id = world.owed_to(Store.FAISS, monkeypatch)
    world.first.stores.faiss.delete(world.owner, document_id)
    for _ in range(3):
        report = world.second.settler.run(at_once=True)
    assert report.aside == [(document_id, Store.FAISS)]
    assert "deleted" in report.failed[document_id, Store.FAISS]


def test_one_entry_that_breaks_in_an_unforeseen_way_holds_up_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.stage(Stage.DUALWRITE)
    broken, sound = world.receive(), world.receive()
    prepare = world.second.settler.prepare

    def fail(document: Any) -> Any:
        if document.id == broken:
            raise ZeroDivisionError
        return prepare(document)

    monkeypatch.setattr(world.second.settler, "prepare", fail)
    for _ in range(3):
        report = world.second.settler.run(at_once=True)
    world.assert_whole(sound)
    assert set(report.aside) == {(broken, store) for store in Store}


def test_a_document_whose_row_went_with_its_user_is_owed_to_no_store_any_more(world: World) -> None:
    world.stage(Stage.DUALWRITE)
    document_id = world.receive()
    world.execute("DELETE FROM users WHERE id = %s", world.owner)
    assert world.documents() == {}
    for _ in range(2):
        world.second.settler.run(at_once=True)
    assert world.ledger(document_id) == {("absent", "done")}


def test_an_upload_that_was_deleted_before_it_was_indexed_says_so(world: World) -> None:
    document_id = world.receive()
    world.second.delete(world.owner, document_id)
    with pytest.raises(DocumentGoneError, match="deleted"):
        world.first.index(document_id, answered=True)
    assert world.files() == set()


def test_a_halted_process_settles_nothing(world: World) -> None:
    world.stage(Stage.DUALWRITE)
    document_id = world.receive()
    world.execute(LEASES_OVER)
    world.first.flags.halt("told to")
    world.first.resume()
    assert world.ledger(document_id) == {("present", "owed")}
    world.second.resume()
    world.assert_whole(document_id)


def test_a_process_that_closes_ends_after_the_entry_at_hand(world: World) -> None:
    world.stage(Stage.DUALWRITE)
    for _ in range(3):
        world.receive()
    world.execute(LEASES_OVER)
    with at("ledger.mark", world.first._closing.set):
        world.first.resume()
    assert sorted(world.rows("SELECT state, count(*) FROM vector_ledger GROUP BY state")) == [("done", 1), ("owed", 5)]


# -- files


def test_a_file_that_two_documents_share_goes_with_the_last_of_them(world: World) -> None:
    path = world.note()
    one, other = (world.first.receive(world.owner, path, path.name) for _ in range(2))
    for document_id in (one, other):
        world.first.index(document_id)
    kept = {name for name in world.files() if "kept" in name}
    assert len(kept) == 2, "pgvector is owed both"
    world.first.delete(world.owner, one)
    assert world.files() == {path.name, next(name for name in kept if f".{other}." in name)}
    world.first.delete(world.owner, other)
    assert world.files() == set()


def test_a_file_that_cannot_be_removed_is_tried_again_and_the_document_is_gone_all_the_same(
    world: World,
) -> None:
    world.stage(Stage.DUALWRITE)
    document_id = world.upload()

    def refuse() -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.raises(StoreError, match="Permission denied"), at("delete.file", refuse):
        world.first.delete(world.owner, document_id)
    world.assert_absent(document_id)
    assert world.files() != set()
    world.settle()
    assert world.files() == set()


# -- parts


BROKEN: dict[Store, tuple[str, Callable[..., None]]] = {
    Store.PGVECTOR: ("src.tools.rag_tools.migration.stores.insert_chunks", lambda *_: away()),
    Store.FAISS: ("src.tools.rag_tools.migration.faiss_store.FaissStore.upsert", lambda *_: away()),
}


def away() -> None:
    raise StoreError("the store is away")


def deletion(router: Router, owner: int, document_id: int) -> Callable[[], None]:
    return lambda: router.delete(owner, document_id)


@contextmanager
def each_time(name: str, act: Callable[[], object]) -> Iterator[None]:
    @contextmanager
    def hook(passed: str) -> Iterator[None]:
        if passed == name:
            act()
        yield

    faults.hook = hook
    try:
        yield
    finally:
        faults.hook = None


def test_the_broken_parts_of_these_tests_are_those_of_the_stores() -> None:
    assert set(BROKEN) == set(ROUTING[Stage.DUALWRITE].writes)
