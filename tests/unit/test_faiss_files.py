"""What is opened is whole and of a kind that is understood; what is saved, LangChain opens."""

from __future__ import annotations

import datetime
import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from src.tools.rag_tools.migration import faiss_files
from src.tools.rag_tools.migration.faiss_disk import (
    FaissDirectoryError,
    ForeignDirectoryError,
    Host,
    locked,
    refuse_network,
)
from src.tools.rag_tools.migration.faiss_files import (
    ChangingError,
    MissingFileError,
    SavedIndex,
    SaveFailedError,
    SaveInProgressError,
    UnreadableError,
    old_release_wrote,
    open_files,
    refuse_foreign,
    save_generation,
)
from src.tools.rag_tools.migration.faiss_format import hash_file, read_pair
from src.tools.rag_tools.migration.faiss_generations import Generation, ManifestError, stamp
from src.tools.rag_tools.migration.faiss_index import (
    DamagedIndexError,
    NotUnitVectorError,
    UnsupportedIndexError,
    WrongDimensionError,
)
from src.tools.rag_tools.migration.faiss_journal import Journal
from src.tools.rag_tools.migration.faiss_pickle import HostilePickleError, MismatchedPairError
from src.tools.rag_tools.store import DIMENSION
from tests.support.faiss_directory import (
    found_in,
    made_content,
    old_release_adds,
    opened_by_langchain,
    save_legacy,
    unit_vectors,
)

pytestmark = pytest.mark.migration

HOST = Host("m1", "alpha", "b1")
AT = datetime.datetime(2024, 5, 6, 7, 8, tzinfo=datetime.UTC)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "faiss_index"


def save(directory: Path, *names: str, position: int = 0, opened: SavedIndex | None = None) -> Generation:
    seen = opened.stamp if opened else stamp(directory)
    return save_generation(
        directory, made_content(*names), journal_position=position, seen=seen, host=HOST, now=lambda: AT
    )


def write_index(directory: Path, index: Any) -> None:
    faiss.write_index(index, str(directory / "index.faiss"))


def filled(index: Any, rows: np.ndarray[Any, Any]) -> Any:
    if not index.is_trained:
        index.train(rows)
    index.add(rows)
    return index


def layout(directory: Path) -> dict[str, str]:
    """Every entry: where a link leads, or what kind it is."""
    return {
        str(path.relative_to(directory)): str(path.readlink()) if path.is_symlink() else "file"
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


# -- opening


def test_what_langchain_saved_is_opened_as_it_is(directory: Path) -> None:
    rows = save_legacy(directory, ["a", "b", "c"])
    opened = open_files(directory)
    assert found_in(opened.content) == opened_by_langchain(directory)
    assert np.array_equal(opened.content.index.reconstruct_n(0, 3), rows)
    assert (opened.generation, opened.old_release_wrote) == (None, False)


def test_opening_a_legacy_directory_changes_nothing_in_it(directory: Path) -> None:
    save_legacy(directory, ["a"])
    before = layout(directory), stamp(directory)
    open_files(directory)
    assert (layout(directory), stamp(directory)) == before


@pytest.mark.parametrize("made", [True, False])
def test_a_directory_without_an_index_is_empty(directory: Path, made: bool) -> None:
    if made:
        directory.mkdir()
    assert open_files(directory).content.index.ntotal == 0


@pytest.mark.parametrize("name", ["index.faiss", "index.pkl"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    save_legacy(directory, ["a"])
    (directory / name).unlink()
    with pytest.raises(MissingFileError, match=f"has no {name}.*from one backup"):
        open_files(directory)


def test_links_that_were_removed_do_not_make_an_empty_index(directory: Path) -> None:
    save(directory, "a")
    for name in ("index.faiss", "index.pkl"):
        (directory / name).unlink()
    with pytest.raises(MissingFileError, match="or link them again to current/"):
        open_files(directory)


def test_a_removed_link_to_the_current_generation_is_set_again(directory: Path) -> None:
    save(directory, "a")
    (directory / "current").unlink()
    assert list(found_in(open_files(directory).content)) == ["a"]
    assert list(opened_by_langchain(directory)) == ["a"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_an_index_cut_short_is_refused(directory: Path, share: float) -> None:
    save_legacy(directory, ["a", "b"])
    path = directory / "index.faiss"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DamagedIndexError, match=r"index\.faiss cannot be read"):
        open_files(directory)


def test_a_file_that_is_no_index_is_refused(directory: Path) -> None:
    save_legacy(directory, ["a"])
    (directory / "index.faiss").write_bytes(b"IxF2" + b"\xff" * 100)
    with pytest.raises(DamagedIndexError):
        open_files(directory)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: faiss.IndexFlatIP(DIMENSION), "METRIC_INNER_PRODUCT"),
        (lambda: faiss.IndexHNSWFlat(DIMENSION, 8), "IndexHNSWFlat"),
        (lambda: faiss.IndexIVFFlat(faiss.IndexFlatL2(DIMENSION), DIMENSION, 1), "IndexIVFFlat"),
        (lambda: faiss.IndexIDMap(faiss.IndexFlatL2(DIMENSION)), "IndexIDMap"),
        (lambda: faiss.IndexFlat(DIMENSION, faiss.METRIC_L1), "IndexFlat"),
        (lambda: faiss.IndexScalarQuantizer(DIMENSION, faiss.ScalarQuantizer.QT_8bit), "IndexScalarQuantizer"),
    ],
)
def test_an_index_of_another_kind_is_refused_by_name(directory: Path, make: Callable[[], Any], name: str) -> None:
    save_legacy(directory, ["a", "b"])
    index, rows = make(), unit_vectors(2)
    if isinstance(index, faiss.IndexIDMap):
        index.add_with_ids(rows, np.arange(2))
    else:
        filled(index, rows)
    write_index(directory, index)
    with pytest.raises(UnsupportedIndexError, match=f"{name}.*IndexFlatL2 is needed"):
        open_files(directory)


