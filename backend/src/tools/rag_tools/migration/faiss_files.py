"""Opens and saves the FAISS directory, and takes over what the old release left there.

Both files change at one moment, when the link `current` does. Before it the new generation is
written and synced; a legacy pair becomes generation and links by steps that each leave the same
content visible. A process that dies leaves the old pair or the new one, and leftovers that the next
open or save puts right.
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from src.tools.rag_tools import faults
from src.tools.rag_tools.migration import faiss_generations as generations
from src.tools.rag_tools.migration.faiss_disk import (
    BusyError,
    FaissDirectoryError,
    Host,
    locked,
    make_folder,
    refuse_network,
    sync,
    this_host,
)
from src.tools.rag_tools.migration.faiss_format import (
    INDEX_FILE,
    PAIR,
    PICKLE_FILE,
    Content,
    Written,
    hash_file,
    read_pair,
    write_index,
    write_pickle,
)
from src.tools.rag_tools.migration.faiss_generations import (
    CURRENT,
    FileRecord,
    Generation,
    Stamp,
    folder_of,
)
from src.tools.rag_tools.migration.faiss_journal import (
    recorded_host,
    refuse_other_host,
    utc_now,
)

LOCK_FILE = "save.lock"
READ_ATTEMPTS = 5

Clock = Callable[[], datetime.datetime]


class MissingFileError(FaissDirectoryError):
    """One of the files is missing while others show that it was there."""


class UnreadableError(FaissDirectoryError):
    """The system refused to read or change a file."""


class ChangingError(FaissDirectoryError):
    """The old release writes, or wrote, the files while a process of this one has them open."""


class SaveInProgressError(FaissDirectoryError):
    """Another process is saving."""


class SaveFailedError(FaissDirectoryError):
    """The new generation could not be written; the old one is as it was."""


@dataclass(frozen=True, slots=True)
class SavedIndex:
    """What was opened. `stamp` tells later whether somebody has changed the files since."""

    content: Content
    generation: Generation | None
    old_release_wrote: bool
    stamp: Stamp


def refuse_foreign(directory: Path, *, host: Host | None = None, mountinfo: str | None = None) -> None:
    """ForeignDirectoryError on a network file system, or where another host used the directory first."""
    refuse_network(directory, mountinfo)
    recorded = recorded_host(directory)
    if recorded is not None:
        refuse_other_host(directory, recorded, host or this_host())


def open_files(directory: Path, *, host: Host | None = None, now: Clock = utc_now) -> SavedIndex:
    """What LangChain's FAISS.load_local would open here; empty where nothing was ever saved.

    Raises a FaissDirectoryError that names the file, what is wrong with it and what to do.
    """
    with _reading(directory):
        if _left_halfway(directory):
            with _saving(directory, wait=True):
                _recover(directory, host or this_host(), now)
        for _ in range(READ_ATTEMPTS):
            before = generations.stamp(directory)
            try:
                content = _read(directory, before)
                generation = generations.current_generation(directory)
                foreign = old_release_wrote(directory)
            except (FaissDirectoryError, FileNotFoundError):
                if generations.stamp(directory) == before:
                    raise
                continue
            # Had another process saved in between, the two files could be of two generations.
            if generations.stamp(directory) == before:
                return SavedIndex(content, generation, foreign, before)
    raise ChangingError(
        f"{directory} changed each of the {READ_ATTEMPTS} times it was read: stop the old release, which must not run"
        " beside this one, and start again"
    )


def old_release_wrote(directory: Path) -> bool:
    """Whether the files differ from their manifest: only the old release writes them in place."""
    generation = generations.current_generation(directory)
    return generation is not None and not generations.matches(directory, generation)


def save_generation(
    directory: Path,
    content: Content,
    *,
    journal_position: int,
    seen: Stamp,
    host: Host | None = None,
    now: Clock = utc_now,
) -> Generation:
    """Writes `content` as the new pair of `directory` and returns its manifest.

    Where another process has saved more of the journal meanwhile, its generation stays and is returned.
    `seen`: the stamp of the files that `content` was made from. Raises SaveInProgressError,
    ChangingError where the old release has written since, SaveFailedError where the disk is full;
    the old pair then is as it was.
    """
    host = host or this_host()
    with _saving(directory):
        _refuse_unseen(directory, seen)
        if (newer := _saved_beyond(directory, journal_position)) is not None:
            return newer
        generations.remove_old(directory)
        if _has_plain(directory):
            _adopt(directory, host, now)
        number = _next_number(directory)
        with generations.new_folder(directory, number) as folder:
            records = _write_content(folder, content)
            chunks = len(content.chunks.docstore_ids)
            generation = Generation(number, now().isoformat(), host.hostname, journal_position, chunks, records, folder)
            generation.write(folder)
        _publish(directory, number)
        return Generation.read(folder_of(directory, number))


def wait_for_saver(directory: Path) -> None:
    """Returns once nobody is saving."""
    with _saving(directory, wait=True):
        pass


# -- the new generation


def _saved_beyond(directory: Path, journal_position: int) -> Generation | None:
    generation = generations.current_generation(directory)
    if generation is None or generation.journal_position <= journal_position or old_release_wrote(directory):
        return None
    return generation


def _write_content(folder: Path, content: Content) -> dict[str, FileRecord]:
    index, pickled = folder / INDEX_FILE, folder / PICKLE_FILE
    with faults.point("save.index"):
        written_index = _record(index, write_index(index, content.index))
    with faults.point("save.pickle"):
        written_pickle = _record(pickled, write_pickle(pickled, content.chunks))
    return {INDEX_FILE: written_index, PICKLE_FILE: written_pickle}


def _record(path: Path, written: Written) -> FileRecord:
    """Synced first: a time recorded before could still change."""
    sync(path)
    return FileRecord(written.sha256, written.size, path.stat().st_mtime_ns)


def _publish(directory: Path, number: int) -> None:
    try:
        generations.link_names(directory)
        generations.make_current(directory, number)
    except OSError:
        # On a full disk the space of the unused generation is wanted at once.
        with suppress(OSError):
            generations.remove_old(directory)
        raise
    generations.remove_old(directory)


def _next_number(directory: Path) -> int:
    """0 is a pair taken over; saves count from 1."""
    return max(generations.numbers(directory), default=0) + 1


# -- what the old release, or a process that died, left


def _has_plain(directory: Path) -> bool:
    return any(generations.is_plain(directory, name) for name in PAIR)


def _left_halfway(directory: Path) -> bool:
    """Whether a process died while it took over a pair, or before its first generation was current."""
    if generations.current_number(directory) is not None:
        return _has_plain(directory)
    linked = any(generations.is_linked(directory, name) for name in PAIR)
    return linked and not _has_plain(directory) and bool(generations.numbers(directory))


def _recover(directory: Path, host: Host, now: Clock) -> None:
    if not _left_halfway(directory):
        return
    if generations.current_number(directory) is not None:
        _adopt(directory, host, now)
        return
    # A generation has its name only once it is whole.
    generations.link_names(directory)
    generations.make_current(directory, generations.numbers(directory)[-1])


def _adopt(directory: Path, host: Host, now: Clock) -> None:
    """Makes the pair that is visible a generation, and both names links to it; what they show stays."""
    if not _is_taken_over(directory):
        number = max(generations.numbers(directory), default=-1) + 1
        with generations.new_folder(directory, number) as folder:
            records = {name: _take_over(directory / name, folder / name) for name in PAIR}
            # Written by the old release, they hold nothing of the journal for certain.
            generation = Generation(number, now().isoformat(), host.hostname, 0, None, records, folder)
            generation.write(folder)
        generations.make_current(directory, number)
    generations.link_names(directory)


def _is_taken_over(directory: Path) -> bool:
    """Whether `current` holds the very files that the names show."""
    current = directory / CURRENT
    return current.exists() and all(
        (current / name).exists() and (current / name).samefile(directory / name) for name in PAIR
    )


@faults.point("save.take_over")
def _take_over(source: Path, target: Path) -> FileRecord:
    """A hard link, so that a write under either name is seen under both; a copy where none is possible."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)
    return _record(target, Written(hash_file(target), target.stat().st_size))


