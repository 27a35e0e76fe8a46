"""`rollout archive`: the FAISS directory as one tar file, and the proof that it opens again.

    SHA256SUMS       of the other three, as `sha256sum --check` reads it
    index.faiss      what LangChain's FAISS.load_local opens
    index.pkl
    journal.sqlite   every write since the migration began, and whose it was

The tar gets its name only once it is whole and synced: a process that dies leaves a `.partial` file at most. It needs
nothing of this project to be read again. What was written and what was restored is recorded for the gate `removal`.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rollout import steps
from rollout.control import Control, actor
from rollout.errors import PreconditionError, RefusedError
from rollout.saved import save
from src.tools.rag_tools.migration.faiss_disk import FaissDirectoryError, sync
from src.tools.rag_tools.migration.faiss_format import PAIR, Content, hash_file, read_pair
from src.tools.rag_tools.migration.faiss_generations import Generation
from src.tools.rag_tools.migration.faiss_sqlite import JOURNAL_FILE
from src.tools.rag_tools.migration.settings import migration_settings
from src.tools.rag_tools.migration.stages import Store

SUMS = "SHA256SUMS"
MEMBERS = (*PAIR, JOURNAL_FILE)
SUMS_BYTES = 1_000
"""More than three lines have; what a damaged archive calls its sums is not read further."""

RECORD = """
INSERT INTO faiss_archives (transition_id, sha256, path, chunks, actor)
SELECT max(id), %s, %s, %s, %s FROM rollout_transitions
"""
RECORDED = "SELECT FROM faiss_archives LIMIT 0"
"""Asked first: an archive that cannot be recorded is of no use to the gate, and its name would be taken."""
RESTORED = "UPDATE faiss_archives SET restored_at = clock_timestamp() WHERE sha256 = %s RETURNING id"


@dataclass(frozen=True, slots=True)
class Archived:
    """`chunks` that the archive holds; `differences` from the directory in use; whether the record knows it."""

    path: str
    sha256: str
    chunks: int
    differences: int = 0
    recorded: bool = True


def write(control: Control, target: Path) -> Archived:
    """Give FAISS what it is owed, deletions first of all, save it, and put it into `target`.

    Raises RefusedError where `target` is there or the directory is not as it was saved, PreconditionError where the
    disk refuses; then nothing is left of `target`.
    """
    _refuse_used(target)
    with control.connection() as connection:
        connection.execute(RECORDED)
    steps.settle_store(control, Store.FAISS)
    generation = save(control)
    with _whole(target) as partial, tempfile.TemporaryDirectory(dir=target.parent, prefix=".archive-") as scratch:
        journal = _copied_journal(control.faiss.directory / JOURNAL_FILE, Path(scratch))
        _pack(partial, {**{name: generation.path / name for name in PAIR}, JOURNAL_FILE: journal}, generation)
    archived = Archived(str(target.absolute()), hash_file(target), generation.chunks or 0)
    with control.connection() as connection:
        connection.execute(RECORD, (archived.sha256, archived.path, archived.chunks, actor()))
    return archived


def restore(control: Control, source: Path, folder: Path) -> Archived:
    """Unpack `source` into the new `folder`, open it and compare it with the directory in use, chunk by chunk.

    Raises PreconditionError where it cannot be read, RefusedError where it is not what was archived.
    """
    _refuse_used(folder)
    with _new_folder(folder), _disk(source):
        digest = hash_file(source)
        _unpack(source, folder)
        try:
            found = dict(_chunks(read_pair(folder)))
        except FaissDirectoryError as error:
            raise RefusedError(f"{source} does not open again: {error}") from error
    kept = dict(_chunks(read_pair(migration_settings.FAISS_INDEX_PATH)))
    differences = len(set(found.items()) ^ set(kept.items()))
    with control.connection() as connection:
        sound = not differences and connection.execute(RESTORED, (digest,)).fetchone() is not None
    return Archived(str(source.absolute()), digest, len(found), differences, sound)


def _refuse_used(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise RefusedError(f"{path} is there already and is left as it is; name a new one")
    if not path.parent.is_dir():
        raise PreconditionError(f"{path.parent} is no folder; make it first")


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A file to fill, which gets the name `target` only if all went well."""
    partial = target.with_name(f".{target.name}.partial")
    with _disk(target):
        try:
            yield partial
            sync(partial)
            # Unlike a rename, a link refuses a name that somebody took meanwhile.
            target.hardlink_to(partial)
            sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """A folder that goes again if what should be in it is refused."""
    with _disk(folder):
        folder.mkdir()
    try:
        yield
    except BaseException:
        shutil.rmtree(folder)
        raise


def _copied_journal(journal: Path, scratch: Path) -> Path:
    """By SQLite itself: what is not yet in the main file comes along."""
    copy = scratch / JOURNAL_FILE
    with closing(sqlite3.connect(journal)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy


def _pack(partial: Path, files: dict[str, Path], generation: Generation) -> None:
    """RefusedError where a file is no longer what the directory's own manifest says."""
    sums = {name: hash_file(path) for name, path in files.items()}
    if changed := [name for name in PAIR if sums[name] != generation.files[name].sha256]:
        raise RefusedError(
            f"{generation.path / changed[0]} is not as it was saved: it was cut, or damaged on the disk; restore the"
            " directory from a backup, then archive again"
        )
    text = "".join(f"{sums[name]}  {name}\n" for name in MEMBERS).encode()
    with tarfile.open(partial, "w") as tar:
        entry = tarfile.TarInfo(SUMS)
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text))
        for name in MEMBERS:
            tar.add(files[name], name)


def _unpack(source: Path, folder: Path) -> None:
    """Only what is expected, only as plain files, and only if each hash is right."""
    try:
        with tarfile.open(source, "r:") as tar:
            members = tar.getmembers()
            if sorted(each.name for each in members) != sorted((SUMS, *MEMBERS)):
                raise RefusedError(f"{source} holds {', '.join(each.name for each in members)}: no archive of FAISS")
            if any(not each.isreg() for each in members) or tar.getmember(SUMS).size > SUMS_BYTES:
                raise RefusedError(f"{source} holds something else than plain files; nothing of it was unpacked")
            tar.extractall(folder, filter="data")
    except tarfile.TarError as error:
        raise RefusedError(f"{source} is damaged or no archive ({error}); take another copy of it") from error
    told = (folder / SUMS).read_text(encoding="ascii", errors="replace")
    if changed := [name for name in MEMBERS if f"{hash_file(folder / name)}  {name}" not in told.splitlines()]:
        raise RefusedError(
            f"{', '.join(changed)} in {source} is not what was archived: its hash differs; take another copy of it"
        )


def _chunks(content: Content) -> Iterator[tuple[str, bytes]]:
    """Docstore id and a hash of all that the index holds under it."""
    chunks = content.chunks
    for at, (name, text, metadata) in enumerate(
        zip(chunks.docstore_ids, chunks.contents, chunks.metadatas, strict=True)
    ):
        said = repr((text, sorted(metadata.items()))).encode("utf-8", "surrogatepass")
        yield name, hashlib.sha256(said + content.index.reconstruct(at).tobytes()).digest()


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise PreconditionError(
            f"{path} could not be written or read ({error}); nothing was recorded. Free space, or name another place"
        ) from error
