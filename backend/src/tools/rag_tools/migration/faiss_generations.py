"""The layout of the FAISS directory, one small step a function; `faiss_files` puts them in order.

    index.faiss -> current/index.faiss      what LangChain's FAISS.load_local opens
    index.pkl   -> current/index.pkl
    current     -> generations/7
    generations/7/{index.faiss, index.pkl, manifest.json}

Each step is synced when it returns, and is whole or not begun for whoever looks after a crash.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from src.tools.rag_tools import faults
from src.tools.rag_tools.migration.faiss_disk import (
    FaissDirectoryError,
    make_folder,
    swap_link,
    sync,
)
from src.tools.rag_tools.migration.faiss_format import PAIR, hash_file

CURRENT = "current"
GENERATIONS = "generations"
MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
KEPT_GENERATIONS = 2

Stamp = tuple[tuple[int, ...] | None, ...]


class ManifestError(FaissDirectoryError):
    """manifest.json of the current generation is missing, damaged or of a later release."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was when its generation was made. `mtime_ns` saves hashing it at every start."""

    sha256: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Generation:
    """A manifest. `chunks` is None for files that were taken over as they were found.

    The files hold every entry of the journal up to `journal_position`.
    """

    number: int
    created_at: str
    host: str
    journal_position: int
    chunks: int | None
    files: dict[str, FileRecord]
    path: Path

    @faults.point("save.manifest")
    def write(self, folder: Path) -> None:
        """Into `folder`, which gets its name only later."""
        fields = {"version": MANIFEST_VERSION, **asdict(self)}
        del fields["path"]
        (folder / MANIFEST_FILE).write_text(json.dumps(fields, indent=2) + "\n")
        sync(folder / MANIFEST_FILE)

    @classmethod
    def read(cls, folder: Path) -> Self:
        path = folder / MANIFEST_FILE
        try:
            fields = json.loads(path.read_text())
            version = fields.pop("version")
            if version != MANIFEST_VERSION:
                raise ManifestError(f"{path} is of version {version}; start the release that wrote it")
            files = {name: FileRecord(**fields["files"][name]) for name in PAIR}
            return cls(**{**fields, "files": files, "path": folder})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{path} cannot be read ({error!r}); restore the whole directory from a backup"
            ) from error


# -- what is there


def stamp(directory: Path) -> Stamp:
    """What identifies the content of both files without reading them; None for a missing one."""
    return tuple(_stamp(directory / name) for name in PAIR)


def current_number(directory: Path) -> int | None:
    """The generation that `current` names, whether it is there or not; None before the first save."""
    link = directory / CURRENT
    return int(link.readlink().name) if link.is_symlink() else None


def current_generation(directory: Path) -> Generation | None:
    """Its manifest. Raises ManifestError."""
    number = current_number(directory)
    return None if number is None else Generation.read(folder_of(directory, number))


def matches(directory: Path, generation: Generation) -> bool:
    """Whether both files still are as the manifest of `generation` records them."""
    return all(_unchanged(directory / name, generation.files[name]) for name in PAIR)


def numbers(directory: Path) -> list[int]:
    """Every generation that has its name, in order."""
    generations = directory / GENERATIONS
    if not generations.exists():
        return []
    return sorted(int(folder.name) for folder in generations.iterdir() if folder.name.isdecimal())


def folder_of(directory: Path, number: int) -> Path:
    return directory / GENERATIONS / str(number)


def is_linked(directory: Path, name: str) -> bool:
    """Whether `name` is our link through `current`, leading somewhere or not."""
    path = directory / name
    return path.is_symlink() and path.readlink() == Path(CURRENT, name)


def is_plain(directory: Path, name: str) -> bool:
    """Whether `name` is there and is not our link: the old release, a restore or an administrator made it."""
    return (directory / name).exists() and not is_linked(directory, name)


# -- changing it


@contextmanager
def new_folder(directory: Path, number: int) -> Iterator[Path]:
    """A folder to fill; at the end it is synced and gets its name, after an error it is removed."""
    partial = directory / GENERATIONS / f".{number}.partial"
    with faults.point("save.folder"):
        make_folder(directory / GENERATIONS)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
    try:
        yield partial
        with faults.point("save.sync"):
            sync(partial)
        give_name(partial, folder_of(directory, number))
    except (OSError, RuntimeError):
        shutil.rmtree(partial, ignore_errors=True)
        raise


@faults.point("save.name")
def give_name(partial: Path, folder: Path) -> None:
    partial.rename(folder)
    sync(folder.parent)


@faults.point("save.current")
def make_current(directory: Path, number: int) -> None:
    """The one moment at which both files change."""
    swap_link(directory / CURRENT, f"{GENERATIONS}/{number}")


def link_names(directory: Path) -> None:
    """Makes both names links through `current`. On a new directory they lead nowhere until it is set."""
    for name in PAIR:
        if not is_linked(directory, name):
            link_name(directory, name)


@faults.point("save.link")
def link_name(directory: Path, name: str) -> None:
    swap_link(directory / name, f"{CURRENT}/{name}")


def remove_old(directory: Path) -> None:
    """Keeps the current generation and the one before it; half-written and unused ones go too."""
    generations = directory / GENERATIONS
    if not generations.exists():
        return
    current = current_number(directory)
    older = [number for number in numbers(directory) if current is not None and number <= current]
    kept = {str(number) for number in older[-KEPT_GENERATIONS:]}
    for folder in generations.iterdir():
        if folder.name not in kept:
            remove_generation(folder)


@faults.point("save.remove")
def remove_generation(folder: Path) -> None:
    """Takes its name away first: what has a number is whole."""
    if folder.name.isdecimal():
        nameless = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(nameless, ignore_errors=True)
        folder = folder.rename(nameless)
    shutil.rmtree(folder)


# -- parts


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _unchanged(path: Path, record: FileRecord) -> bool:
    """By size and time; a copied file has another time, so then by its hash."""
    status = path.stat()
    if status.st_size != record.size:
        return False
    return status.st_mtime_ns == record.mtime_ns or hash_file(path) == record.sha256
