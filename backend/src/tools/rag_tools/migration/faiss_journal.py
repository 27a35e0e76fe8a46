"""The journal: every add and delete made to FAISS since the migration began, in one SQLite file.

One call is one transaction, synced to disk before it returns: a process that dies leaves the whole
entry or none of it. Entries are never changed or removed; of a deleted document only the payload is
erased. A document is added once and deleted once; nothing is added after its deletion, seen or
unseen.
"""

from __future__ import annotations

import datetime
import json
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import numpy as np

from src.tools.rag_tools import faults
from src.tools.rag_tools.migration.faiss_disk import ForeignDirectoryError, Host, this_host
from src.tools.rag_tools.migration.faiss_sqlite import (
    BUSY_SECONDS,
    FORMAT,
    JOURNAL_FILE,
    JournalDamagedError,
    JournalError,
    connect,
    create_file,
    damaged,
    translated,
)
from src.tools.rag_tools.store import (
    DIMENSION,
    Chunk,
    DocumentGoneError,
    canonical_json,
    normalise_metadata,
    normalise_text,
)

VECTOR_BYTES = 4 * DIMENSION

POSITION = "SELECT max(seq) FROM entries"
HIGHEST = "SELECT max(document_id) FROM entries"
RECORDED = "SELECT op, user_id FROM entries WHERE document_id = ?"
APPEND = "INSERT INTO entries (op, document_id, user_id, at) VALUES (?, ?, ?, ?)"
KEEP = "INSERT INTO chunks (document_id, ordinal, chunk_id, content, metadata, vector) VALUES (?, ?, ?, ?, ?, ?)"
# The keys stay: a saved index may still hold these chunks, and is to be rid of them. They are written anew: a row made
# smaller where it is would keep its page, and the file would grow with what was deleted.
KEYS = "SELECT document_id, ordinal, chunk_id FROM chunks WHERE document_id = ?"
ERASE = "DELETE FROM chunks WHERE document_id = ?"
KEEP_KEY = "INSERT INTO chunks (document_id, ordinal, chunk_id) VALUES (?, ?, ?)"
AFTER = """
SELECT e.seq, e.op, e.document_id, e.user_id, c.chunk_id, c.ordinal
FROM (SELECT * FROM entries WHERE seq > ? ORDER BY seq LIMIT ?) AS e
LEFT JOIN chunks AS c ON e.op = 'add' AND c.document_id = e.document_id
ORDER BY e.seq, c.ordinal
"""
PAYLOAD = """
SELECT chunk_id, ordinal, content, metadata, vector FROM chunks
WHERE document_id = ? AND vector IS NOT NULL ORDER BY ordinal
"""
INVENTORY = """
SELECT a.document_id, a.user_id, count(c.chunk_id)
FROM entries AS a LEFT JOIN chunks AS c ON c.document_id = a.document_id
WHERE a.op = 'add'
  AND NOT EXISTS (SELECT 1 FROM entries AS d WHERE d.document_id = a.document_id AND d.op = 'delete')
GROUP BY a.document_id, a.user_id ORDER BY a.document_id
"""
CHUNK_IDS = "SELECT chunk_id FROM chunks"
READ_META = "SELECT value FROM meta WHERE key = ?"
WRITE_META = "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value"


class WrongOwnerError(JournalError):
    """The document is recorded for another user."""