# -- parts


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnreadableError(
            f"{directory} cannot be read ({error}): see that this user may read and write it and every file in it"
        ) from error


@contextmanager
def _saving(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """One saver at a time; what the disk refuses is told as such, whichever step met it."""
    try:
        with ExitStack() as held:
            with faults.point("save.lock"):
                make_folder(directory)
                held.enter_context(locked(directory / LOCK_FILE, wait=wait))
            yield
    except BusyError as error:
        raise SaveInProgressError(
            f"another process is saving to {directory}; nothing was changed. Wait for it to end"
        ) from error
    except (OSError, RuntimeError) as error:
        raise SaveFailedError(
            f"{directory} could not be saved ({error}); what was saved before is as it was. Free space on its disk, see"
            " that this user may write there, and save again"
        ) from error


def _refuse_unseen(directory: Path, seen: Stamp) -> None:
    if generations.stamp(directory) == seen:
        return
    # Another process of this release may have saved: it took the same journal, and nothing is lost.
    if generations.current_generation(directory) is None or old_release_wrote(directory):
        raise ChangingError(
            f"{directory} was written by the old release since this process opened it; nothing was saved. Stop the old"
            " release, then start this process again: it takes over what was written"
        )


def _read(directory: Path, found: Stamp) -> Content:
    missing = [name for name, file in zip(PAIR, found, strict=True) if file is None]
    used = generations.current_number(directory) is not None
    if len(missing) == len(PAIR) and not used:
        return Content.empty()
    if missing:
        advice = f", or link them again to {CURRENT}/" if used else ""
        raise MissingFileError(
            f"{directory} has no {' and no '.join(missing)}, though an index was saved there:"
            f" restore {INDEX_FILE} and {PICKLE_FILE} together from one backup{advice}"
        )
    return read_pair(directory)
