"""A kept result is whole or absent, is never replaced, and never anything but what was kept."""

from __future__ import annotations

import errno
import io
import os
import resource
import threading
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.tools.rag_tools import kept
from src.tools.rag_tools.kept import KeepError, KeptDamagedError
from src.tools.rag_tools.store import DIMENSION, Chunk, StoreError, chunk_id
from tests.support.openai_server import hashed_vectors

METADATA = {"source": "uploads/a.pdf", "page": 3, "title": "Grüße, 東京", "nested": {"a": [1, None]}}


def chunks_of(document_id: int, *contents: str) -> list[Chunk]:
    vectors = hashed_vectors([f"{document_id}: {content}" for content in contents])
    return [
        Chunk(chunk_id(document_id, ordinal, content), document_id, ordinal, content, METADATA, vector)
        for ordinal, (content, vector) in enumerate(zip(contents, vectors, strict=True))
    ]


def plain(chunks: list[Chunk] | None) -> Any:
    """What two chunks must have in common; their vectors to the bit."""
    assert chunks is not None
    return [(one.id, one.document_id, one.ordinal, one.content, one.metadata, one.vector.tobytes()) for one in chunks]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return kept.kept_path(tmp_path / "a.pdf")


@pytest.fixture
def written(place: Path) -> bytes:
    kept.keep(place, chunks_of(7, "one", "two"))
    return place.read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_what_is_kept_is_what_is_loaded(place: Path) -> None:
    chunks = chunks_of(7, "one", "zwei 😀", "\n")
    assert plain(kept.keep(place, chunks)) == plain(chunks)
    loaded = kept.load(place, 7)
    assert plain(loaded) == plain(chunks)
    assert all(chunk.vector.dtype == np.float32 for chunk in loaded or [])
    assert names(place.parent) == ["a.pdf.kept.npz"]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=4),
    metadata=st.dictionaries(
        st.text(st.characters(codec="utf-8")),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("aé\n"),
    ),
)
def test_any_content_and_metadata_come_back(place: Path, contents: list[str], metadata: dict[str, Any]) -> None:
    kept.forget(place)
    chunks = [
        Chunk(uuid.uuid4(), 1, number, content, metadata, vector)
        for number, (content, vector) in enumerate(zip(contents, hashed_vectors(contents), strict=True))
    ]
    kept.keep(place, chunks)
    assert plain(kept.load(place, 1)) == plain(chunks)


def test_the_file_lies_beside_the_upload_and_may_be_named_by_document() -> None:
    upload = Path("uploads/a.pdf")
    assert kept.kept_path(upload) == Path("uploads/a.pdf.kept.npz")
    assert kept.kept_path(upload, 7) == Path("uploads/a.pdf.7.kept.npz")


def test_nothing_kept_is_none(place: Path) -> None:
    assert kept.load(place, 7) is None


def test_forgetting_twice_is_forgetting_once(place: Path, written: bytes) -> None:
    kept.forget(place)
    kept.forget(place)
    assert kept.load(place, 7) is None
    assert names(place.parent) == []


def test_forgetting_in_a_folder_that_is_gone_is_fine(tmp_path: Path) -> None:
    kept.forget(tmp_path / "gone" / "a.pdf.kept.npz")


def test_forgetting_takes_what_a_killed_writer_left_and_nothing_else(tmp_path: Path) -> None:
    place, other = (kept.kept_path(tmp_path / name) for name in ("a[1].pdf", "b.pdf"))
    kept.keep(other, chunks_of(8, "other"))
    (tmp_path / "a[1].pdf").touch()
    for left in (place, other):
        left.with_name(f"{left.name}.0123.part").touch()
    kept.forget(place)
    assert names(tmp_path) == ["a[1].pdf", "b.pdf.kept.npz", "b.pdf.kept.npz.0123.part"]


def test_the_first_result_kept_wins_and_the_second_caller_is_given_it(place: Path) -> None:
    first, second = chunks_of(7, "one"), chunks_of(7, "other vectors")
    kept.keep(place, first)
    assert plain(kept.keep(place, second)) == plain(first)
    assert plain(kept.load(place, 7)) == plain(first)
    assert names(place.parent) == ["a.pdf.kept.npz"]


def test_writers_at_once_all_get_one_result(place: Path) -> None:
    barrier = threading.Barrier(6)
    results: list[Any] = []

    def write(number: int) -> None:
        chunks = chunks_of(7, f"by {number}")
        barrier.wait()
        results.append(plain(kept.keep(place, chunks)))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert results == [plain(kept.load(place, 7))] * 6
    assert names(place.parent) == ["a.pdf.kept.npz"]


