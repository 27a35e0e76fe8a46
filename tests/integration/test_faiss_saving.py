"""A process may die between any two steps of saving: the pair is the old one or the new one, never torn."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from src.tools.rag_tools.migration import faiss_format
from src.tools.rag_tools.migration.faiss_files import open_files, save_generation
from src.tools.rag_tools.migration.faiss_generations import folder_of, numbers, remove_generation, stamp
from tests.support.faiss_directory import (
    found_in,
    made_content,
    old_release_adds,
    opened_by_langchain,
    save_legacy,
)

pytestmark = pytest.mark.migration

NEW = ("new1", "new2", "new3")


class Died(BaseException):
    """The process is gone: nothing of it cleans up."""


class Steps:
    """Counts what a process does to the disk, and dies before the step that it is told."""

    def __init__(self, last: int) -> None:
        self.left = last

    def take(self) -> None:
        if self.left == 0:
            raise Died
        self.left -= 1

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.take()
            return function(*arguments, **options)

        return counted


@contextmanager
def dying_after(steps: int) -> Iterator[None]:
    """Every change to the disk is a step, each block written to a file too; clean-up does not happen."""
    counter = Steps(steps)
    with pytest.MonkeyPatch.context() as patched:
        for name in ("mkdir", "symlink_to", "hardlink_to", "rename", "replace", "unlink", "write_text", "touch"):
            patched.setattr(Path, name, counter.counting(getattr(Path, name)))
        patched.setattr(os, "fsync", counter.counting(os.fsync))
        patched.setattr(os, "rmdir", counter.counting(os.rmdir))
        patched.setattr(os, "unlink", counter.counting(os.unlink))
        patched.setattr(shutil, "copyfile", counter.counting(shutil.copyfile))
        writing = faiss_format._HashingFile
        patched.setattr(writing, "write", counter.counting(writing.write))
        yield


def save(directory: Path, *names: str) -> None:
    opened = open_files(directory)
    save_generation(directory, made_content(*names), journal_position=1, seen=opened.stamp)


def nothing(_: Path) -> None:
    """A fresh installation."""


def legacy(directory: Path) -> None:
    save_legacy(directory, ["a", "b"])


def saved(directory: Path) -> None:
    save(directory, "a")
    save(directory, "a", "b")


def written_over(directory: Path) -> None:
    save(directory, "a")
    old_release_adds(directory, ["b"])


def partly_restored(directory: Path) -> None:
    save(directory, "a", "b")
    copy = directory.parent / "copy"
    shutil.copy(directory / "index.pkl", copy)
    (directory / "index.pkl").unlink()
    copy.rename(directory / "index.pkl")


def linked_elsewhere(directory: Path) -> None:
    data = directory.parent / "data"
    save_legacy(data, ["a", "b"])
    directory.mkdir()
    for name in ("index.faiss", "index.pkl"):
        (directory / name).symlink_to(data / name)


STARTS = [nothing, legacy, saved, written_over, partly_restored, linked_elsewhere]


def visible(directory: Path) -> Any:
    """What LangChain would open; None where it would find nothing."""
    return opened_by_langchain(directory) if (directory / "index.faiss").exists() else None


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.__name__)
def test_a_process_that_dies_at_any_step_of_saving_leaves_the_old_pair_or_the_new_one(
    tmp_path: Path, start: Callable[[Path], None]
) -> None:
    template = tmp_path / "template" / "faiss_index"
    start(template)
    old, new = visible(template), found_in(made_content(*NEW))
    steps, seen = 0, set()
    while True:
        directory = tmp_path / str(steps) / "faiss_index"
        _copied(template, directory)
        died = _dies_while_saving(directory, steps)
        found = visible(directory)
        assert found in (old, new), f"after step {steps}"
        seen.add("new" if found == new else "old")
        _goes_on(directory, old, new)
        shutil.rmtree(tmp_path / str(steps))
        if not died:
            break
        steps += 1
    assert seen == {"old", "new"}
    assert steps > 15


@pytest.mark.parametrize("start", [legacy, partly_restored], ids=lambda start: start.__name__)
def test_a_process_that_dies_while_it_puts_right_what_another_left_loses_nothing(
    tmp_path: Path, start: Callable[[Path], None]
) -> None:
    template = tmp_path / "template" / "faiss_index"
    start(template)
    old, new = visible(template), found_in(made_content(*NEW))
    first = 0
    while True:
        left = tmp_path / "left" / "faiss_index"
        _copied(template, left)
        if not _dies_while_saving(left, first):
            return
        for second in (1, 2, 4, 7, 11):
            directory = tmp_path / "again" / "faiss_index"
            _copied(left, directory)
            _dies_while_saving(directory, second)
            assert visible(directory) in (old, new), f"after steps {first} and {second}"
            _goes_on(directory, old, new)
            shutil.rmtree(directory)
        shutil.rmtree(left)
        first += 3


def test_a_generation_half_removed_has_no_number_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "faiss_index"
    saved(directory)

    def half(folder: Path, **_: Any) -> None:
        if (folder / "index.pkl").exists():
            (folder / "index.pkl").unlink()
            raise Died

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", half)
        with pytest.raises(Died):
            remove_generation(folder_of(directory, 1))
    assert numbers(directory) == [2]
    _goes_on(directory, found_in(made_content("a", "b")), None)


def _copied(source: Path, target: Path) -> None:
    """With times, links and hard links, and the stamp that an unchanged file has."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.exists():
        subprocess.run(["cp", "-a", source, target], check=True)


def _dies_while_saving(directory: Path, steps: int) -> bool:
    """Opens and saves in one go, as a process does."""
    with dying_after(steps):
        try:
            save(directory, *NEW)
        except Died:
            return True
    return False


def _goes_on(directory: Path, old: Any, new: Any) -> None:
    """The next process opens what is visible, saves, and leaves no leftovers."""
    before = visible(directory)
    opened = open_files(directory)
    found = found_in(opened.content)
    assert found in (old or {}, new)
    assert before is None or found == before
    assert visible(directory) == (found if old or before else visible(directory))
    save(directory, "after")
    assert opened_by_langchain(directory) == found_in(made_content("after"))
    assert all((directory / name).is_symlink() for name in ("index.faiss", "index.pkl"))
    names = [path.name for path in (directory / "generations").iterdir()]
    assert all(name.isdecimal() for name in names)
    assert len(names) <= 2
    assert {path.name for path in directory.iterdir()} <= {
        "current",
        "generations",
        "index.faiss",
        "index.pkl",
        "save.lock",
    }
    assert open_files(directory).stamp == stamp(directory)
