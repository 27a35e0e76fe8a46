"""What the journal has taken stays, in one order for everybody; a deletion is final."""

from __future__ import annotations

import datetime
import resource
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from src.tools.rag_tools.migration.faiss_disk import ForeignDirectoryError, Host, this_host
from src.tools.rag_tools.migration.faiss_journal import (
    Entry,
    Journal,
    JournalDocument,
    Op,
    WrongOwnerError,
    recorded_host,
)
from src.tools.rag_tools.migration.faiss_sqlite import (
    JOURNAL_FILE,
    JournalBusyError,
    JournalDamagedError,
    JournalError,
    JournalUnwritableError,
)
from src.tools.rag_tools.store import Chunk, DocumentGoneError, StoreError
from tests.support.faiss_directory import made_chunks

pytestmark = pytest.mark.migration

HOST = Host("m1", "alpha", "b1")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Journal]]:
    """Journals on one directory, one for each process that the test pretends to have."""
    journals: list[Journal] = []

    def open_one(directory: Path = tmp_path, **options: object) -> Journal:
        journals.append(Journal.open(directory, **{"host": HOST, **options}))  # type: ignore[arg-type]
        return journals[-1]

    yield open_one
    for journal in journals:
        journal.close()


@pytest.fixture
def journal(opened: Callable[..., Journal]) -> Journal:
    return opened()


def same(one: Chunk, other: Chunk) -> bool:
    parts = ("id", "document_id", "ordinal", "content", "metadata")
    return all(getattr(one, part) == getattr(other, part) for part in parts) and np.array_equal(
        one.vector, other.vector
    )


def test_a_document_comes_back_as_it_was_added(journal: Journal) -> None:
    chunks = made_chunks(7, 3)
    journal.append_add(1, 7, chunks)
    assert all(map(same, journal.document(7), chunks))
    assert [chunk.ordinal for chunk in journal.document(7)] == [0, 1, 2]


def test_what_json_and_sqlite_cannot_hold_is_normalised(journal: Journal) -> None:
    chunk = made_chunks(7, 1)[0]
    odd = Chunk(chunk.id, 7, 0, "a\0b\ud800", {"n": float("nan"), "s": {"s"}}, chunk.vector)
    journal.append_add(1, 7, [odd])
    kept = journal.document(7)[0]
    assert (kept.content, kept.metadata) == ("a b�", {"n": None, "s": ["s"]})


def test_entries_come_in_the_order_of_writing_and_in_batches(journal: Journal) -> None:
    chunks = made_chunks(7)
    journal.append_add(1, 7, chunks)
    journal.append_delete(2, 8)
    journal.append_add(1, 9, [])
    keys = tuple((chunk.id, chunk.ordinal) for chunk in chunks)
    expected = [
        Entry(1, Op.ADD, 7, 1, keys),
        Entry(2, Op.DELETE, 8, 2, ()),
        Entry(3, Op.ADD, 9, 1, ()),
    ]
    assert journal.entries_after(0, 10) == expected
    assert journal.entries_after(0, 2) == expected[:2]
    assert journal.entries_after(2, 10) == expected[2:]
    assert journal.entries_after(3, 10) == []
    assert journal.position() == 3


def test_adding_a_document_again_changes_nothing(journal: Journal) -> None:
    chunks = made_chunks(7)
    journal.append_add(1, 7, chunks)
    journal.append_add(1, 7, made_chunks(7, text="embedded again"))
    assert journal.position() == 1
    assert all(map(same, journal.document(7), chunks))


def test_a_deleted_document_is_never_added_again(journal: Journal) -> None:
    journal.append_add(1, 7, made_chunks(7))
    journal.append_delete(1, 7)
    with pytest.raises(DocumentGoneError, match="document 7 was deleted"):
        journal.append_add(1, 7, made_chunks(7))
    assert journal.document(7) == []


def test_a_document_deleted_before_it_was_ever_seen_is_never_added(journal: Journal) -> None:
    journal.append_delete(1, 7)
    with pytest.raises(DocumentGoneError):
        journal.append_add(1, 7, made_chunks(7))
    assert journal.position() == 1


def test_deleting_again_changes_nothing(journal: Journal) -> None:
    journal.append_delete(1, 7)
    journal.append_delete(1, 7)
    assert journal.position() == 1


def test_deleting_erases_the_content_from_the_file_but_keeps_the_chunk_ids(journal: Journal, tmp_path: Path) -> None:
    chunks = made_chunks(7, text="confidential words")
    journal.append_add(1, 7, chunks)
    journal.append_add(1, 8, made_chunks(8, text="other words"))
    journal.append_delete(1, 7)
    assert [key for key, _ in journal.entries_after(0, 1)[0].keys] == [chunk.id for chunk in chunks]
    journal.close()
    assert [file.name for file in tmp_path.glob(f"{JOURNAL_FILE}*")] == [JOURNAL_FILE]
    content = (tmp_path / JOURNAL_FILE).read_bytes()
    assert b"other words" in content
    assert b"confidential" not in content
    assert chunks[0].vector.tobytes()[:64] not in content


