"""The archive of the FAISS directory: whole or not there, opened again, and refused once it is something else."""

from __future__ import annotations

import io
import os
import resource
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rollout import archive, steps
from rollout.control import Control
from rollout.errors import PreconditionError, RefusedError
from src.tools.rag_tools.migration.faiss_generations import current_generation
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.store import StoreError
from tests.support.control import control_on
from tests.support.faiss_directory import opened_by_langchain, save_legacy
from tests.support.routers import add_users, router_on, set_stage, write_note

pytestmark = pytest.mark.migration

Change = Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]

RECORDS = "SELECT path, chunks, restored_at IS NOT NULL FROM faiss_archives ORDER BY id"


@pytest.fixture
def control(configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    """In `complete`: three chunks of the old release's, two documents of this one, and one deleted since."""
    save_legacy(tmp_path / "faiss_index", ["old1", "old2", "odd"])
    (user,) = add_users(configured_database, 1)
    with configured_database.connect(autocommit=True) as connection:
        set_stage(connection, Stage.RAMPDOWN, 100)
        with router_on(configured_database, tmp_path) as router:
            made = [router.receive(user, write_note(tmp_path, f"{n}.md", f"Note {n}."), f"{n}.md") for n in range(3)]
            for document in made:
                router.index(document)
            set_stage(connection, Stage.COMPLETE, 100)
            router.refresh()
            router.delete(user, made[0])
    with control_on(tmp_path, monkeypatch) as opened:
        yield opened


@pytest.fixture
def tar(control: Control, tmp_path: Path) -> Path:
    """Written, and never restored."""
    archive.write(control, tmp_path / "faiss.tar")
    return tmp_path / "faiss.tar"


def records(control: Control) -> list[tuple[str, int, bool]]:
    with control.connection() as connection:
        return connection.execute(RECORDS).fetchall()


def changed(tar: Path, change: Change) -> Path:
    """A copy of the archive whose members and their bytes were changed."""
    with tarfile.open(tar) as source:
        members = [(each, source.extractfile(each).read()) for each in source.getmembers()]  # type: ignore[union-attr]
    change(members)
    copy = tar.with_name("changed.tar")
    with tarfile.open(copy, "w") as target:
        for entry, data in members:
            entry.size = len(data)
            target.addfile(entry, io.BytesIO(data))
    return copy


# -- what it holds


def test_an_archive_opens_again_and_holds_what_was_written_and_not_deleted(control: Control, tmp_path: Path) -> None:
    written = archive.write(control, tmp_path / "faiss.tar")
    assert (written.chunks, records(control)) == (5, [(str(tmp_path / "faiss.tar"), 5, False)])
    restored = archive.restore(control, tmp_path / "faiss.tar", tmp_path / "restored")
    assert (restored.chunks, restored.differences, restored.recorded) == (5, 0, True)
    assert records(control) == [(str(tmp_path / "faiss.tar"), 5, True)]
    found = opened_by_langchain(tmp_path / "restored")
    assert found == opened_by_langchain(control.faiss.directory)
    assert {text for text, _, _ in found.values()} >= {"Note 1.", "Note 2."}
    assert "Note 0." not in {text for text, _, _ in found.values()}, "deleted in a stage that does not write FAISS"


def test_an_archive_can_be_checked_without_this_project(tar: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    subprocess.run(["tar", "--extract", "--file", tar, "--directory", plain], check=True)
    told = subprocess.run(["sha256sum", "--check", archive.SUMS], cwd=plain, check=True, capture_output=True, text=True)
    assert told.stdout.count(": OK") == len(archive.MEMBERS)


def test_an_archive_that_is_not_what_is_in_use_says_so_and_counts_as_never_restored(
    control: Control, tar: Path, configured_database: Any, tmp_path: Path
) -> None:
    save_legacy(tmp_path / "elsewhere", ["old1", "old2", "other"])
    for name in ("index.faiss", "index.pkl"):
        (control.faiss.directory / name).unlink()
        shutil.copy(tmp_path / "elsewhere" / name, control.faiss.directory / name)
    restored = archive.restore(control, tar, tmp_path / "restored")
    assert (restored.differences, restored.recorded) == (4, False)
    assert records(control) == [(str(tar), 5, False)]


def test_an_archive_that_another_database_knows_is_not_recorded_in_this_one(
    control: Control, tar: Path, configured_database: Any, tmp_path: Path
) -> None:
    with configured_database.connect(autocommit=True) as connection:
        connection.execute("DELETE FROM faiss_archives")
    restored = archive.restore(control, tar, tmp_path / "restored")
    assert (restored.differences, restored.recorded) == (0, False)


# -- what cannot be archived


def test_a_file_that_was_cut_or_damaged_behind_our_back_is_not_archived(control: Control, tmp_path: Path) -> None:
    settle_and_save(control)
    generation = current_generation(control.faiss.directory)
    assert generation is not None
    index = generation.path / "index.faiss"
    whole, stat = index.read_bytes(), index.stat()
    # The same size and the same time: only the hash tells.
    index.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(index, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(RefusedError, match="is not as it was saved"):
        archive.write(control, tmp_path / "faiss.tar")
    index.write_bytes(whole[:-100])
    with pytest.raises(StoreError):
        archive.write(control, tmp_path / "faiss.tar")
    assert not [path.name for path in tmp_path.iterdir() if "tar" in path.name or "archive" in path.name]
    assert records(control) == []


def test_a_name_that_is_taken_is_left_as_it_is(control: Control, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with pytest.raises(RefusedError, match="is there already"):
        archive.write(control, taken)
    with pytest.raises(RefusedError, match="is there already"):
        archive.restore(control, taken, taken)
    with pytest.raises(PreconditionError, match="is no folder"):
        archive.write(control, tmp_path / "nowhere" / "faiss.tar")
    assert taken.read_text() == "mine"


@pytest.mark.parametrize("part", ["journal", "tar"])
def test_a_full_disk_leaves_no_archive_and_no_record(control: Control, tmp_path: Path, part: str) -> None:
    settle_and_save(control)
    journal = (control.faiss.directory / "journal.sqlite").stat().st_size
    room = journal // 2 if part == "journal" else journal + 4_096
    with files_of_at_most(room), pytest.raises(PreconditionError, match="could not be written"):
        archive.write(control, tmp_path / "faiss.tar")
    assert not [path.name for path in tmp_path.iterdir() if "tar" in path.name or "archive" in path.name]
    assert records(control) == []
    assert archive.write(control, tmp_path / "faiss.tar").chunks == 5


def test_a_disk_that_is_full_when_it_is_restored_leaves_no_folder(control: Control, tar: Path, tmp_path: Path) -> None:
    with files_of_at_most(16_384), pytest.raises(PreconditionError, match="could not be written"):
        archive.restore(control, tar, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    assert records(control) == [(str(tar), 5, False)]


def settle_and_save(control: Control) -> None:
    """What writing an archive begins with, so that nothing is left to be done there."""
    steps.settle_store(control, Store.FAISS)
    control.faiss.save()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """This process can write no file past `size` bytes: the system refuses it as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -- what was archived, and is something else now


def _flip(name: str) -> Change:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        at = next(at for at, (entry, _) in enumerate(members) if entry.name == name)
        entry, data = members[at]
        members[at] = (entry, data[:-1] + bytes([data[-1] ^ 1]))

    return change


def _rename(old: str, new: str) -> Change:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        next(entry for entry, _ in members if entry.name == old).name = new

    return change


def _link(name: str, target: str) -> Change:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        at = next(at for at, (entry, _) in enumerate(members) if entry.name == name)
        made = tarfile.TarInfo(name)
        made.type, made.linkname = tarfile.SYMTYPE, target
        members[at] = (made, b"")

    return change


def _add(name: str) -> Change:
    return lambda members: members.append((tarfile.TarInfo(name), b"planted"))


def _forget(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """Of a file that is in no sum nobody could say that it is the one."""
    at = next(at for at, (entry, _) in enumerate(members) if entry.name == archive.SUMS)
    entry, data = members[at]
    members[at] = (entry, b"".join(line for line in data.splitlines(keepends=True) if b"index.pkl" not in line))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_flip("index.pkl"), "index.pkl in .* its hash differs"),
        (_flip("journal.sqlite"), "journal.sqlite in .* its hash differs"),
        (_forget, "index.pkl in .* its hash differs"),
        (_rename("index.pkl", "../outside"), "no archive of FAISS"),
        (_rename("index.pkl", "/tmp/outside"), "no archive of FAISS"),
        (_add("../outside"), "no archive of FAISS"),
        (_add("index.pkl"), "no archive of FAISS"),
        (_link("index.pkl", "/etc/passwd"), "something else than plain files"),
        (_link(archive.SUMS, "../outside"), "something else than plain files"),
    ],
)
def test_an_archive_that_was_changed_is_refused_and_nothing_of_it_stays(
    control: Control, tar: Path, tmp_path: Path, change: Change, why: str
) -> None:
    with pytest.raises(RefusedError, match=why):
        archive.restore(control, changed(tar, change), tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    assert not (tmp_path / "outside").exists()
    assert records(control) == [(str(tar), 5, False)]


@pytest.mark.parametrize("length", [0, 300, 5_000, 20_000])
def test_an_archive_that_was_cut_is_refused_and_nothing_of_it_stays(
    control: Control, tar: Path, tmp_path: Path, length: int
) -> None:
    os.truncate(tar, length)
    with pytest.raises(RefusedError):
        archive.restore(control, tar, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_an_archive_that_is_not_there_is_a_precondition(control: Control, tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="could not be written or read"):
        archive.restore(control, tmp_path / "faiss.tar", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_what_cannot_be_recorded_is_not_written(control: Control, configured_database: Any, tmp_path: Path) -> None:
    """As in a database that lacks the revision: the same command must do once it is there."""
    with configured_database.connect(autocommit=True) as connection:
        connection.execute("ALTER TABLE faiss_archives RENAME TO not_yet")
        with pytest.raises(PreconditionError, match="alembic upgrade head"):
            archive.write(control, tmp_path / "faiss.tar")
        assert not (tmp_path / "faiss.tar").exists()
        connection.execute("ALTER TABLE not_yet RENAME TO faiss_archives")
    assert archive.write(control, tmp_path / "faiss.tar").recorded