def test_an_index_that_langchain_normalised_is_supported(directory: Path) -> None:
    save_legacy(directory, ["a", "b"], normalize_L2=True)
    assert open_files(directory).content.index.ntotal == 2


def test_vectors_of_another_dimension_are_refused(directory: Path) -> None:
    save_legacy(directory, ["a", "b"])
    write_index(directory, filled(faiss.IndexFlatL2(384), unit_vectors(2, dimension=384)))
    with pytest.raises(WrongDimensionError, match="dimension 384, 1536 needed"):
        open_files(directory)


@pytest.mark.parametrize("factor", [0.0, 0.99, 1.01, 1e20, np.inf, np.nan])
def test_a_vector_not_of_length_1_is_named_by_position_and_docstore_id(directory: Path, factor: float) -> None:
    rows = save_legacy(directory, ["a", "b", "c"])
    rows[1] = 0.0 if factor == 0.0 else rows[1] * factor
    write_index(directory, filled(faiss.IndexFlatL2(DIMENSION), rows))
    with pytest.raises(NotUnitVectorError, match=r"position 1 \(docstore id 'b'\)"):
        open_files(directory)


def test_every_slice_is_checked(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = save_legacy(directory, list("abcde"))
    rows[4] *= 2
    write_index(directory, filled(faiss.IndexFlatL2(DIMENSION), rows))
    monkeypatch.setattr("src.tools.rag_tools.migration.faiss_index.SLICE", 2)
    with pytest.raises(NotUnitVectorError, match=r"position 4 .*'e'.*length 2,"):
        open_files(directory)


def test_a_pair_torn_by_the_old_release_is_refused(directory: Path, tmp_path: Path) -> None:
    save_legacy(directory, ["a", "b"])
    save_legacy(tmp_path / "other", ["a", "b", "c"])
    shutil.copy(tmp_path / "other" / "index.faiss", directory)
    with pytest.raises(MismatchedPairError, match=r"maps 2 positions, .* 3 vectors"):
        open_files(directory)


def test_a_hostile_pickle_in_a_saved_directory_is_refused(directory: Path) -> None:
    save(directory, "a")
    (directory / "index.pkl").write_bytes(pickle.dumps(os.system))
    with pytest.raises(HostilePickleError, match=r"posix\.system"):
        open_files(directory)


def test_a_file_that_may_not_be_read_is_named(directory: Path) -> None:
    save_legacy(directory, ["a"])
    (directory / "index.faiss").unlink()
    (directory / "index.faiss").mkdir()
    with pytest.raises(UnreadableError, match=r"index\.faiss"):
        open_files(directory)


def test_files_that_are_replaced_while_they_are_read_are_read_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_legacy(directory, ["a"])
    changes = iter([["b"], ["c"]])

    def changing(folder: Path) -> Any:
        content = read_pair(folder)
        for names in changes:
            old_release_adds(directory, names)
            break
        return content

    monkeypatch.setattr(faiss_files, "read_pair", changing)
    assert list(found_in(open_files(directory).content)) == ["a", "b", "c"]


def test_files_that_never_stop_changing_are_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_legacy(directory, ["a"])
    number = iter(range(100))

    def changing(folder: Path) -> Any:
        content = read_pair(folder)
        old_release_adds(directory, [f"x{next(number)}"])
        return content

    monkeypatch.setattr(faiss_files, "read_pair", changing)
    with pytest.raises(ChangingError, match="stop the old release"):
        open_files(directory)


# -- saving


def test_the_first_save_takes_the_legacy_pair_over_as_generation_0(directory: Path) -> None:
    save_legacy(directory, ["a", "b"])
    legacy = opened_by_langchain(directory)
    generation = save(directory, "a", "n", position=7)
    assert found_in(open_files(directory).content) == found_in(made_content("a", "n"))
    assert opened_by_langchain(directory) == found_in(made_content("a", "n"))
    assert layout(directory) == {
        "current": "generations/1",
        "index.faiss": "current/index.faiss",
        "index.pkl": "current/index.pkl",
        "save.lock": "file",
        **{f"generations/{n}/{file}": "file" for n in (0, 1) for file in ("index.faiss", "index.pkl", "manifest.json")},
    }
    assert opened_by_langchain(directory / "generations" / "0") == legacy
    assert (generation.number, generation.chunks, generation.journal_position) == (1, 2, 7)


def test_the_manifest_records_what_was_written(directory: Path) -> None:
    generation = save(directory, "a", "b", position=3)
    fields = json.loads((directory / "current" / "manifest.json").read_text())
    assert fields == {
        "version": 1,
        "number": 1,
        "created_at": AT.isoformat(),
        "host": "alpha",
        "journal_position": 3,
        "chunks": 2,
        "files": {
            name: {
                "sha256": hash_file(directory / name),
                "size": (directory / name).stat().st_size,
                "mtime_ns": (directory / name).stat().st_mtime_ns,
            }
            for name in ("index.faiss", "index.pkl")
        },
    }
    assert open_files(directory).generation == generation


def test_nothing_to_save_is_saved_too(directory: Path) -> None:
    save(directory)
    assert opened_by_langchain(directory) == {}
    assert open_files(directory).content.index.ntotal == 0


def test_the_last_two_generations_are_kept(directory: Path) -> None:
    for name in "abcd":
        save(directory, name)
    assert sorted(path.name for path in (directory / "generations").iterdir()) == ["3", "4"]
    assert list(opened_by_langchain(directory)) == ["d"]
    assert list(opened_by_langchain(directory / "generations" / "3")) == ["c"]


def test_metadata_and_content_are_kept_as_they_are(directory: Path) -> None:
    content = made_content("a")
    content.chunks.contents[0] = "naïve \ud800 \0"
    content.chunks.metadatas[0].update(at=AT, parts=(1, {2}), nan=float("inf"))
    save_generation(directory, content, journal_position=0, seen=stamp(directory))
    assert found_in(open_files(directory).content) == opened_by_langchain(directory) == found_in(content)


def test_without_hard_links_the_legacy_pair_is_copied(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    save_legacy(directory, ["a"])
    legacy = opened_by_langchain(directory)
    save(directory, "n")
    assert opened_by_langchain(directory / "generations" / "0") == legacy
    assert list(opened_by_langchain(directory)) == ["n"]


def test_a_legacy_pair_that_an_administrator_linked_elsewhere_is_taken_over(directory: Path, tmp_path: Path) -> None:
    save_legacy(tmp_path / "data", ["a"])
    directory.mkdir()
    for name in ("index.faiss", "index.pkl"):
        (directory / name).symlink_to(tmp_path / "data" / name)
    save(directory, "n")
    assert list(opened_by_langchain(directory)) == ["n"]
    assert list(opened_by_langchain(directory / "generations" / "0")) == ["a"]
    assert list(opened_by_langchain(tmp_path / "data")) == ["a"]


def test_one_process_saves_at_a_time(directory: Path) -> None:
    save(directory, "a")
    with locked(directory / "save.lock", wait=False), pytest.raises(SaveInProgressError, match="another process"):
        save(directory, "b")
    assert list(opened_by_langchain(directory)) == ["a"]


def test_who_had_read_less_of_the_journal_does_not_save_over_who_had_read_more(directory: Path) -> None:
    more = save(directory, "a", "b", position=2)
    assert save(directory, "a", position=1) == more
    assert list(opened_by_langchain(directory)) == ["a", "b"]
    assert save(directory, "a", "c", position=3).number == more.number + 1


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kilobytes", [1, 8, 100, 240])
def test_a_full_disk_leaves_what_was_saved_and_no_leftovers(directory: Path, legacy: bool, kilobytes: int) -> None:
    if legacy:
        save_legacy(directory, ["a"])
    else:
        save(directory, "a")
    before = opened_by_langchain(directory)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    many = [f"n{number}" for number in range(40)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, hard))
    try:
        with pytest.raises(SaveFailedError, match="Free space"):
            save(directory, *many)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert opened_by_langchain(directory) == before
    assert len(list((directory / "generations").iterdir())) == 1
    save(directory, *many)
    assert list(opened_by_langchain(directory)) == many


def test_a_generation_that_cannot_be_made_current_is_removed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(directory, "a")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "symlink_to", full)
        with pytest.raises(SaveFailedError, match="No space left"):
            save(directory, "b")
    assert [path.name for path in (directory / "generations").iterdir()] == ["1"]
    assert list(opened_by_langchain(directory)) == ["a"]


