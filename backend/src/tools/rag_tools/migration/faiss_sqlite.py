"""The journal's SQLite file: how it is made, opened and synced, and its errors in the store's
words.

The file gets its name only once it is wholly set up: a process that dies before leaves no journal.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.tools.rag_tools.migration.faiss_disk import (
    FaissDirectoryError,
    locked,
    make_folder,
    sync,
)

JOURNAL_FILE = "journal.sqlite"
BUSY_SECONDS = 5.0
FORMAT = 1
# A chunk of 1,536 values and some text fills one page of this size, without overflow pages.
PAGE_SIZE = 8192

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    op TEXT NOT NULL CHECK (op IN ('add', 'delete')),
    document_id INTEGER NOT NULL,
    user_id INTEGER NOT NULL,
    at TEXT NOT NULL,
    UNIQUE (document_id, op)
);
CREATE TABLE chunks (
    document_id INTEGER NOT NULL,
    ordinal INTEGER NOT NULL,
    chunk_id BLOB NOT NULL,
    content TEXT,
    metadata TEXT,
    vector BLOB
);
-- Holds the three columns that replaying needs of a chunk already in the index.
CREATE UNIQUE INDEX chunk_keys ON chunks (document_id, ordinal, chunk_id);
PRAGMA user_version = 1;
"""


class JournalError(FaissDirectoryError):
    """The journal could not be read or written; the message says why and what to do."""


class JournalDamagedError(JournalError):
    """The file is no whole SQLite database of this format."""


class JournalBusyError(JournalError):
    """Another process has been writing for longer than one waits."""


class JournalUnwritableError(JournalError):
    """The disk is full, or the file or its folder may not be written."""


def create_file(path: Path) -> None:
    """Makes the file, empty or wholly set up: whoever comes second waits and finds it done."""
    if path.exists():
        return
    make_folder(path.parent)
    with locked(path.with_suffix(".lock"), wait=True):
        if path.exists():
            return
        temporary = path.with_suffix(".new")
        for leftover in path.parent.glob(f"{temporary.name}*"):
            leftover.unlink()
        connection = connect(temporary, BUSY_SECONDS)
        try:
            connection.executescript(SCHEMA)
        finally:
            connection.close()
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)


def connect(path: Path, busy_seconds: float) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
    try:
        connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        # Erased content is overwritten in the file, not only unlinked.
        connection.execute("PRAGMA secure_delete = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def damaged(path: Path, reason: object) -> str:
    return (
        f"{path} is damaged ({reason}): stop every process that uses it, keep a copy of the three"
        f" files {path.name}*, and restore them from a backup or recover them with `sqlite3 {path} .recover`"
    )


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Errors of SQLite and of the file system by their code, as errors of the store."""
    try:
        yield
    except OSError as error:
        raise JournalUnwritableError(unwritable(path, error)) from error
    except sqlite3.Error as error:
        # The low byte is the condition, the rest refines it.
        match getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF:
            case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                raise JournalBusyError(
                    f"{path} is being written by another process for longer than one waits; try again, and find a stuck"
                    f" process with `fuser {path}`"
                ) from error
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                raise JournalDamagedError(damaged(path, error)) from error
            case (
                sqlite3.SQLITE_FULL
                | sqlite3.SQLITE_READONLY
                | sqlite3.SQLITE_CANTOPEN
                | sqlite3.SQLITE_IOERR
                | sqlite3.SQLITE_PERM
            ):
                raise JournalUnwritableError(unwritable(path, error)) from error
            case _:
                raise JournalError(f"{path} could not be used: {error}") from error


def unwritable(path: Path, error: Exception) -> str:
    return (
        f"{path} cannot be written ({error}); this call is not done, repeating it is safe. Free space, and see that"
        f" this user may write {path.parent} and every file in it"
    )
