"""Settling the legacy documents in bulk: what pgvector is owed and FAISS has, by binary COPY.

The ledger is the cursor: a process that dies leaves each document wholly copied or still owed, and
the same command goes on from there. A settling process or a second backfill may run beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from rollout import backfill_batch
from rollout.backfill_batch import Batch, CannotCopyError, Owed, copy_batch
from src.tools.rag_tools import kept
from src.tools.rag_tools.migration.faiss_store import FaissStore
from src.tools.rag_tools.pgvector_store import Connection, Pool, unavailable

log = structlog.get_logger(__name__)

STREAMS = 2
"""PostgreSQL works on each with one process; a third no longer helps where it has two processors."""
BATCH_CHUNKS = 4_000
PAGE_DOCUMENTS = 500
FIRST_DOCUMENTS = 20
ROWS_PER_SECOND = 8_000
"""What the dry run estimates with; measured on two cores that client and server share."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is; `of_documents` were owed at the beginning."""

    documents: int
    of_documents: int
    chunks: int
    failed: int


@dataclass(slots=True)
class BackfillReport:
    """What was copied; of a dry run, what would be.

    `failed`: the reason by document id; nothing of these was copied. `remaining`: how many
    documents pgvector is owed afterwards, for whatever reason.
    """

    executed: bool
    documents: int = 0
    chunks: int = 0
    bytes: int = 0
    owners: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    remaining: int = 0
    stopped: bool = False

    @property
    def estimated_seconds(self) -> float:
        return self.chunks / ROWS_PER_SECOND

    def add(self, batch: Batch) -> None:
        self.documents += len(batch.documents)
        self.chunks += batch.chunks
        self.bytes += batch.bytes
        self.owners |= {owed.user_id for owed in batch.documents}


def backfill(
    pool: Pool,
    faiss: FaissStore,
    *,
    execute: bool,
    progress: Callable[[Progress], None],
    batch_chunks: int = BATCH_CHUNKS,
    streams: int = STREAMS,
    should_stop: Callable[[], bool] = lambda: False,
) -> BackfillReport:
    """Copy every document that pgvector is owed and FAISS has; a dry run reads and checks them all.

    `pool` connects as victus_rollout. `streams` batches are copied at a time. `progress` is told after
    each, committed by then; `should_stop` is asked between batches. Raises RefusedError where the stage does
    not write both stores, StoreError where PostgreSQL, FAISS or the disk fails; what was copied by then stays.
    """
    return _Backfill(pool, faiss, execute, progress, batch_chunks, streams, should_stop).run()


@dataclass(slots=True)
class _Backfill:
    pool: Pool
    faiss: FaissStore
    execute: bool
    progress: Callable[[Progress], None]
    batch_chunks: int
    streams: int
    should_stop: Callable[[], bool]
    total: int = 0
    report: BackfillReport = field(init=False)
    lock: threading.Lock = field(default_factory=threading.Lock)
    broken: bool = False

    def run(self) -> BackfillReport:
        self.report = BackfillReport(executed=self.execute)
        with self._connection() as connection:
            backfill_batch.require_both_written(connection)
            self.total = backfill_batch.total(connection)
        if not self.execute:
            self._count()
        else:
            # A later pass takes what somebody else was at work on, and gave up, during one before.
            while self._passes():
                pass
        with self._connection() as connection:
            self.report.remaining = backfill_batch.remaining(connection)
        return self.report

    def _passes(self) -> bool:
        """One pass in each stream; False where there was no document left, or it was stopped.

        The rows of a document are locked by the stream that copies it, and left out by the other.
        """
        before = self.report.documents
        with ThreadPoolExecutor(self.streams, thread_name_prefix="backfill") as threads:
            begun = [threads.submit(self._pass) for _ in range(self.streams)]
        for each in begun:
            each.result()
        return self.report.documents > before and not self.report.stopped

    def _pass(self) -> None:
        """Every document once, in order of id. Where it fails, the other streams end with their batch."""
        try:
            self._go_through()
        except BaseException:
            self.broken = True
            raise

    def _go_through(self) -> None:
        after, one_by_one_to = 0, 0
        while not self._stop():
            alone = after < one_by_one_to
            try:
                batch = self._copy(after, 1 if alone else self._enough())
            except CannotCopyError as error:
                if alone or len(error.documents) == 1:
                    after = error.documents[-1].document_id
                    self._fail(error)
                else:
                    one_by_one_to = error.documents[-1].document_id
                continue
            if not batch.documents:
                return
            after = batch.documents[-1].document_id
            self._take_in(batch)

    def _copy(self, after: int, documents: int) -> Batch:
        with self._connection() as connection:
            return copy_batch(
                connection, self.faiss, after=after, failed=list(self.report.failed),
                documents=documents, chunks=self.batch_chunks,
            )  # fmt: skip

    def _enough(self) -> int:
        """About as many documents as fill a batch, so that no more are locked than are copied."""
        if not self.report.chunks:
            return FIRST_DOCUMENTS
        return 1 + self.batch_chunks * self.report.documents // self.report.chunks

    def _count(self) -> None:
        """The dry run: reads, checks and encodes as a copy would."""
        after = 0
        while not self._stop() and (page := self._page(after)):
            after, batch = page[-1].document_id, Batch()
            for owed in page:
                try:
                    backfill_batch.count_document(self.faiss, owed, batch)
                except CannotCopyError as error:
                    self._fail(error)
            self._take_in(batch)

    def _page(self, after: int) -> list[Owed]:
        with self._connection() as connection:
            return backfill_batch.next_owed(connection, after=after, failed=(), limit=PAGE_DOCUMENTS)

    def _take_in(self, batch: Batch) -> None:
        report = self.report
        if self.execute:
            _forget_kept(batch.documents)
        with self.lock:
            report.add(batch)
            self.progress(Progress(report.documents, self.total, report.chunks, len(report.failed)))

    def _fail(self, error: CannotCopyError) -> None:
        """Nothing is wrong where it was deleted, or settled by somebody else, in the meantime."""
        owed = error.documents[-1]
        with self._connection() as connection:
            if not backfill_batch.still_owed(connection, owed):
                return
            if self.execute:
                backfill_batch.postpone(connection, owed, error)
        self.report.failed[owed.document_id] = str(error)
        log.warning("backfill.document.failed", document_id=owed.document_id, error=str(error))

    def _stop(self) -> bool:
        self.report.stopped = self.report.stopped or self.should_stop()
        return self.report.stopped or self.broken

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        with unavailable("backfill"), self.pool.connection() as connection:
            yield connection


def _forget_kept(copied: Sequence[Owed]) -> None:
    """Both stores are done with these now. Of a legacy document nothing was kept."""
    for owed in copied:
        place = kept.kept_path(Path(owed.path), owed.document_id) if owed.path else None
        if place is not None and place.exists():
            kept.forget(place)