# -- the old release


def test_the_old_release_writes_through_the_links_and_is_noticed(directory: Path) -> None:
    save(directory, "a")
    assert not old_release_wrote(directory)
    old_release_adds(directory, ["old"])
    assert old_release_wrote(directory)
    assert (directory / "index.faiss").is_symlink()
    opened = open_files(directory)
    assert opened.old_release_wrote
    assert list(found_in(opened.content)) == ["a", "old"]


def test_a_change_of_the_same_length_is_noticed(directory: Path) -> None:
    save(directory, "a")
    path = directory / "index.pkl"
    path.write_bytes(path.read_bytes().replace(b"saved a", b"other a"))
    assert old_release_wrote(directory)


def test_files_that_were_copied_or_touched_are_not_taken_for_written(directory: Path, tmp_path: Path) -> None:
    save(directory, "a")
    os.utime(directory / "index.faiss", ns=(1, 1))
    assert not old_release_wrote(directory)
    shutil.copytree(directory, tmp_path / "copy", symlinks=True)
    for path in (tmp_path / "copy").rglob("index.*"):
        os.utime(path, ns=(2, 2))
    assert not old_release_wrote(tmp_path / "copy")


def test_a_directory_that_was_never_saved_was_not_written_over(directory: Path) -> None:
    save_legacy(directory, ["a"])
    assert not old_release_wrote(directory)
    assert not old_release_wrote(directory.parent / "none")