class Op(StrEnum):
    ADD = "add"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. `keys`: (chunk id, ordinal) of an add, in order; they outlive the erased payload."""

    seq: int
    op: Op
    document_id: int
    user_id: int
    keys: tuple[tuple[uuid.UUID, int], ...]


@dataclass(frozen=True, slots=True)
class JournalDocument:
    """A document that was added and not deleted."""

    document_id: int
    user_id: int
    chunks: int


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Journal:
    """The journal of one directory. Safe for threads; each process opens its own.

    One connection reads and one writes, each behind its own lock, so that a search never waits for
    the disk of a write.
    """

    def __init__(
        self,
        path: Path,
        *,
        busy_seconds: float = BUSY_SECONDS,
        now: Callable[[], datetime.datetime] = utc_now,
    ) -> None:
        self.path = path
        self._now = now
        self._read_lock, self._write_lock = threading.Lock(), threading.Lock()
        with translated(path):
            self._reader = connect(path, busy_seconds)
            self._writer = connect(path, busy_seconds)

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        host: Host | None = None,
        busy_seconds: float = BUSY_SECONDS,
        now: Callable[[], datetime.datetime] = utc_now,
    ) -> Self:
        """The journal of `directory`, made with it where they are missing; checked, and of this host.

        Raises ForeignDirectoryError, or a JournalError.
        """
        path = directory / JOURNAL_FILE
        with translated(path):
            create_file(path)
        journal = cls(path, busy_seconds=busy_seconds, now=now)
        try:
            journal.check()
            journal._claim(host or this_host())
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        """Close both connections; a later call raises JournalError."""
        with self._read_lock, self._write_lock:
            self._reader.close()
            self._writer.close()

    # -- writing

    def append_add(self, user_id: int, document_id: int, chunks: Sequence[Chunk]) -> None:
        """Record the document whole; nothing to do where it is recorded.

        Raises DocumentGoneError once its deletion is recorded, WrongOwnerError where another user
        has it.
        """
        rows = [_row(document_id, chunk) for chunk in chunks]
        with self._writing("journal.add") as connection:
            recorded = self._recorded(connection, user_id, document_id)
            if Op.DELETE in recorded:
                raise DocumentGoneError(
                    f"document {document_id} was deleted: {self.path} takes nothing more of it; upload the file again,"
                    " it gets a new document id"
                )
            if Op.ADD not in recorded:
                self._append(connection, Op.ADD, user_id, document_id)
                connection.executemany(KEEP, rows)

    def append_delete(self, user_id: int, document_id: int) -> None:
        """Record the deletion, also of a document never seen, and erase what is kept of its content."""
        with self._writing("journal.delete") as connection:
            if Op.DELETE not in self._recorded(connection, user_id, document_id):
                self._append(connection, Op.DELETE, user_id, document_id)
                keys = connection.execute(KEYS, (document_id,)).fetchall()
                connection.execute(ERASE, (document_id,))
                connection.executemany(KEEP_KEY, keys)

    def set_host(self, host: Host) -> None:
        """Give the directory over to `host`: after a move of its disk, once no other host uses it."""
        with self._writing("journal.host") as connection:
            connection.execute(WRITE_META, ("host", host.to_json()))

    def set_note(self, key: str, value: str) -> None:
        """Note something about the directory, durably."""
        with self._writing("journal.note") as connection:
            connection.execute(WRITE_META, (key, value))

    # -- reading

    def position(self) -> int:
        """The number of the last entry, 0 for none. Cheap: every search asks."""
        return self._read(POSITION)[0][0] or 0

    def entries_after(self, seq: int, limit: int) -> list[Entry]:
        """At most `limit` entries after `seq`, in order. `document` gives the payload of an add."""
        rows = self._read(AFTER, (seq, limit))
        return [_entry(head, list(group)) for head, group in groupby(rows, itemgetter(0, 1, 2, 3))]

    def document(self, document_id: int) -> list[Chunk]:
        """The chunks of a document in order; none where it is unknown or deleted."""
        rows = self._read(PAYLOAD, (document_id,))
        if any(len(row[4]) != VECTOR_BYTES for row in rows):
            raise JournalDamagedError(damaged(self.path, f"a vector of document {document_id}"))
        return [_chunk(document_id, row) for row in rows]

    def inventory(self) -> list[JournalDocument]:
        """Every document added and not deleted, in order of its id."""
        return [JournalDocument(*row) for row in self._read(INVENTORY)]

    def highest_document(self) -> int:
        """The highest document id ever recorded, 0 for none."""
        return self._read(HIGHEST)[0][0] or 0

    def chunk_ids(self) -> set[uuid.UUID]:
        """Of every chunk ever added, deleted ones included."""
        return {uuid.UUID(bytes=row[0]) for row in self._read(CHUNK_IDS)}

    def note(self, key: str) -> str | None:
        """What was noted under `key`."""
        rows = self._read(READ_META, (key,))
        return rows[0][0] if rows else None

    def host(self) -> Host | None:
        """Whose directory this is, as recorded at first use."""
        rows = self._read(READ_META, ("host",))
        return Host.from_json(rows[0][0]) if rows else None

    def check(self) -> None:
        """JournalDamagedError where the file is damaged or of another format."""
        found = [row[0] for row in self._read("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            raise JournalDamagedError(damaged(self.path, found[0]))
        written = self._read("PRAGMA user_version")[0][0]
        if written == 0:
            raise JournalDamagedError(damaged(self.path, "it is no journal"))
        if written != FORMAT:
            raise JournalDamagedError(
                f"{self.path} is of format {written}, this release reads {FORMAT}: start the release that wrote it"
            )

    # -- parts

    def _claim(self, host: Host) -> None:
        recorded = self.host()
        if recorded is not None:
            refuse_other_host(self.path.parent, recorded, host)
        if recorded != host:
            self.set_host(host)

    def _recorded(self, connection: sqlite3.Connection, user_id: int, document_id: int) -> frozenset[Op]:
        rows = connection.execute(RECORDED, (document_id,)).fetchall()
        for _, owner in rows:
            if owner != user_id:
                raise WrongOwnerError(
                    f"{self.path} has document {document_id} of user {owner}, not of user {user_id}; nothing was"
                    " written. A document never changes its owner: look who asked"
                )
        return frozenset(Op(op) for op, _ in rows)

    def _append(self, connection: sqlite3.Connection, op: Op, user_id: int, document_id: int) -> None:
        connection.execute(APPEND, (op.value, document_id, user_id, self._now().isoformat()))

    def _read(self, statement: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        with self._read_lock, translated(self.path):
            return self._reader.execute(statement, parameters).fetchall()

    @contextmanager
    def _writing(self, point: str) -> Iterator[sqlite3.Connection]:
        """One transaction, committed and synced at the end, or undone."""
        with translated(self.path), faults.point(point), self._write_lock:
            # IMMEDIATE: what is read inside decides what is written, so nobody may write in between.
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                with faults.point("journal.commit"):
                    self._writer.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some errors, a full disk among them.
                with suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
                raise


def refuse_other_host(directory: Path, recorded: Host, host: Host) -> None:
    """ForeignDirectoryError where `directory` is `recorded` to belong to another host than `host`."""
    if not recorded.same_as(host):
        raise ForeignDirectoryError(
            f"{directory} belongs to host {recorded.hostname!r}, this is {host.hostname!r}: the FAISS directory is for"
            " one host. Start here with a directory of its own; if this one was moved here and the other host is off"
            " for good, hand it over with"
            f" `sqlite3 {directory / JOURNAL_FILE} \"DELETE FROM meta WHERE key = 'host'\"`"
        )


def recorded_host(directory: Path) -> Host | None:
    """The host that first used `directory`; None where it has no journal yet. Creates nothing."""
    path = directory / JOURNAL_FILE
    if not path.exists():
        return None
    journal = Journal(path)
    try:
        return journal.host()
    finally:
        journal.close()


def _row(document_id: int, chunk: Chunk) -> tuple[Any, ...]:
    if chunk.document_id != document_id:
        raise JournalError(
            f"chunk {chunk.id} is of document {chunk.document_id}, not of document {document_id}; nothing was written"
        )
    return (
        document_id,
        chunk.ordinal,
        chunk.id.bytes,
        normalise_text(chunk.content),
        canonical_json(normalise_metadata(chunk.metadata)),
        chunk.vector.astype("<f4").tobytes(),
    )


def _chunk(document_id: int, row: tuple[bytes, int, str, str, bytes]) -> Chunk:
    key, ordinal, content, metadata, vector = row
    values = np.frombuffer(vector, dtype="<f4").astype(np.float32, copy=False)
    return Chunk(uuid.UUID(bytes=key), document_id, ordinal, content, json.loads(metadata), values)


def _entry(head: tuple[int, str, int, int], rows: list[tuple[Any, ...]]) -> Entry:
    seq, op, document_id, user_id = head
    keys = tuple((uuid.UUID(bytes=row[4]), row[5]) for row in rows if row[4] is not None)
    return Entry(seq, Op(op), document_id, user_id, keys)
