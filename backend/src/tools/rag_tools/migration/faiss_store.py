"""FAISS as a VectorStore: LangChain's index in memory, every write in a journal beside it.

A write is done when the journal has it on disk; memory follows the journal before each question, so
all processes on one directory agree. A process that dies loses only memory. Saving folds the
journal into a new pair of files that LangChain opens; the journal stays as it is.
"""

from __future__ import annotations

import datetime
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import numpy as np

from src.tools.rag_tools.migration import faiss_files
from src.tools.rag_tools.migration.faiss_disk import (
    FaissDirectoryError,
    Host,
    refuse_network,
    this_host,
)
from src.tools.rag_tools.migration.faiss_format import Content
from src.tools.rag_tools.migration.faiss_generations import Generation, Stamp, current_generation, stamp
from src.tools.rag_tools.migration.faiss_journal import Entry, Journal, Op, utc_now
from src.tools.rag_tools.migration.faiss_memory import Memory
from src.tools.rag_tools.migration.faiss_pickle import PickledChunks, collector_paused
from src.tools.rag_tools.migration.faiss_records import BaseChunk, Counts, Owner, Owners, Sample
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.store import (
    Chunk,
    Hit,
    InventoryRow,
    Vector,
    check_vectors,
)

__all__ = ["BaseChunk", "Counts", "FaissStore", "Owner", "Owners", "Sample"]

TAIL_BATCH = 500
SLICE = 512


class JournalLostError(FaissDirectoryError):
    """The index was saved with more of the journal than there is: it is missing, or an older copy."""


class OwnersUnknownError(FaissDirectoryError):
    """Nothing is saved before it is known whose the legacy chunks are."""


