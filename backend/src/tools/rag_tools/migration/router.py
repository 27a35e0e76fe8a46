"""Reads and writes of documents, routed by the stage in force.

Nothing is acknowledged before the intent is committed and the store that serves the user has it. The other
store is written under a time limit; whatever it misses stays owed in the ledger and is settled later. A read
is answered by a store that owes the user nothing, without any document whose deletion is under way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from src.tools.rag_tools.documents import Document, Documents
from src.tools.rag_tools.giants import LOOK_SECONDS
from src.tools.rag_tools.migration import failover, ledger, metrics
from src.tools.rag_tools.migration.breaker import Breaker
from src.tools.rag_tools.migration.evidence import Read
from src.tools.rag_tools.migration.faiss_files import SaveInProgressError
from src.tools.rag_tools.migration.faiss_store import FaissStore, Owner, Owners
from src.tools.rag_tools.migration.flags import (
    Flags,
    FlagsUnknownError,
    HaltedError,
    Plan,
    View,
    is_stale,
    needs_faiss,
    owners_version,
)
from src.tools.rag_tools.migration.guard import Guard
from src.tools.rag_tools.migration.settings import MigrationSettings, migration_settings
from src.tools.rag_tools.migration.settle import Settler
from src.tools.rag_tools.migration.shadow import Shadow
from src.tools.rag_tools.migration.stages import ROUTING, Store
from src.tools.rag_tools.migration.stores import Stores
from src.tools.rag_tools.pgvector_store import Connection, Pool
from src.tools.rag_tools.store import Chunk, DocumentGoneError, Hit, StoreError, Vector

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings

log = structlog.get_logger(__name__)

SECONDARY_WORKERS = 4
REPORT_SECONDS = 0.1

READY = """
UPDATE documents SET status = 'ready', error = NULL, updated_at = now()
WHERE id = %s AND status IN ('received', 'indexing')
  AND (SELECT max(id) FROM rollout_transitions) <= %s + 1