def test_a_document_of_one_user_is_not_written_for_another(journal: Journal) -> None:
    journal.append_add(1, 7, made_chunks(7))
    with pytest.raises(WrongOwnerError, match="document 7 of user 1, not of user 2"):
        journal.append_add(2, 7, [])
    with pytest.raises(WrongOwnerError, match="document 7 of user 1, not of user 2"):
        journal.append_delete(2, 7)
    assert journal.position() == 1
    assert len(journal.document(7)) == 2


def test_a_chunk_of_another_document_is_refused_and_nothing_is_written(journal: Journal) -> None:
    with pytest.raises(JournalError, match="of document 8, not of document 7"):
        journal.append_add(1, 7, [*made_chunks(7), *made_chunks(8)])
    assert journal.position() == 0


def test_a_document_is_written_whole_or_not_at_all(journal: Journal) -> None:
    chunks = made_chunks(7)
    with pytest.raises(JournalError):
        journal.append_add(1, 7, [*chunks, chunks[0]])
    assert (journal.position(), journal.document(7)) == (0, [])
    journal.append_add(1, 7, chunks)
    assert len(journal.document(7)) == 2


def test_the_inventory_names_what_is_there(journal: Journal) -> None:
    journal.append_add(2, 9, made_chunks(9, 3))
    journal.append_add(1, 7, made_chunks(7))
    journal.append_add(1, 8, [])
    journal.append_delete(1, 7)
    assert journal.inventory() == [JournalDocument(8, 1, 0), JournalDocument(9, 2, 3)]


def test_entries_tell_when_they_were_made(tmp_path: Path, opened: Callable[..., Journal]) -> None:
    at = datetime.datetime(2024, 5, 6, 7, 8, tzinfo=datetime.UTC)
    opened(now=lambda: at).append_delete(1, 7)
    with sqlite3.connect(tmp_path / JOURNAL_FILE) as connection:
        assert connection.execute("SELECT at FROM entries").fetchall() == [(at.isoformat(),)]
    connection.close()


def test_every_process_reads_what_another_wrote(opened: Callable[..., Journal]) -> None:
    one, other = opened(), opened()
    one.append_add(1, 7, made_chunks(7))
    assert other.position() == 1
    other.append_delete(1, 7)
    assert one.document(7) == []
    with pytest.raises(DocumentGoneError):
        one.append_add(1, 7, made_chunks(7))


def test_many_writers_lose_nothing(opened: Callable[..., Journal]) -> None:
    journals = [opened(), opened()]
    start = threading.Barrier(8)

    def write(writer: int) -> None:
        start.wait()
        for number in range(5):
            document_id = writer * 100 + number
            journals[writer % 2].append_add(writer, document_id, made_chunks(document_id, 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    entries = journals[0].entries_after(0, 100)
    assert [entry.seq for entry in entries] == list(range(1, 41))
    assert {entry.document_id for entry in entries} == {
        writer * 100 + number for writer in range(8) for number in range(5)
    }


def test_of_a_deletion_and_an_addition_at_once_the_deletion_wins(
    opened: Callable[..., Journal],
) -> None:
    one, other = opened(), opened()
    start = threading.Barrier(2)

    def add(document_id: int) -> bool:
        start.wait()
        try:
            one.append_add(1, document_id, made_chunks(document_id, 1))
        except DocumentGoneError:
            return False
        return True

    def delete(document_id: int) -> None:
        start.wait()
        other.append_delete(1, document_id)

    with ThreadPoolExecutor(2) as pool:
        for document_id in range(10):
            added = pool.submit(add, document_id)
            pool.submit(delete, document_id).result()
            ops = [e.op for e in one.entries_after(0, 100) if e.document_id == document_id]
            assert ops == ([Op.ADD, Op.DELETE] if added.result() else [Op.DELETE])
            assert one.document(document_id) == []


def test_many_processes_may_open_a_new_directory_at_once(tmp_path: Path, opened: Callable[..., Journal]) -> None:
    start = threading.Barrier(6)

    def begin(number: int) -> None:
        start.wait()
        opened(tmp_path / "deep" / "new").append_delete(1, number)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(begin, range(6)))
    assert opened(tmp_path / "deep" / "new").position() == 6


def test_a_half_made_journal_of_a_process_that_died_is_made_anew(
    tmp_path: Path, opened: Callable[..., Journal]
) -> None:
    (tmp_path / "journal.new").write_bytes(b"half")
    (tmp_path / "journal.new-wal").write_bytes(b"half")
    assert opened().position() == 0
    assert not list(tmp_path.glob("journal.new*"))


# -- when it cannot be used


def test_reading_goes_on_while_another_process_writes_and_writing_says_so(
    tmp_path: Path, opened: Callable[..., Journal]
) -> None:
    journal = opened(busy_seconds=0)
    journal.append_add(1, 7, made_chunks(7))
    stuck = sqlite3.connect(tmp_path / JOURNAL_FILE, isolation_level=None)
    stuck.execute("BEGIN IMMEDIATE")
    assert journal.position() == 1
    with pytest.raises(JournalBusyError, match="fuser"):
        journal.append_delete(1, 7)
    stuck.execute("ROLLBACK")
    stuck.close()
    journal.append_delete(1, 7)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"no database" * 1000,
        lambda content: content[: len(content) // 2],
        lambda content: content[:8192] + b"\xff" * 8192 + content[16384:],
        lambda content: content[:-8192] + b"\xee" * 8192,
    ],
    ids=["empty", "garbage", "cut short", "tables", "chunks"],
)
def test_a_damaged_journal_is_refused_with_advice(
    tmp_path: Path, opened: Callable[..., Journal], damage: Callable[[bytes], bytes]
) -> None:
    journal = opened()
    for document_id in range(4):
        journal.append_add(1, document_id, made_chunks(document_id))
    journal.close()
    path = tmp_path / JOURNAL_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(JournalDamagedError, match="restore them from a backup") as refused:
        opened()
    assert str(path) in str(refused.value)


