"""Documents on PostgreSQL alone: what a crash leaves is finished by `resume`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from src.database import Role
from src.tools.rag_tools.chunking import DocumentUnreadableError
from src.tools.rag_tools.documents import Documents, UploadMissingError
from src.tools.rag_tools.embeddings import EmbeddingError
from src.tools.rag_tools.pgvector_store import open_pool
from src.tools.rag_tools.store import DocumentGoneError, StoreError
from tests.support.dying import DiedError, at, die, places, recorded
from tests.support.embeddings import NoisyEmbeddings
from tests.support.seeds import add_users, write_note

LONG_AGO = "UPDATE documents SET updated_at = updated_at - interval '5 minutes'"


@dataclass
class World:
    """Two processes on one database, and one user."""

    database: Any
    folder: Path
    first: Documents
    second: Documents
    owner: int
    embeddings: NoisyEmbeddings
    written: int = 0

    def receive(self) -> int:
        self.written += 1
        path = write_note(self.folder, f"{self.written}.md", f"Note {self.written} says something of its own.")
        return self.first.receive(self.owner, path, path.name)

    def upload(self) -> int:
        document_id = self.receive()
        self.first.index(document_id)
        return document_id

    def time_passes(self) -> None:
        with self.database.connect(autocommit=True) as connection:
            connection.execute(LONG_AGO)

    def resume(self) -> None:
        self.time_passes()
        self.second.resume()
        self.second.sweep(self.folder / "uploads")

    def statuses(self) -> dict[int, str]:
        with self.database.connect() as connection:
            return dict(connection.execute("SELECT id, status FROM documents ORDER BY id").fetchall())

    def held(self, document_id: int) -> list[str]:
        return [chunk.content for chunk in self.second.pgvector.document(self.owner, document_id)]

    def files(self) -> set[str]:
        return {path.name for path in (self.folder / "uploads").iterdir()}


@pytest.fixture
def world(database: Any, tmp_path: Path) -> Iterator[World]:
    (owner,) = add_users(database, 1)
    embeddings = NoisyEmbeddings()
    with open_pool(database.conninfo(Role.APP), 4, name="documents") as pool:
        first, second = (Documents(pool, embeddings) for _ in range(2))
        for each in (first, second):
            each.start(loops=False)
        yield World(database, tmp_path, first, second, owner, embeddings)


def test_an_upload_that_dies_anywhere_is_whole_or_was_never_there(world: World) -> None:
    with recorded() as passed:
        world.upload()
    for name, nth, after in places(passed):
        with pytest.raises(DiedError), at(name, die, nth=nth, after=after):
            world.upload()
    world.resume()
    assert set(world.statuses().values()) == {"ready"}
    assert all(len(world.held(document_id)) == 1 for document_id in world.statuses())
    assert not [name for name in world.files() if "kept" in name]


def test_a_legacy_path_that_leads_out_of_its_folder_is_deleted_without_the_file_there(world: World) -> None:
    """The old release took the name that was sent for the path; a row may point at anything."""
    document_id = world.upload()
    foreign = world.folder / "somebody elses.pdf"
    foreign.write_bytes(b"not an upload")
    with world.database.connect(autocommit=True) as connection:
        path = str(world.folder / "uploads" / ".." / foreign.name)
        connection.execute("UPDATE documents SET path = %s WHERE id = %s", (path, document_id))
    world.first.delete(world.owner, document_id)
    assert foreign.exists()
    assert world.held(document_id) == []
    assert world.first.load(document_id).path == "", "nothing is left to finish"


def test_a_deletion_that_dies_anywhere_is_final_once_it_was_committed(world: World) -> None:
    probe = world.upload()
    with recorded() as passed:
        world.first.delete(world.owner, probe)
    victims = {place: world.upload() for place in places(passed)}
    for (name, nth, after), document_id in victims.items():
        with pytest.raises(DiedError), at(name, die, nth=nth, after=after):
            world.first.delete(world.owner, document_id)
    world.resume()
    left = victims["delete.intent", 1, False]
    assert {document_id for document_id, status in world.statuses().items() if status == "ready"} == {left}
    assert {document_id for document_id in world.statuses() if world.held(document_id)} == {left}
    assert len(world.files()) == 1


def test_a_deletion_that_overtakes_an_upload_anywhere_wins(world: World) -> None:
    document_id = world.receive()
    with recorded() as passed:
        world.first.index(document_id)
    for name, nth, after in places(passed):
        document_id = world.receive()
        with (
            suppress(DocumentGoneError),
            at(name, partial(world.second.delete, world.owner, document_id), nth=nth, after=after),
        ):
            world.first.index(document_id)
        assert world.held(document_id) == [], (name, after)
        assert world.statuses()[document_id] == "deleted"
        assert not any(file.startswith(f"{world.written}.md") for file in world.files()), (name, after)


def test_an_answered_upload_waits_for_the_embedding_service_and_another_one_is_given_up(world: World) -> None:
    answered, unanswered = world.receive(), world.receive()
    world.embeddings.away = EmbeddingError("the embedding service is away")
    for document_id, told in ((answered, True), (unanswered, False)):
        with pytest.raises(EmbeddingError):
            world.first.index(document_id, answered=told)
    world.resume()
    assert world.statuses() == {answered: "received", unanswered: "failed"}
    world.embeddings.away = None
    world.resume()
    assert world.statuses() == {answered: "ready", unanswered: "failed"}


def test_a_file_that_nobody_can_read_is_failed_with_the_reason_and_stays_for_another_try(world: World) -> None:
    path = write_note(world.folder, "broken.pdf", "This is no PDF.")
    document_id = world.first.receive(world.owner, path, path.name)
    with pytest.raises(DocumentUnreadableError):
        world.first.index(document_id, answered=True)
    assert "no PDF file" in str(world.first.load(document_id).error)
    assert world.files() == {"broken.pdf"}
    world.first.delete(world.owner, document_id)
    assert world.files() == set()


def test_an_upload_whose_file_is_gone_waits_for_it_and_holds_up_nobody(world: World) -> None:
    lost, path = world.receive(), world.folder / "uploads" / f"{world.written}.md"
    text = path.read_text()
    path.unlink()
    with pytest.raises(UploadMissingError, match="put it back"):
        world.first.index(lost, answered=True)
    other = world.receive()
    world.resume()
    assert world.statuses() == {lost: "received", other: "ready"}
    path.write_text(text)
    world.resume()
    assert world.statuses() == {lost: "ready", other: "ready"}


def test_documents_that_fail_again_and_again_do_not_keep_the_others_from_their_turn(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.tools.rag_tools.documents.RESUME_BATCH", 2)
    broken = [world.receive() for _ in range(2)]
    for number in range(2):
        (world.folder / "uploads" / f"{number + 1}.md").unlink()
    sound = world.receive()
    world.time_passes()
    world.second.resume()
    assert world.statuses()[sound] == "received", "the first two came first"
    world.second.resume()
    assert world.statuses() == {**dict.fromkeys(broken, "received"), sound: "ready"}


def test_what_one_process_has_taken_up_no_other_takes_up_for_a_while(world: World) -> None:
    document_id = world.receive()
    world.time_passes()
    world.embeddings.away = EmbeddingError("the embedding service is away")
    world.first.resume()
    world.embeddings.away = None
    world.second.resume()
    assert world.statuses() == {document_id: "received"}
    world.resume()
    assert world.statuses() == {document_id: "ready"}


def test_one_document_that_breaks_in_an_unforeseen_way_holds_up_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, sound = world.receive(), world.receive()
    index = world.second.index

    def fail(document_id: int, *, answered: bool = False) -> None:
        if document_id == broken:
            raise ZeroDivisionError
        index(document_id, answered=answered)

    monkeypatch.setattr(world.second, "index", fail)
    world.resume()
    assert world.statuses() == {broken: "received", sound: "ready"}


def test_a_process_that_closes_ends_after_the_document_at_hand(world: World) -> None:
    for _ in range(3):
        world.receive()
    world.time_passes()
    with at("upload.ready", world.second._closing.set):
        world.second.resume()
    assert sorted(world.statuses().values()) == ["ready", "received", "received"]


def test_a_store_that_fails_gives_up_only_what_nobody_was_told_of(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, unanswered = world.receive(), world.receive()

    def away(*_: object) -> None:
        raise StoreError("PostgreSQL is away")

    with monkeypatch.context() as broken:
        broken.setattr("src.tools.rag_tools.pgvector_store.insert_chunks", away)
        for document_id, told in ((answered, True), (unanswered, False)):
            with pytest.raises(StoreError):
                world.first.index(document_id, answered=told)
    world.resume()
    assert world.statuses() == {answered: "ready", unanswered: "failed"}


def test_an_upload_that_is_refused_by_the_disk_is_not_received(world: World) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left"), at("upload.fsync", full):
        world.receive()
    assert world.statuses() == {}


def test_deleting_twice_at_once_is_one_deletion(world: World) -> None:
    document_id = world.upload()
    with at("delete.intent", lambda: world.second.delete(world.owner, document_id), after=True):
        world.first.delete(world.owner, document_id)
    assert world.statuses() == {document_id: "deleted"}
    assert world.held(document_id) == []
    assert world.files() == set()