@pytest.mark.parametrize("replaced", [("index.faiss", "index.pkl"), ("index.pkl",)])
def test_files_that_were_restored_over_the_links_are_taken_over(
    directory: Path, tmp_path: Path, replaced: tuple[str, ...]
) -> None:
    save(directory, "a", "b")
    old_release_adds(directory, ["old"])
    shutil.copytree(directory, tmp_path / "backup")
    for name in replaced:
        (directory / name).unlink()
        shutil.copy(tmp_path / "backup" / name, directory / name)
    opened = open_files(directory)
    assert list(found_in(opened.content)) == ["a", "b", "old"] == list(opened_by_langchain(directory))
    assert all((directory / name).is_symlink() for name in ("index.faiss", "index.pkl"))
    assert opened.generation is not None
    assert (opened.generation.number, opened.generation.journal_position) == (2, 0)


@pytest.mark.parametrize("saved_before", [True, False])
def test_nothing_is_saved_over_what_the_old_release_wrote_meanwhile(directory: Path, saved_before: bool) -> None:
    save_legacy(directory, ["a"])
    if saved_before:
        save(directory, "a")
    opened = open_files(directory)
    old_release_adds(directory, ["old"])
    with pytest.raises(ChangingError, match="start this process again"):
        save(directory, "n", opened=opened)
    assert list(opened_by_langchain(directory)) == ["a", "old"]
    save(directory, "a", "old", "n", opened=open_files(directory))


