"""FAISS as a store: everyone's own chunks only, nothing lost between processes, saves and releases."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.tools.rag_tools.migration.faiss_disk import ForeignDirectoryError, Host, locked
from src.tools.rag_tools.migration.faiss_pickle import MismatchedPairError
from src.tools.rag_tools.migration.faiss_sqlite import JOURNAL_FILE, JournalError
from src.tools.rag_tools.migration.faiss_store import (
    FaissStore,
    JournalLostError,
    Owner,
    Owners,
    OwnersUnknownError,
)
from src.tools.rag_tools.store import (
    DocumentGoneError,
    Hit,
    InvalidVectorError,
    VectorStore,
    content_hash,
    legacy_chunk_id,
    vector_hash,
)
from tests.support.faiss_directory import (
    made_chunks,
    old_release_adds,
    opened_by_langchain,
    save_legacy,
    unit_vectors,
)

pytestmark = pytest.mark.migration

ANN, BEN = 1, 2
# Two uploads of Ann and one of Ben, and a chunk that is nobody's; docstore ids need not be UUIDs.
IDS = ["a1", "a2", "b1", str(uuid.UUID(int=5)), "nobody"]
OWNED = {
    "a1": Owner(ANN, 10, 0),
    "a2": Owner(ANN, 10, 1),
    str(uuid.UUID(int=5)): Owner(ANN, 11, 0),
    "b1": Owner(BEN, 20, 0),
}
OWNERS = Owners(1, OWNED)

Open = Callable[..., FaissStore]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "faiss_index"


@pytest.fixture
def opened(directory: Path) -> Iterator[Open]:
    """Stores on one directory, one for each process that the test pretends to have."""
    stores: list[FaissStore] = []

    def open_one(owners: Owners | None = OWNERS, **options: Any) -> FaissStore:
        stores.append(FaissStore.open(directory, owners=owners, **options))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def legacy(directory: Path) -> np.ndarray[Any, Any]:
    """The vectors of IDS, saved by the old release."""
    return save_legacy(directory, IDS)


def contents(hits: list[Hit]) -> list[str]:
    return [hit.content for hit in hits]


def everything(store: FaissStore, users: tuple[int, ...] = (ANN, BEN)) -> dict[int, list[Any]]:
    """All that can be asked of every user."""
    return {
        user_id: [
            store.search(user_id, unit_vectors(1, 77)[0], 100),
            list(store.inventory(user_id)),
            store.count(user_id),
        ]
        for user_id in users
    }


# -- searching


def test_it_is_a_vector_store(opened: Open) -> None:
    store: VectorStore = opened()
    assert store.search(ANN, unit_vectors(1)[0], 3) == []


def test_only_the_users_own_chunks_are_found_best_first(opened: Open, legacy: np.ndarray[Any, Any]) -> None:
    store = opened()
    hits = store.search(BEN, legacy[0], 10)
    assert [(hit.chunk_id, hit.document_id) for hit in hits] == [(legacy_chunk_id("b1"), 20)]
    first, *others = store.search(ANN, legacy[0], 10)
    assert (first.content, first.metadata) == ("text of a1", {"source": "uploads/a.pdf", "page": 0})
    assert first.similarity == pytest.approx(1.0, abs=1e-6)
    assert len(others) == 2
    assert contents(store.search(ANN, legacy[4], 10)).count("text of nobody") == 0


@pytest.mark.parametrize("from_files", [0, 4, 8])
@pytest.mark.parametrize("k", [1, 3, 40, 200, 1000])
def test_the_answer_is_the_exact_one(opened: Open, k: int, from_files: int) -> None:
    store = opened()
    for document_id in range(1, 9):
        store.upsert(document_id % 2, document_id, made_chunks(document_id, 50))
        if document_id == from_files:
            store.save()
            store = opened()
    mine = [chunk for document_id in (1, 3, 5, 7) for chunk in made_chunks(document_id, 50)]
    query = unit_vectors(1, 3)[0]
    cosines = {chunk.id: float(chunk.vector.astype(float) @ query.astype(float)) for chunk in mine}
    expected = sorted(cosines, key=lambda one: (-cosines[one], one))[:k]
    hits = store.search(1, query, k)
    assert [hit.chunk_id for hit in hits] == expected
    assert [hit.similarity for hit in hits] == pytest.approx([cosines[one] for one in expected], abs=1e-6)


def test_equal_vectors_are_ordered_by_chunk_id_and_none_of_a_tie_is_lost(opened: Open) -> None:
    store = opened()
    same = unit_vectors(1, 9)[0]
    chunks = [replace(chunk, vector=same) for document_id in range(1, 41) for chunk in made_chunks(document_id, 1)]
    for chunk in chunks:
        store.upsert(ANN, chunk.document_id, [chunk])
    for k in (1, 3, 39):
        hits = store.search(ANN, unit_vectors(1, 4)[0], k)
        assert [hit.chunk_id for hit in hits] == sorted(chunk.id for chunk in chunks)[:k]
        assert len({hit.similarity for hit in hits}) == 1


@pytest.mark.parametrize("k", [0, -1])
def test_asking_for_none_gives_none(opened: Open, legacy: Any, k: int) -> None:
    assert opened().search(ANN, legacy[0], k) == []


def test_a_query_that_is_no_unit_vector_is_refused(opened: Open, legacy: Any) -> None:
    store = opened()
    for query in (np.zeros(1536, np.float32), np.full(1536, np.nan, np.float32), unit_vectors(1, 0, 384)[0]):
        with pytest.raises(InvalidVectorError):
            store.search(ANN, query, 3)


def test_vectors_that_are_no_unit_vectors_are_refused_and_nothing_is_written(opened: Open) -> None:
    store = opened()
    good, bad = made_chunks(7)
    with pytest.raises(InvalidVectorError, match="document 7"):
        store.upsert(ANN, 7, [good, replace(bad, vector=bad.vector * 2)])
    assert store.journal.position() == 0


# -- whose chunks they are


def test_before_owners_are_set_no_legacy_chunk_is_served(opened: Open, legacy: Any) -> None:
    store = opened(None)
    assert everything(store) == {ANN: [[], [], 0], BEN: [[], [], 0]}
    assert store.unowned() == IDS
    store.set_owners(OWNERS)
    assert store.count(ANN) == 3


def test_a_chunk_without_owner_is_served_to_nobody(opened: Open, legacy: Any) -> None:
    store = opened()
    for user_id in (*range(-1, 30), 10**12):
        assert "text of nobody" not in contents(store.search(user_id, legacy[4], 100))
    assert store.owner_of(legacy_chunk_id("nobody")) is None
    assert store.unowned() == ["nobody"]


def test_a_newer_assignment_replaces_and_an_older_one_changes_nothing(opened: Open, legacy: Any) -> None:
    store = opened(Owners(5, OWNED))
    store.set_owners(Owners(4, {}))
    assert (store.owners_version, store.count(ANN)) == (5, 3)
    store.set_owners(Owners(6, {"a1": Owner(BEN, 20, 1), "nobody": Owner(BEN, 30, 0)}))
    assert (store.owners_version, store.count(ANN), store.count(BEN)) == (6, 0, 2)
    assert store.users() == [BEN]
    assert {hit.document_id for hit in store.search(BEN, legacy[0], 9)} == {20, 30}
    assert store.document(10) == []


def test_the_owner_of_a_chunk_is_told(opened: Open, legacy: Any) -> None:
    store = opened()
    store.upsert(BEN, 21, made_chunks(21))
    assert store.owner_of(legacy_chunk_id("a2")) == ANN
    assert store.owner_of(made_chunks(21)[0].id) == BEN
    store.delete(BEN, 21)
    store.delete(ANN, 10)
    assert store.owner_of(legacy_chunk_id("a2")) is None
    assert store.owner_of(made_chunks(21)[0].id) is None
    assert store.owner_of(uuid.uuid4()) is None


def test_no_user_gets_anything_of_another_whatever_the_query(opened: Open) -> None:
    store = opened()
    users = range(1, 6)
    for user_id in users:
        for number in range(3):
            store.upsert(user_id, user_id * 10 + number, made_chunks(user_id * 10 + number, 4))
    for user_id in users:
        for other in users:
            near = made_chunks(other * 10, 4)[0].vector
            hits = store.search(user_id, near, 50)
            assert len(hits) == 12
            assert {hit.document_id // 10 for hit in hits} == {user_id}


# -- several processes on one directory


def test_every_process_finds_what_another_wrote(opened: Open) -> None:
    one, other = opened(), opened()
    chunks = made_chunks(7)
    one.upsert(ANN, 7, chunks)
    assert {hit.chunk_id for hit in other.search(ANN, chunks[0].vector, 5)} == {chunk.id for chunk in chunks}
    other.delete(ANN, 7)
    assert one.search(ANN, chunks[0].vector, 5) == []
    assert one.count(ANN) == 0
    with pytest.raises(DocumentGoneError):
        one.upsert(ANN, 7, chunks)


@pytest.mark.parametrize("ask", ["inventory", "document", "owner_of", "count", "counts", "users"])
def test_every_question_looks_at_the_journal_first(opened: Open, ask: str) -> None:
    one, other = opened(), opened()
    one.upsert(ANN, 7, made_chunks(7))
    answers: Mapping[str, Callable[[], Any]] = {
        "inventory": lambda: len(list(other.inventory(ANN))),
        "document": lambda: len(other.document(7)),
        "owner_of": lambda: other.owner_of(made_chunks(7)[0].id) == ANN and 2,
        "count": lambda: other.count(ANN),
        "counts": lambda: other.counts().owned,
        "users": lambda: 2 * len(other.users()),
    }
    assert answers[ask]() == 2


def test_writing_again_and_deleting_again_change_nothing(opened: Open) -> None:
    store = opened()
    store.upsert(ANN, 7, made_chunks(7))
    store.upsert(ANN, 7, made_chunks(7))
    assert store.count(ANN) == 2
    store.delete(ANN, 7)
    store.delete(ANN, 7)
    assert store.count(ANN) == 0


@pytest.mark.parametrize("first", ["owners", "deletion"])
def test_a_deleted_legacy_document_is_hidden_whatever_is_known_first(opened: Open, legacy: Any, first: str) -> None:
    store = opened(OWNERS if first == "owners" else None)
    store.delete(ANN, 10)
    store.tail()
    store.set_owners(OWNERS)
    store.set_owners(replace(OWNERS, version=9))
    assert {hit.document_id for hit in store.search(ANN, legacy[0], 9)} == {11}
    assert store.document(10) == []
    assert (store.count(ANN), opened().count(ANN)) == (1, 1)


def test_a_legacy_document_copied_back_from_the_other_store_is_not_doubled(opened: Open, legacy: Any) -> None:
    store = opened()
    copied = store.document(10)
    store.upsert(ANN, 10, copied)
    assert [hit.chunk_id for hit in store.search(ANN, legacy[0], 9)].count(legacy_chunk_id("a1")) == 1
    assert (store.count(ANN), store.counts().legacy) == (3, 3)
    store.delete(ANN, 10)
    assert store.count(ANN) == 1
    assert opened().count(ANN) == 1


def test_a_document_of_which_the_files_hold_a_part_is_completed(opened: Open, legacy: Any) -> None:
    chunks = [*opened().document(10), *[replace(chunk, ordinal=2) for chunk in made_chunks(10, 1)]]
    store = opened(Owners(1, {}))
    store.upsert(ANN, 10, chunks)
    assert [chunk.id for chunk in store.document(10)] == [chunk.id for chunk in chunks]


# -- what the other store is told


def test_a_document_comes_whole_and_in_order(opened: Open, legacy: Any) -> None:
    store = opened()
    ours = made_chunks(7, 3)
    store.upsert(ANN, 7, ours)
    for document_id, expected in ((7, ours), (10, None)):
        found = store.document(document_id)
        assert [chunk.ordinal for chunk in found] == list(range(len(found)))
        for chunk, other in zip(found, expected or found, strict=True):
            assert (chunk.id, chunk.content, chunk.metadata) == (other.id, other.content, other.metadata)
            assert np.array_equal(chunk.vector, other.vector)
    assert [chunk.id for chunk in store.document(10)] == [legacy_chunk_id("a1"), legacy_chunk_id("a2")]
    assert np.array_equal(store.document(10)[1].vector, legacy[1])
    assert store.document(99) == []


def test_legacy_text_is_told_as_the_other_store_can_hold_it(opened: Open, directory: Path) -> None:
    save_legacy(directory, ["odd"])
    store = opened(Owners(1, {"odd": Owner(ANN, 1, 0)}))
    chunk = store.document(1)[0]
    assert chunk.content == "text of odd  �"
    assert store.search(ANN, chunk.vector, 1)[0].content == chunk.content
    row = next(store.inventory(ANN))
    assert row.content_sha256 == content_hash(chunk.content)


def test_the_inventory_is_in_order_of_chunk_id_with_the_hashes_of_both_stores(
    opened: Open, legacy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.tools.rag_tools.migration.faiss_store.SLICE", 3)
    store = opened()
    for document_id in (7, 8):
        store.upsert(ANN, document_id, made_chunks(document_id, 4))
    rows = list(store.inventory(ANN))
    known = {chunk.id: chunk for document_id in (7, 8, 10, 11) for chunk in store.document(document_id)}
    assert [row.chunk_id for row in rows] == sorted(known)
    for row in rows:
        chunk = known[row.chunk_id]
        assert row.document_id == chunk.document_id
        assert (row.content_sha256, row.vector_sha256) == (content_hash(chunk.content), vector_hash(chunk.vector))


def test_an_inventory_leaves_out_what_is_deleted_or_given_away_while_it_is_read(
    opened: Open, legacy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.tools.rag_tools.migration.faiss_store.SLICE", 1)
    store = opened()
    store.upsert(ANN, 7, made_chunks(7, 4))
    rows = store.inventory(ANN)
    first = next(rows)
    store.delete(ANN, 7)
    store.set_owners(Owners(2, {name: Owner(BEN, 20, 0) for name in IDS}))
    store.tail()
    assert [row.chunk_id for row in rows] == []
    assert first.chunk_id in {chunk.id for chunk in made_chunks(7, 4)} | {legacy_chunk_id(name) for name in IDS}


def test_counts_tell_what_is_there(opened: Open, legacy: Any) -> None:
    store = opened()
    store.upsert(BEN, 7, made_chunks(7, 4))
    store.upsert(BEN, 8, made_chunks(8, 4))
    store.delete(BEN, 8)
    counts = store.counts()
    assert counts.by_user == {ANN: 3, BEN: 5}
    assert (counts.owned, counts.documents, counts.unowned, counts.legacy) == (8, 4, 1, 5)
    assert counts.journal_position == 3
    assert store.users() == [ANN, BEN]


def test_legacy_chunks_are_listed_by_position_for_deciding_whose_they_are(opened: Open, legacy: Any) -> None:
    store = opened(None)
    store.upsert(BEN, 7, made_chunks(7))
    rows = list(store.base_positions())
    assert [(row.position, row.docstore_id) for row in rows] == list(enumerate(IDS))
    assert [row.source for row in rows] == [f"uploads/{name[0]}.pdf" for name in IDS]
    assert (rows[2].content, rows[2].metadata["page"]) == ("text of b1", 2)
    store.set_owners(OWNERS)
    store.save()
    assert [row.docstore_id for row in opened().base_positions()] == IDS


def test_a_sample_is_of_legacy_texts_not_deleted_and_the_same_for_a_seed(opened: Open, legacy: Any) -> None:
    store = opened()
    store.upsert(BEN, 7, made_chunks(7, 30))
    store.delete(ANN, 10)
    store.tail()
    drawn = store.sample(20, seed=1)
    assert {one.docstore_id for one in drawn} == set(IDS) - {"a1", "a2"}
    for one in drawn:
        assert one.text == f"text of {one.docstore_id}"
        assert np.array_equal(one.vector, legacy[IDS.index(one.docstore_id)])
    ids = [[one.docstore_id for one in store.sample(2, seed)] for seed in (3, 3)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 2


# -- saving


def test_langchain_opens_what_is_saved_and_finds_everything_but_the_deleted(
    opened: Open, directory: Path, legacy: Any
) -> None:
    before = opened_by_langchain(directory)
    store = opened()
    kept, gone = made_chunks(7), made_chunks(8)
    for chunks in (kept, gone):
        store.upsert(BEN, chunks[0].document_id, chunks)
    store.delete(BEN, 8)
    store.delete(ANN, 10)
    generation = store.save()
    found = opened_by_langchain(directory)
    assert list(found) == ["b1", IDS[3], "nobody", *(str(chunk.id) for chunk in kept)]
    assert all(found[name] == before[name] for name in ("b1", IDS[3], "nobody"))
    for chunk in kept:
        assert found[str(chunk.id)] == (chunk.content, dict(chunk.metadata), chunk.vector.tobytes())
    assert (generation.chunks, generation.journal_position) == (5, 4)


def test_saving_changes_no_answer_neither_here_nor_in_a_new_process(opened: Open, legacy: Any) -> None:
    store = opened()
    store.upsert(BEN, 7, made_chunks(7))
    store.upsert(ANN, 8, made_chunks(8))
    store.upsert(ANN, 9, made_chunks(9))
    store.delete(ANN, 9)
    store.delete(ANN, 11)
    before = everything(store)
    store.save()
    again = opened()
    assert everything(store) == everything(again) == before
    assert again.counts().by_user == store.counts().by_user
    assert again.unowned() == store.unowned() == ["nobody"]
    store.upsert(BEN, 12, made_chunks(12))
    assert everything(store) == everything(again) == everything(opened())


def test_a_chunk_that_is_saved_belongs_to_its_owner_also_without_an_assignment(opened: Open) -> None:
    store = opened(None)
    store.upsert(BEN, 7, made_chunks(7))
    store.save()
    again = opened(None)
    assert (again.count(BEN), again.unowned(), list(again.base_positions())) == (2, [], [])
    again.set_owners(Owners(1, {str(made_chunks(7)[0].id): Owner(ANN, 1, 0)}))
    assert (again.count(BEN), again.count(ANN)) == (2, 0)


def test_a_document_deleted_after_a_save_is_hidden_and_gone_from_the_next(opened: Open, directory: Path) -> None:
    store = opened()
    chunks = made_chunks(7)
    store.upsert(BEN, 7, chunks)
    store.save()
    store.delete(BEN, 7)
    again = opened()
    assert (again.count(BEN), again.unowned()) == (0, [])
    again.save()
    assert opened_by_langchain(directory) == {}
    assert opened().counts().owned == 0


def test_nothing_new_makes_no_new_generation(opened: Open, directory: Path, legacy: Any) -> None:
    store = opened()
    first = store.save()
    assert store.save() == first == opened().save()
    store.upsert(ANN, 7, made_chunks(7))
    second = store.save()
    assert second.number == first.number + 1
    assert opened(None).save() == second
    old_release_adds(directory, ["old"])
    assert opened().save().number == second.number + 1


def test_a_day_of_uploads_and_deletions_grows_neither_memory_nor_disk(opened: Open, directory: Path) -> None:
    """Every hour ten documents come and the ten of the hour before go; two processes take turns, and save."""
    stores = [opened(), opened()]
    for hour in range(24):
        store = stores[hour % 2]
        for number in range(10):
            store.upsert(ANN, 100 + 10 * hour + number, made_chunks(100 + 10 * hour + number))
            if hour:
                store.delete(ANN, 90 + 10 * hour + number)
        for each in stores:
            each.save()
            assert each.count(ANN) == 20
            assert len(each._memory) <= 40
    sizes = {path.name: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    # What is there is 40 vectors; SQLite begins its log anew at 1,000 pages of 8 kB.
    assert sizes.pop(f"{JOURNAL_FILE}-wal") < 10_000_000
    assert sum(sizes.values()) < 1_000_000
    assert everything(opened()) == everything(stores[0]) == everything(stores[1])


def test_a_reader_that_began_before_memory_was_made_anew_ends_on_what_it_began_with(opened: Open) -> None:
    store = opened()
    for number in range(1, 5):
        store.upsert(ANN, number, made_chunks(number, 1))
    reading = store.inventory(ANN)
    first = next(reading)
    gone = [number for number in range(1, 5) if number != first.document_id]
    for number in gone:
        store.delete(ANN, number)
    store.save()
    assert len(store._memory) == 1
    assert {row.document_id for row in reading} <= set(gone)
    assert [row.document_id for row in store.inventory(ANN)] == [first.document_id]


def test_processes_save_in_turn_and_lose_nothing_of_each_other(opened: Open, directory: Path, legacy: Any) -> None:
    one, other = opened(), opened()
    one.upsert(ANN, 7, made_chunks(7))
    one.save()
    other.upsert(BEN, 8, made_chunks(8))
    other.save()
    one.upsert(BEN, 9, made_chunks(9))
    one.save()
    saved = {legacy_chunk_id(name) for name in opened_by_langchain(directory)}
    assert {chunk.id for document_id in (7, 8, 9) for chunk in made_chunks(document_id)} < saved
    assert len(saved) == len(IDS) + 6


def test_who_ends_while_another_saves_waits_and_saves_what_that_one_had_not_seen(
    opened: Open, directory: Path, legacy: Any
) -> None:
    store = opened()
    store.upsert(ANN, 7, made_chunks(7))
    with ThreadPoolExecutor(1) as threads, locked(directory / "save.lock", wait=False):
        saving = threads.submit(store.save_in_turn)
        while not waits_for_a_lock(directory / "save.lock"):
            assert not saving.done()
    saved = saving.result()
    assert saved == store.save()
    assert {str(chunk.id) for chunk in made_chunks(7)} < set(opened_by_langchain(directory))


def waits_for_a_lock(path: Path) -> bool:
    """Whether somebody waits for `flock` on the file, as the kernel tells."""
    inode = f":{path.stat().st_ino} "
    return any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


def test_on_top_of_what_the_old_release_wrote_the_journal_is_applied_by_id(
    opened: Open, directory: Path, legacy: Any
) -> None:
    store = opened()
    store.upsert(BEN, 7, made_chunks(7))
    store.upsert(BEN, 8, made_chunks(8))
    store.save()
    store.upsert(ANN, 9, made_chunks(9))
    store.delete(BEN, 8)
    before = everything(store)
    store.close()
    old_release_adds(directory, ["old"])
    again = opened()
    assert again.old_release_wrote
    assert everything(again) == before
    assert again.unowned() == ["nobody", "old"]
    again.save()
    found = opened_by_langchain(directory)
    assert set(found) == {*IDS, "old", *(str(c.id) for number in (7, 9) for c in made_chunks(number))}
    assert not opened().old_release_wrote


def test_the_old_release_on_a_directory_never_saved_is_taken_over_too(
    opened: Open, directory: Path, legacy: Any
) -> None:
    store = opened()
    store.upsert(ANN, 7, made_chunks(7))
    store.close()
    old_release_adds(directory, ["old"])
    again = opened()
    assert (again.count(ANN), again.unowned()) == (5, ["nobody", "old"])
    again.save()
    assert set(opened_by_langchain(directory)) == {*IDS, "old", *(str(c.id) for c in made_chunks(7))}


def test_nothing_is_saved_before_it_is_known_which_chunks_a_deleted_document_had(
    opened: Open, directory: Path, legacy: Any
) -> None:
    store = opened(None)
    store.delete(ANN, 10)
    with pytest.raises(OwnersUnknownError, match="connect to PostgreSQL and save again"):
        store.save()
    store.set_owners(OWNERS)
    store.save()
    assert set(opened_by_langchain(directory)) == set(IDS) - {"a1", "a2"}


def test_a_lost_journal_is_noticed(opened: Open, directory: Path) -> None:
    store = opened()
    store.upsert(ANN, 7, made_chunks(7))
    store.save()
    store.close()
    (directory / JOURNAL_FILE).unlink()
    with pytest.raises(JournalLostError, match="ends at entry 0, but the index was saved with 1"):
        opened()


def test_two_spellings_of_one_uuid_are_refused(opened: Open, directory: Path) -> None:
    name = str(uuid.UUID(int=2**100))
    save_legacy(directory, [name, name.replace("-", "")])
    with pytest.raises(MismatchedPairError, match="2 docstore ids of the index name only 1"):
        opened()


def test_a_second_host_and_a_network_disk_are_refused(opened: Open) -> None:
    opened(host=Host("m1", "alpha", "b1"))
    with pytest.raises(ForeignDirectoryError, match="belongs to host 'alpha'"):
        opened(host=Host("m2", "beta", "b2"))
    with pytest.raises(ForeignDirectoryError, match="nfs"):
        opened(mountinfo="22 1 0:30 / / rw - nfs server:/ rw")


def test_a_closed_store_says_so(opened: Open) -> None:
    store = opened()
    store.close()
    with pytest.raises(JournalError):
        store.search(ANN, unit_vectors(1)[0], 3)


# -- at once, and killed


def test_searches_go_on_while_others_write_assign_and_save(opened: Open, legacy: Any) -> None:
    store, other = opened(), opened()
    start, done = threading.Barrier(4), threading.Event()

    def write(into: FaissStore, first: int) -> None:
        start.wait()
        for document_id in range(first, first + 15):
            into.upsert(ANN, document_id, made_chunks(document_id, 5))
            if document_id % 3 == 0:
                into.delete(ANN, document_id)

    def assign_and_save() -> None:
        start.wait()
        for version in range(2, 12):
            store.set_owners(Owners(version, OWNED))
            if version % 4 == 0:
                store.save()

    def search() -> int:
        start.wait()
        searches = 0
        while not done.is_set():
            hits = store.search(ANN, legacy[0], 8)
            assert hits[0].chunk_id == legacy_chunk_id("a1")
            assert all(hit.document_id != 20 for hit in hits)
            assert [row.chunk_id for row in store.inventory(BEN)] == [legacy_chunk_id("b1")]
            searches += 1
        return searches

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, store, 100), pool.submit(write, other, 200), pool.submit(assign_and_save)]
        searcher = pool.submit(search)
        try:
            for writer in writers:
                writer.result()
        finally:
            done.set()
        assert searcher.result() > 0
    assert store.count(ANN) == other.count(ANN) == 3 + 5 * 20
    assert everything(store) == everything(other) == everything(opened())


WRITER = """
import sys
from pathlib import Path
from src.tools.rag_tools.migration.faiss_store import FaissStore
from tests.support.faiss_directory import made_chunks

store = FaissStore.open(Path(sys.argv[1]))
for document_id in range(1, 10_000):
    store.upsert(1, document_id, made_chunks(document_id, 3))
    print(document_id, flush=True)
    if document_id % 5 == 0:
        store.delete(1, document_id)
        print(-document_id, flush=True)
"""


def test_what_a_killed_process_had_acknowledged_is_there_whole(opened: Open, directory: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, directory], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer.stdout:
        told = [int(next(writer.stdout)) for _ in range(40)]
        writer.kill()
        told += [int(line) for line in writer.stdout if line.endswith("\n")]
    writer.wait()
    store = opened()
    deleted = {-number for number in told if number < 0}
    for document_id in {number for number in told if number > 0} - deleted:
        # The deletion that it was at when it died may have come about.
        expected = (0, 3) if document_id == max(told) and document_id % 5 == 0 else (3,)
        assert len(store.document(document_id)) in expected
    assert all(store.document(document_id) == [] for document_id in deleted)
    assert len(store.document(max(told) + 1)) in (0, 3)


def test_the_stages_are_known_without_loading_faiss() -> None:
    script = "import sys, src.tools.rag_tools.migration.stages; print('faiss' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "False"