class FaissStore:
    """One process's store on one directory. Safe for threads.

    A deleted document is hidden at once, and out of the files with the next save. `upsert` and
    `delete` raise DocumentGoneError or a StoreError; the others a StoreError when the journal
    cannot be read.
    """

    name = Store.FAISS

    def __init__(
        self,
        directory: Path,
        journal: Journal,
        *,
        owners: Callable[[], Owners | None],
        host: Host,
        now: Callable[[], datetime.datetime],
    ) -> None:
        self.directory = directory
        self.journal = journal
        self.old_release_wrote = False
        self._host, self._now = host, now
        self._owners = owners
        self._loaded: Memory | None = None
        self._stamp: Stamp = ()
        self._seen = 0
        # One lock for all of memory: faiss may move the vectors while it adds to them.
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        owners: Owners | None = None,
        host: Host | None = None,
        mountinfo: str | None = None,
        now: Callable[[], datetime.datetime] = utc_now,
    ) -> Self:
        """The store on `directory`, which is made where it is missing. Raises a FaissDirectoryError.

        Until owners are set, only what the journal added is served.
        """
        store = cls.unread(directory, owners=lambda: owners, host=host, mountinfo=mountinfo, now=now)
        try:
            store.load()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def unread(
        cls,
        directory: Path,
        *,
        owners: Callable[[], Owners | None],
        host: Host | None = None,
        mountinfo: str | None = None,
        now: Callable[[], datetime.datetime] = utc_now,
    ) -> Self:
        """The same with its journal only: the index is read, and `owners` asked, when it is first needed."""
        host = host or this_host()
        refuse_network(directory, mountinfo)
        return cls(directory, Journal.open(directory, host=host, now=now), owners=owners, host=host, now=now)

    @property
    def is_loaded(self) -> bool:
        """Whether the index is in memory."""
        return self._loaded is not None

    def load(self) -> None:
        """Read the index, unless that was done. Raises a FaissDirectoryError."""
        with self._lock:
            if self._loaded is None:
                with collector_paused():
                    self._read()

    def _read(self) -> None:
        saved = faiss_files.open_files(self.directory, host=self._host, now=self._now)
        _refuse_lost_journal(saved.generation, self.journal)
        memory = Memory(saved.content)
        owners = self._owners()
        if owners is not None:
            memory.assign(owners)
        self.old_release_wrote, self._stamp, self._loaded = saved.old_release_wrote, saved.stamp, memory
        self.tail()

    @property
    def _memory(self) -> Memory:
        if self._loaded is None:
            self.load()
        if self._loaded is None:
            raise AssertionError("load reads it or raises")
        return self._loaded

    def close(self) -> None:
        """Let go of the journal; saves nothing."""
        self.journal.close()

    # -- the store

    def upsert(self, user_id: int, document_id: int, chunks: Sequence[Chunk]) -> None:
        """Durable when it returns; searches find it from their next look at the journal."""
        self.journal.append_add(user_id, document_id, _checked(document_id, chunks))

    def delete(self, user_id: int, document_id: int) -> None:
        """Final, also for a document never seen."""
        self.journal.append_delete(user_id, document_id)

    def search(self, user_id: int, vector: Vector, k: int) -> list[Hit]:
        """The k nearest of the user's own chunks by cosine, exactly."""
        query = check_vectors([vector], "query")[0]
        self.tail()
        with self._lock:
            return self._memory.nearest(user_id, query, k)

    def inventory(self, user_id: int) -> Iterator[InventoryRow]:
        """The user's chunks as they are now, in order of chunk id."""
        self.tail()
        with self._lock:
            memory = self._memory
            own = memory.in_order(memory.own(user_id))
        for some in _slices(own, SLICE):
            yield from self._inventory(memory, user_id, some)

    # -- what the other store, owner assignment and verify ask

    def document(self, document_id: int, user_id: int | None = None) -> list[Chunk]:
        """The document's chunks by ordinal, vectors and all; none where it is unknown or deleted.

        With `user_id` only those that are this user's.
        """
        self.tail()
        with self._lock:
            positions = self._memory.of_document(document_id)
            if user_id is not None:
                positions = self._memory.still(user_id, positions)
            return self._memory.whole(positions)

    def owner_of(self, chunk_id: UUID) -> int | None:
        """Whose chunk it is; None for one unknown, deleted or nobody's."""
        self.tail()
        with self._lock:
            owner = self._memory.owner_of(chunk_id)
        return owner.user_id if owner else None

    def count(self, user_id: int) -> int:
        """How many chunks the user has."""
        self.tail()
        with self._lock:
            return len(self._memory.own(user_id))

    def users(self) -> list[int]:
        """Every user with chunks, in order."""
        return sorted(self.counts().by_user)

    def counts(self) -> Counts:
        self.tail()
        with self._lock:
            memory = self._memory
            return Counts(
                memory.users(),
                memory.documents(),
                len(memory.unowned()),
                sum(1 for _ in memory.legacy()),
                self._seen,
            )

    def unowned(self) -> list[str]:
        """Docstore ids of the legacy chunks that are nobody's, by position."""
        self.tail()
        with self._lock:
            names = self._memory.chunks.docstore_ids
            return [names[position] for position in self._memory.unowned()]

    def base_positions(self) -> Iterator[BaseChunk]:
        """The chunks that the old release wrote, by position, for deciding whose they are."""
        self.tail()
        with self._lock:
            positions, chunks = list(self._memory.legacy()), self._memory.chunks
        for position in positions:
            metadata = chunks.metadatas[position]
            source = metadata.get("source")
            yield BaseChunk(
                position,
                chunks.docstore_ids[position],
                source if isinstance(source, str) else None,
                chunks.contents[position],
                metadata,
            )

    def sample(self, count: int, seed: int) -> list[Sample]:
        """At most `count` legacy chunks not deleted, the same ones for the same seed and files."""
        with self._lock:
            memory = self._memory
            live = set(memory.live().tolist())
            legacy = [position for position in memory.legacy() if position in live]
            drawn = random.Random(seed).sample(legacy, min(count, len(legacy)))  # noqa: S311  a sample is no secret
            rows = memory.vectors.at(np.array(drawn, np.int64))
            chunks = memory.chunks
            return [
                Sample(chunks.docstore_ids[position], chunks.contents[position], row)
                for position, row in zip(drawn, rows, strict=True)
            ]

    # -- memory

    def set_owners(self, owners: Owners) -> None:
        """Serve legacy chunks by this assignment; one that is not newer changes nothing."""
        with self._lock:
            known = self._memory.owners
            if known is None or owners.version > known.version:
                self._memory.assign(owners)

    @property
    def owners_version(self) -> int | None:
        """The assignment in force."""
        with self._lock:
            return self._memory.owners.version if self._memory.owners else None

    def tail(self) -> int:
        """Take over what the journal has and memory has not; the position reached."""
        self.load()
        if self.journal.position() > self._seen:
            with self._lock:
                self._seen = self._follow(self._memory, self._seen)
        return self._seen

    def _follow(self, memory: Memory, seen: int) -> int:
        """Apply what the journal has after `seen`; the position reached. Applying an entry again changes nothing."""
        while entries := self.journal.entries_after(seen, TAIL_BATCH):
            for entry in entries:
                self._apply(memory, entry)
            seen = entries[-1].seq
        return seen

    def _apply(self, memory: Memory, entry: Entry) -> None:
        match entry.op:
            case Op.ADD:
                lacking = memory.lacks([chunk_id for chunk_id, _ in entry.keys])
                payload = self.journal.document(entry.document_id) if lacking else []
                memory.add(
                    {chunk_id: Owner(entry.user_id, entry.document_id, ordinal) for chunk_id, ordinal in entry.keys},
                    payload,
                )
            case Op.DELETE:
                memory.delete(entry.document_id)

    def _inventory(self, memory: Memory, user_id: int, positions: Sequence[int]) -> list[InventoryRow]:
        """Asked between two slices, in which time a chunk may be deleted or assigned."""
        with self._lock:
            return memory.inventory(memory.still(user_id, positions))

    # -- saving

    def save(self) -> Generation:
        """Write everything but deleted documents as files that LangChain opens; what is nobody's too.

        Returns the current generation where it already holds the same. Raises OwnersUnknownError,
        and what faiss_files.save_generation raises; what was saved before then is as it was.
        """
        with self._lock:
            position, memory = self.tail(), self._memory
            self._refuse_unknown_owners()
            live = memory.live()
            chunks = _picked(memory.chunks, live.tolist())
        saved = self._already_saved(position, len(live))
        if saved is None:
            saved = faiss_files.save_generation(
                self.directory,
                Content(self._copied_index(memory, live), chunks),
                journal_position=position,
                seen=self._stamp,
                host=self._host,
                now=self._now,
            )
            self._stamp = stamp(self.directory)
        if len(memory) > 2 * len(live):
            self._begin_anew()
        return saved

    def save_in_turn(self) -> Generation:
        """`save` after whoever is saving; for a process that ends, whose last writes nobody else may have saved."""
        while True:
            try:
                return self.save()
            except faiss_files.SaveInProgressError:
                faiss_files.wait_for_saver(self.directory)

    def _copied_index(self, memory: Memory, positions: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
        """In slices, so that searches come in between; a position never changes what it holds."""
        index = Content.empty().index
        for start in range(0, len(positions), SLICE):
            with self._lock:
                rows = memory.vectors.at(positions[start : start + SLICE])
            index.add(rows)
        return index

    def _begin_anew(self) -> None:
        """Read what was saved, as a process that starts: memory holds every deleted chunk until then.

        Who has begun to read from the memory before goes on with it.
        """
        saved = faiss_files.open_files(self.directory, host=self._host, now=self._now)
        memory = Memory(saved.content)
        seen = self._follow(memory, 0)
        with self._lock:
            if self._memory.owners is not None:
                memory.assign(self._memory.owners)
            self._seen = self._follow(memory, seen)
            self._loaded, self._stamp = memory, saved.stamp

    def _already_saved(self, position: int, chunks: int) -> Generation | None:
        generation = current_generation(self.directory)
        if generation is None or faiss_files.old_release_wrote(self.directory):
            return None
        same = (generation.journal_position, generation.chunks) == (position, chunks)
        return generation if same else None

    def _refuse_unknown_owners(self) -> None:
        """A deleted legacy document is known to be one only by its owners."""
        if self._memory.owners is None and self._memory.deleted and self._memory.unowned():
            raise OwnersUnknownError(
                f"{self.directory} is not saved: documents were deleted, and which chunks are theirs is not known"
                " before the owners are set; connect to PostgreSQL and save again"
            )


def _refuse_lost_journal(generation: Generation | None, journal: Journal) -> None:
    saved = generation.journal_position if generation else 0
    if journal.position() < saved:
        raise JournalLostError(
            f"{journal.path} ends at entry {journal.position()}, but the index was saved with"
            f" {saved}: the journal was lost or is an older copy, and with it deletions and owners. Restore the whole"
            " directory from one backup"
        )


def _checked(document_id: int, chunks: Sequence[Chunk]) -> list[Chunk]:
    if not chunks:
        return []
    rows = check_vectors([chunk.vector for chunk in chunks], f"document {document_id}")
    return [replace(chunk, vector=row) for chunk, row in zip(chunks, rows, strict=True)]


def _picked(chunks: PickledChunks, positions: Sequence[int]) -> PickledChunks:
    return PickledChunks(
        [chunks.docstore_ids[position] for position in positions],
        [chunks.contents[position] for position in positions],
        [chunks.metadatas[position] for position in positions],
    )


def _slices(items: Sequence[int], size: int) -> Iterator[list[int]]:
    remaining = iter(items)
    while some := list(islice(remaining, size)):
        yield some