def test_a_result_forgotten_between_being_found_and_read_is_kept_anew(
    place: Path, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = kept.load

    def forgotten_meanwhile(path: Path, document_id: int) -> list[Chunk] | None:
        kept.forget(path)
        return load(path, document_id)

    monkeypatch.setattr(kept, "load", forgotten_meanwhile)
    chunks = chunks_of(7, "three")
    assert plain(kept.keep(place, chunks)) == plain(chunks)
    assert plain(load(place, 7)) == plain(chunks)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1_000, -65, -64, -1])
def test_a_file_cut_short_is_damaged(place: Path, written: bytes, length: int) -> None:
    place.write_bytes(written[:length])
    with pytest.raises(KeptDamagedError, match="is damaged or cut short"):
        kept.load(place, 7)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_is_damage(place: Path, written: bytes, data: st.DataObject) -> None:
    damaged = bytearray(written)
    damaged[data.draw(st.integers(0, len(written) - 1))] ^= data.draw(st.integers(1, 255))
    place.write_bytes(bytes(damaged))
    with pytest.raises(KeptDamagedError):
        kept.load(place, 7)


def test_damage_is_not_overwritten_and_the_message_says_what_it_costs(place: Path, written: bytes) -> None:
    place.write_bytes(written[:-1])
    with pytest.raises(KeptDamagedError, match="embedding again gives other vectors"):
        kept.keep(place, chunks_of(7, "one"))
    assert place.read_bytes() == written[:-1]


def test_another_documents_result_is_not_taken(place: Path, written: bytes) -> None:
    with pytest.raises(KeptDamagedError, match="belongs to document 7, not 8"):
        kept.load(place, 8)
    with pytest.raises(KeptDamagedError, match="belongs to document 7, not 8"):
        kept.keep(place, chunks_of(8, "one"))


def test_another_releases_format_is_refused_with_both_numbers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "FORMAT_VERSION", 2)
    kept.keep(place, chunks_of(7, "one"))
    monkeypatch.undo()
    with pytest.raises(KeptDamagedError, match="has format 2, this release reads 1"):
        kept.load(place, 7)


def test_the_file_is_an_ordinary_archive_without_pickles(place: Path, written: bytes) -> None:
    with zipfile.ZipFile(place) as archive:
        assert archive.testzip() is None
        assert archive.comment == written[-64:]
    with np.load(io.BytesIO(written), allow_pickle=False) as arrays:
        assert arrays["vectors"].shape == (2, DIMENSION)
        assert {arrays[name].dtype.hasobject for name in arrays.files} == {False}


@pytest.mark.parametrize("name", ["a.pdf", "a.npz"])
def test_an_upload_is_never_taken_for_the_place_to_keep(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"use kept_path\(upload\)"):
        kept.keep(tmp_path / name, chunks_of(7, "one"))


@pytest.mark.parametrize("chunks", [[], [*chunks_of(7, "one"), *chunks_of(8, "two")]])
def test_a_file_keeps_one_document(place: Path, chunks: list[Chunk]) -> None:
    with pytest.raises(ValueError, match="keeps the chunks of one document"):
        kept.keep(place, chunks)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: a disk that fills up while writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_while_writing_leaves_nothing(place: Path) -> None:
    chunks = chunks_of(7, "one", "two")
    with files_limited_to(10_000), pytest.raises(KeepError, match=r"cannot write .*File too large"):
        kept.keep(place, chunks)
    assert names(place.parent) == []
    assert plain(kept.keep(place, chunks)) == plain(chunks)


@pytest.mark.parametrize("step", ["fsync", "link"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_is_told_and_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(KeepError, match=os.strerror(code)) as caught:
        kept.keep(place, chunks_of(7, "one"))
    assert isinstance(caught.value, StoreError)
    assert str(place) in str(caught.value)
    assert names(place.parent) == []


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeepError, match=r"cannot write .*No such file or directory"):
        kept.keep(kept.kept_path(tmp_path / "gone" / "a.pdf"), chunks_of(7, "one"))


def test_a_file_that_cannot_be_read_is_not_taken_for_absent(place: Path) -> None:
    place.mkdir()
    with pytest.raises(KeepError, match=r"cannot read .*Is a directory") as caught:
        kept.load(place, 7)
    assert not isinstance(caught.value, KeptDamagedError)


def test_content_and_folder_are_on_disk_before_the_name_and_the_return(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, link = os.fsync, os.link

    def synced(descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append("sync folder" if target == place.parent else f"sync {target.suffix}")
        fsync(descriptor)

    def linked(source: Path, target: Path) -> None:
        steps.append("name")
        link(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    kept.keep(place, chunks_of(7, "one"))
    assert steps == ["sync .part", "name", "sync folder"]


def test_what_another_process_kept_is_on_disk_before_it_is_used(
    place: Path, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(kept, "_sync_folder", synced.append)
    kept.load(place, 7)
    assert synced == [place.parent]