RETURNING id
"""
BEHIND = "SELECT 1 FROM rollout_transitions WHERE id > %s + 1 LIMIT 1"
OWNERS = "SELECT docstore_id, user_id, document_id, ordinal FROM legacy_chunks WHERE status = 'assigned'"


class RestingError(StoreError):
    """The store has just failed several times and is not asked for a while."""


class StaleProcessError(StoreError):
    """This process acts on flags that the fleet has left behind; its write is not acknowledged."""


class Router(Documents):
    """Documents on two stores, by stage."""

    def __init__(
        self,
        pool: Pool,
        embeddings: Embeddings,
        *,
        settings: MigrationSettings = migration_settings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(pool, embeddings)
        self.settings = settings
        self.clock = clock
        self.flags = Flags(pool, clock=clock)
        faiss = FaissStore.unread(settings.FAISS_INDEX_PATH, owners=self._read_owners)
        self.stores = Stores(faiss, self.pgvector)
        self.breaker = Breaker(clock=clock)
        self.guard = Guard(pool, window_seconds=settings.GUARD_WINDOW_SECONDS)
        self.shadow = Shadow(self.stores, settings, count=self.flags.count, clock=clock)
        self.settler = Settler(
            self.stores,
            load=self.load,
            prepare=self.prepare,
            forget=self.forget,
            give_up=self._give_up,
            finished=self._finished,
        )
        self._owners_version = -1
        self._polling = threading.Lock()
        self._secondary = ThreadPoolExecutor(SECONDARY_WORKERS, thread_name_prefix="secondary")

    # -- life of the service

    def start(self, *, loops: bool = True) -> None:
        """Read flags and owners, then poll, settle and shadow in the background."""
        super().start(loops=False)
        self.refresh()
        self.refresh()
        if (reason := self.flags.halted) is not None:
            self.flags.leave()
            raise HaltedError(reason)
        if loops:
            self.shadow.start()
            self._loop("poll", self.settings.POLL_SECONDS, self.poll)
            self._loop("settle", self.settings.SETTLE_SECONDS, self.resume)
            self._loop("guard", self.settings.GUARD_SECONDS, self.guard.look)
            self._loop("giants", LOOK_SECONDS, self.look_for_giants)
            self._loop("save", self.settings.SAVE_FAISS_SECONDS, self.save_faiss)

    def close(self) -> None:
        """Drain the shadow queue, save FAISS, leave the fleet."""
        super().close()
        self.shadow.close()
        self._secondary.shutdown(wait=True)
        if self._loops:
            self.save_faiss(self.stores.faiss.save_in_turn)
        self.flags.leave()
        self.stores.faiss.close()

    def poll(self) -> None:
        """One poll; after a stage change more of them at once, so that nobody waits a second for the report of it."""
        self.refresh()
        while not self.flags.is_reported and not self._closing.wait(REPORT_SECONDS):
            self.refresh()

    def refresh(self) -> View:
        """One poll; takes over a new owner assignment, and reads FAISS, before anything is served under it."""
        # One at a time: of two polls the later one may have looked earlier, and would seem a failover.
        with self._polling:
            begun, row = self.flags.fetch()
            if (version := owners_version(row)) != self._owners_version:
                self.load_owners(version)
            if needs_faiss(row):
                self.stores.faiss.load()
            view = self.flags.adopt(begun, row)
            self._watch_failover(view)
        metrics.show_stage(
            view.stage,
            view.read_percent,
            acts_on=self.flags.acts_on,
            newest=view.transition_id,
            halted=self.flags.halted is not None,
        )
        return view

    def _watch_failover(self, view: View) -> None:
        """Stop writing where PostgreSQL has forgotten what FAISS' journal remembers."""
        journal = self.stores.faiss.journal
        # The journal first: what others add to both meanwhile must not look as if PostgreSQL had lost it.
        remembered = failover.of_journal(journal)
        with self._transaction("look for a failover", "failover.look") as connection:
            reason = failover.lost(failover.of_postgres(connection), remembered)
        if reason is not None:
            self.flags.halt(reason)
        elif Store.FAISS in ROUTING[view.stage].writes:
            try:
                failover.remember(journal, view.transition_id)
            except StoreError as error:
                # Somebody who hangs over the journal keeps nobody from starting; the next poll tries again.
                log.warning("failover.remember.failed", error=str(error))

    def load_owners(self, version: int) -> None:
        """Give the FAISS store the owners of the legacy chunks, as version `version` decided them.

        One that is not read yet asks for them when it is.
        """
        self._owners_version = version
        if self.stores.faiss.is_loaded:
            self.stores.faiss.set_owners(self._read_owners())

    def _read_owners(self) -> Owners:
        version = self._owners_version
        with self._transaction("read of the owners", "owners.load") as connection:
            rows = connection.execute(OWNERS).fetchall()
        return Owners(version, {docstore_id: Owner(*owner) for docstore_id, *owner in rows})

    def resume(self) -> None:
        """Settle what is owed and due, and finish deletions; one step of the loop."""
        if self.flags.halted is not None:
            return
        self.settler.run(limit=200, stop=self._closing.is_set)
        self._resume_deletes()

    def save_faiss(self, save: Callable[[], object] | None = None) -> None:
        """Fold the journal into the files that LangChain opens, where the stage writes FAISS."""
        if Store.FAISS not in ROUTING[self.flags.view().stage].writes:
            return
        try:
            (save or self.stores.faiss.save)()
        except SaveInProgressError:
            log.info("faiss.save.left")  # to the process that is at it
        except StoreError as error:
            log.error("faiss.save.failed", error=str(error))

    def status(self) -> dict[str, Any]:
        report = super().status()
        try:
            view = self.flags.view()
        except FlagsUnknownError as error:
            return {**report, "ready": False, "reason": str(error)}
        halted = self.flags.halted
        return {
            **report,
            "ready": bool(report["ready"]) and halted is None,
            **({"reason": halted} if halted else {}),
            "stage": view.stage.value,
            "transition": view.transition_id,
            "read_percent": view.read_percent,
        }

    # -- reads

    def search(self, user_id: int, vector: Vector, k: int) -> list[Hit]:
        begun = self.clock()
        with self.flags.request() as view:
            plan = view.plan(user_id)
            stores = self._readable(view, plan)
            try:
                hits = self._ask(view, plan, stores, user_id, vector, k)
            except StoreError as error:
                stores = (self._fall_back(view, plan, user_id, error),)
                begun = self.clock()  # what is compared is this store's answer, not the other's failure
                hits = self._ask(view, plan, stores, user_id, vector, k)
        self.flags.count(f"reads.{'+'.join(stores)}")
        if ROUTING[view.stage].shadow and len(stores) == 1 and self.shadow.samples(view):
            self.shadow.offer(Read(view, user_id, vector, k, stores[0], hits, begun, self.clock()))
        return hits

    def _ask(
        self, view: View, plan: Plan, stores: tuple[Store, ...], user_id: int, vector: Vector, k: int
    ) -> list[Hit]:
        """Ask these stores, measured; pgvector not at all while it rests after failing several times."""
        if Store.PGVECTOR in stores and self.breaker.open and plan.fallback is Store.FAISS:
            raise RestingError("pgvector failed several times in a row and is left alone for some seconds")
        name, begun = "+".join(stores), self.clock()
        try:
            hits = self.stores.search(stores, user_id, vector, k, view.hidden)
        except StoreError:
            metrics.READS.labels(name, "error").inc()
            if Store.PGVECTOR in stores:
                self.breaker.failed()
            raise
        metrics.READS.labels(name, "ok").inc()
        metrics.STORE_SECONDS.labels(name).observe(self.clock() - begun)
        if Store.PGVECTOR in stores:
            self.breaker.succeeded()
        return hits

    def _readable(self, view: View, plan: Plan) -> tuple[Store, ...]:
        """FAISS on stale flags only where no other process can have left it behind."""
        pgvector_may_serve = Store.PGVECTOR in ROUTING[view.stage].reads
        if Store.FAISS in plan.reads and pgvector_may_serve and is_stale(view, self.clock()):
            raise FlagsUnknownError(
                "the flags are older than 30 seconds and users may have moved; PostgreSQL is away:"
                " see RUNBOOK.md, 'PostgreSQL is away'"
            )
        return plan.reads

    def _fall_back(self, view: View, plan: Plan, user_id: int, error: StoreError) -> Store:
        """The store that answers in place of the one that failed, counted; raises `error` where there is none."""
        other = plan.fallback
        if other is None or is_stale(view, self.clock()):
            raise error
        if other is Store.FAISS:
            self.flags.count("fallback")
            metrics.FALLBACKS.inc()
        log.warning("read.fallback.used", user_id=user_id, store=other, error=str(error))
        return other

    # -- writes

    def receive(self, user_id: int, path: Path, filename: str) -> int:
        with self.flags.request(write=True):
            return super().receive(user_id, path, filename)

    def delete(self, user_id: int, document_id: int) -> None:
        with self.flags.request(write=True):
            super().delete(user_id, document_id)

    def _intend(self, connection: Connection, document_id: int, user_id: int) -> None:
        ledger.intend(connection, document_id, user_id)

    def _withdraw(self, connection: Connection, document_id: int, user_id: int) -> None:
        ledger.withdraw(connection, document_id, user_id)

    def _unstored(self, connection: Connection, documents: list[int]) -> set[int]:
        return super()._unstored(connection, documents) | ledger.owed_among(connection, documents)

    def _store(self, document: Document, chunks: list[Chunk], *, answered: bool) -> None:
        with self.flags.request(write=True) as view:
            serving, *others = view.plan(document.user_id).writes
            try:
                self.stores.present(serving, document.user_id, document.id, chunks)
                metrics.WRITES.labels(serving.value, "ok").inc()
            except DocumentGoneError:
                raise
            except StoreError as error:
                metrics.WRITES.labels(serving.value, "error").inc()
                if answered:
                    raise
                self._abandon(document, error)
            for store in others:
                write = partial(self.stores.present, store, document.user_id, document.id, chunks)
                self._secondary_write(store, document.id, write)
            self._set_ready(document, view)
        self.settler.after(document.id)

    def _found_ready(self, document: Document) -> None:
        """As after a write of one's own: not where this process is behind, and with a note of what is owed."""
        with self.flags.request(write=True) as view:
            self._set_ready(document, view)

    def _erase(self, document: Document) -> None:
        self.flags.note_deleted(document.id)
        with self.flags.request(write=True) as view:
            for store in view.plan(document.user_id).writes:
                erase = partial(self.stores.absent, store, document.user_id, document.id)
                self._secondary_write(store, document.id, erase)
        self._erase_files(document)

    def _secondary_write(self, store: Store, document_id: int, write: Callable[[], None]) -> None:
        """Try within the time limit; what fails or hangs stays owed and changes nothing for the caller."""
        future: Future[None] = self._secondary.submit(write)
        try:
            future.result(self.settings.SECONDARY_TIMEOUT_SECONDS)
            metrics.WRITES.labels(store.value, "ok").inc()
        except FutureTimeoutError:
            future.cancel()
            metrics.WRITES.labels(store.value, "timeout").inc()
            log.warning("write.secondary.timeout", store=store, document_id=document_id)
        except DocumentGoneError:
            log.info("write.secondary.gone", store=store, document_id=document_id)
        except Exception as error:  # noqa: BLE001 - the boundary: whatever befalls this store, it stays owed
            metrics.WRITES.labels(store.value, "error").inc()
            log.warning("write.secondary.failed", store=store, document_id=document_id, error=str(error))

    def _set_ready(self, document: Document, view: View) -> None:
        """The compare-and-set that acknowledges; refused two transitions behind."""
        with self._transaction("upload", "upload.ready") as connection:
            changed = connection.execute(READY, (document.id, view.transition_id)).fetchone() is not None
            behind = not changed and connection.execute(BEHIND, (view.transition_id,)).fetchone() is not None
            owed = ledger.owing_stores(connection, document.user_id)
        if behind:
            raise StaleProcessError(
                f"document {document.id}: this process acts on transition {view.transition_id}, which the fleet"
                " has left behind; another process finishes the upload. Restart this one"
            )
        self._settled(document, changed)
        self.flags.note_owed(document.user_id, owed)

    # -- parts

    def _finished(self, document: Document) -> None:
        """Both stores are done: the kept result goes; of a deleted document the upload as well.

        The file of a failed one stays: whoever called may send the same file again.
        """
        if document.status == "deleted":
            self._erase_files(document)
        else:
            self.forget(document)