def test_a_journal_of_a_later_release_is_refused(tmp_path: Path, opened: Callable[..., Journal]) -> None:
    opened().close()
    connection = sqlite3.connect(tmp_path / JOURNAL_FILE)
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(JournalDamagedError, match="format 9"):
        opened()


def test_a_vector_of_another_length_is_damage(tmp_path: Path, opened: Callable[..., Journal]) -> None:
    journal = opened()
    journal.append_add(1, 7, made_chunks(7))
    with sqlite3.connect(tmp_path / JOURNAL_FILE) as connection:
        connection.execute("UPDATE chunks SET vector = substr(vector, 5)")
    connection.close()
    with pytest.raises(JournalDamagedError, match="document 7"):
        journal.document(7)


def test_a_full_disk_leaves_the_journal_as_it_was(opened: Callable[..., Journal]) -> None:
    journal = opened()
    journal.append_add(1, 1, made_chunks(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(JournalUnwritableError, match="Free space"):
            journal.append_add(1, 7, made_chunks(7, 40))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (journal.position(), journal.document(7)) == (1, [])
    journal.append_add(1, 7, made_chunks(7, 40))
    assert len(journal.document(7)) == 40


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, opened: Callable[..., Journal]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JournalUnwritableError, match=r"file.journal\.sqlite cannot be written"):
        opened(tmp_path / "file")


def test_a_closed_journal_says_so(journal: Journal) -> None:
    journal.close()
    journal.close()
    with pytest.raises(StoreError):
        journal.position()
    with pytest.raises(StoreError):
        journal.append_delete(1, 7)


# -- one host


@pytest.mark.parametrize(
    "host",
    [
        Host("m2", "alpha", "b2"),
        Host("m2", "beta", "b2"),
        Host("", "beta", "b2"),
        Host("m2", "beta", ""),
    ],
)
def test_a_second_host_is_refused(opened: Callable[..., Journal], host: Host) -> None:
    opened()
    with pytest.raises(ForeignDirectoryError, match="belongs to host 'alpha'"):
        opened(host=host)


@pytest.mark.parametrize(
    ("host", "why"),
    [
        (Host("m1", "beta", "b2"), "renamed and started again"),
        (Host("m9", "c0ffee", "b1"), "another container on the same kernel"),
        (Host("", "alpha", "b2"), "known by its name only"),
    ],
)
def test_the_same_host_is_known_again(tmp_path: Path, opened: Callable[..., Journal], host: Host, why: str) -> None:
    opened()
    opened(host=host).append_delete(1, 7)
    assert recorded_host(tmp_path) == host, why


def test_a_directory_is_handed_over_to_another_host(tmp_path: Path, opened: Callable[..., Journal]) -> None:
    other = Host("m2", "beta", "b2")
    opened().set_host(other)
    assert opened(host=other).position() == 0
    with pytest.raises(ForeignDirectoryError):
        opened()


def test_the_advice_for_a_moved_directory_works(tmp_path: Path, opened: Callable[..., Journal]) -> None:
    opened()
    with pytest.raises(ForeignDirectoryError) as refused:
        opened(host=Host("m2", "beta", "b2"))
    statement = str(refused.value).split('"')[1]
    with sqlite3.connect(tmp_path / JOURNAL_FILE) as connection:
        connection.execute(statement)
    connection.close()
    assert opened(host=Host("m2", "beta", "b2")).position() == 0


def test_asking_for_the_host_makes_no_journal(tmp_path: Path) -> None:
    assert recorded_host(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_without_a_host_given_it_is_this_one(tmp_path: Path, opened: Callable[..., Journal]) -> None:
    opened(host=None)
    assert recorded_host(tmp_path) == this_host()