def test_two_processes_save_one_after_the_other(directory: Path) -> None:
    save_legacy(directory, ["a"])
    one, other = open_files(directory), open_files(directory)
    save(directory, "b", opened=one)
    save(directory, "c", opened=other)
    assert list(opened_by_langchain(directory)) == ["c"]


@pytest.mark.parametrize(
    "text", [None, "", "{}", "[]", '{"version": 2}', '{"version": 1, "files": {}}', "\x00" * 20], ids=repr
)
def test_a_damaged_manifest_is_refused(directory: Path, text: str | None) -> None:
    save(directory, "a")
    path = directory / "current" / "manifest.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(ManifestError, match=r"manifest\.json"):
        open_files(directory)


# -- where the directory may lie


MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:20 / /proc rw - proc proc rw
30 22 0:30 / /mnt/share rw - nfs4 server:/export rw
31 30 8:2 / /mnt/share/local rw master:2 shared:3 - xfs /dev/sdb rw
32 22 0:33 / /mnt/with\\040space rw - cifs //server/share rw
33 22 0:34 / /mnt/over rw - nfs server:/a rw
34 33 8:3 / /mnt/over rw - ext4 /dev/sdc rw
35 22 0:35 / /mnt/sshfs rw - fuse.sshfs user@host: rw
36 22 0:36 / /mnt/virtual rw - 9p share rw
malformed
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/mnt/share/faiss_index", "nfs4"),
        ("/mnt/with space/faiss_index", "cifs"),
        ("/mnt/sshfs/a/b", "fuse.sshfs"),
    ],
)
def test_a_directory_on_a_network_file_system_is_refused(path: str, kind: str) -> None:
    with pytest.raises(ForeignDirectoryError, match=f"lies on {kind} .*local disk"):
        refuse_network(Path(path), MOUNTS)
    with pytest.raises(ForeignDirectoryError):
        refuse_foreign(Path(path), host=HOST, mountinfo=MOUNTS)


@pytest.mark.parametrize(
    "path", ["/srv/faiss_index", "/mnt/share/local/faiss_index", "/mnt/over/x", "/mnt/shared", "/mnt/virtual/x"]
)
def test_a_directory_on_a_local_disk_is_not(path: str) -> None:
    refuse_foreign(Path(path), host=HOST, mountinfo=MOUNTS)


def test_a_link_to_a_network_file_system_is_followed(tmp_path: Path) -> None:
    (tmp_path / "index").symlink_to("/mnt/share/faiss_index")
    with pytest.raises(ForeignDirectoryError, match="nfs4"):
        refuse_network(tmp_path / "index", MOUNTS)


def test_this_machine_keeps_its_files_on_a_local_disk(tmp_path: Path) -> None:
    refuse_foreign(tmp_path)


def test_without_mountinfo_nothing_is_refused(tmp_path: Path) -> None:
    refuse_network(tmp_path, "")


def test_a_directory_of_another_host_is_refused(directory: Path) -> None:
    Journal.open(directory, host=HOST).close()
    refuse_foreign(directory, host=HOST)
    with pytest.raises(ForeignDirectoryError, match="belongs to host 'alpha', this is 'beta'"):
        refuse_foreign(directory, host=Host("m2", "beta", "b2"))


def test_every_refusal_is_an_error_of_the_directory(directory: Path) -> None:
    kinds = [MissingFileError, UnreadableError, ChangingError, SaveInProgressError, SaveFailedError, ManifestError]
    assert all(issubclass(kind, FaissDirectoryError) for kind in kinds)
