"""What a power cut leaves of an example's files: only what somebody had synced before.

The kernel keeps what a killed process wrote, so only a machine that loses power shows that a sync is missing. Worked
out from the real calls: `os.fsync` for the uploads and what is kept beside them; for the journal SQLite's own promise,
that a commit is on the disk when it returns where `synchronous` is FULL, and with less only some time later. The files
of a saved index and PostgreSQL lose nothing here, and a removed file does not come back.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

from src.tools.rag_tools.migration.faiss_journal import Journal

FULL = 2
Written = tuple[int, int]


class Disk:
    """One for a world; `close` gives `os.fsync` back."""

    def __init__(self) -> None:
        self._files: set[Written] = set()
        self._names: set[tuple[str, int]] = set()
        self._journal: bytes | None = None
        self._fsync = os.fsync
        os.fsync = self._watched_fsync

    def close(self) -> None:
        os.fsync = self._fsync

    def forget(self) -> None:
        """The example is over."""
        self._files.clear()
        self._names.clear()
        self._journal = None

    def watch(self, journal: Journal) -> None:
        """Know of each commit whether it was waited for."""
        journal._writer = Writer(journal._writer, journal.path, self)  # type: ignore[assignment]

    def lose_power(self, folder: Path, journal: Path) -> None:
        """`folder`: where the uploads lie. Nobody may have any of its files open."""
        for path in folder.iterdir():
            if path.is_file() and not self._is_synced(path):
                path.unlink()
        if self._journal is not None:
            for each in journal.parent.glob(f"{journal.name}*"):
                each.unlink()
            journal.write_bytes(self._journal)

    def before_commit(self, path: Path, synchronous: int) -> None:
        """A commit that is synced takes with it those before it that were not."""
        if synchronous >= FULL:
            self._journal = None
        elif self._journal is None:
            with closing(sqlite3.connect(path)) as connection:
                self._journal = connection.serialize()

    def _watched_fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            self._names |= {(each.name, each.inode()) for each in os.scandir(descriptor)}
        else:
            self._files.add((found.st_ino, found.st_mtime_ns))

    def _is_synced(self, path: Path) -> bool:
        found = path.stat()
        return (found.st_ino, found.st_mtime_ns) in self._files and (path.name, found.st_ino) in self._names


class Writer:
    """The connection by which a journal writes."""

    def __init__(self, connection: sqlite3.Connection, path: Path, disk: Disk) -> None:
        self._connection, self._path, self._disk = connection, path, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        if statement == "COMMIT":
            synchronous = self._connection.execute("PRAGMA synchronous").fetchone()[0]
            self._disk.before_commit(self._path, synchronous)
        return self._connection.execute(statement, *parameters)
