"""Bringing a store to what the ledger wants: for a request, for what was left owed, for the way back.

Applying is idempotent and each store refuses a document whose deletion it knows, so any number of processes
may settle at once, and one that dies leaves nothing worse than an entry still owed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from random import SystemRandom

import structlog

from src.tools.rag_tools import faults
from src.tools.rag_tools.chunking import DocumentUnreadableError
from src.tools.rag_tools.documents import Document, DocumentNotFoundError, UploadMissingError
from src.tools.rag_tools.embeddings import EmbeddingError, EmbeddingRefusedError
from src.tools.rag_tools.kept import KeptDamagedError
from src.tools.rag_tools.migration import ledger
from src.tools.rag_tools.migration.flags import latest
from src.tools.rag_tools.migration.ledger import Entry, State, Wanted
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.migration.stores import Stores
from src.tools.rag_tools.pgvector_store import Connection, unavailable
from src.tools.rag_tools.store import Chunk, DocumentGoneError, InvalidVectorError, StoreError

log = structlog.get_logger(__name__)

CLAIM_LIMIT = 20
_SPREAD = SystemRandom().random
MAY_MEND = (StoreError, EmbeddingError, OSError)
CANNOT_MEND = (
    DocumentGoneError,  # by a store's record, while the ledger still wants it
    InvalidVectorError,
    KeptDamagedError,
    UploadMissingError,
)


class PayloadMissingError(StoreError):
    """No store that is done holds the document that another one is owed."""


@dataclass(slots=True)
class Settled:
    """What one run of settling did. `failed` maps (document, store) to the reason."""

    done: int = 0
    ready: int = 0
    failed: dict[tuple[int, Store], str] = field(default_factory=dict)
    aside: list[tuple[int, Store]] = field(default_factory=list)


class Settler:
    """Settles what is owed. `prepare` makes chunks of an upload that no store has, and `forget` removes what it
    kept; `give_up` fails one that cannot be read; `finished` is told of each document that both stores have done."""

    def __init__(
        self,
        stores: Stores,
        *,
        load: Callable[[int], Document],
        prepare: Callable[[Document], list[Chunk]],
        forget: Callable[[Document], None],
        give_up: Callable[[Document, str], object],
        finished: Callable[[Document], None],
        jitter: Callable[[], float] = _SPREAD,
    ) -> None:
        self.stores = stores
        self.load = load
        self.prepare = prepare
        self.forget = forget
        self.give_up = give_up
        self.finished = finished
        self.jitter = jitter

    def run(
        self,
        *,
        stores: Sequence[Store] | None = None,
        at_once: bool = False,
        limit: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Settled:
        """Settle until nothing claimable is left, `limit` entries were tried, or `stop` says so between two."""
        report, tried = Settled(), list[Entry]()
        while limit is None or len(tried) < limit:
            entries = self._claim(stores, at_once, tried)
            if not entries:
                break
            for entry in entries:
                if stop():
                    return report
                self._settle(entry, report)
            tried += entries
        self._finish_ready(report)
        return report

    def _claim(self, stores: Sequence[Store] | None, at_once: bool, tried: list[Entry]) -> list[Entry]:
        with self._connection("settle.claim") as connection:
            return ledger.claim(
                connection,
                limit=CLAIM_LIMIT,
                stores=stores,
                at_once=at_once,
                tried=tried if at_once else (),
            )

    def _settle(self, entry: Entry, report: Settled) -> None:
        try:
            self._apply(entry)
        except DocumentNotFoundError:
            self._withdraw(entry)
        except (DocumentUnreadableError, EmbeddingRefusedError) as error:
            self.give_up(self.load(entry.document_id), str(error))
        except Exception as error:  # noqa: BLE001 - the boundary: one entry must not hold up the others
            self._postpone(entry, error, report)
        else:
            report.done += 1

    def _apply(self, entry: Entry) -> None:
        match entry.wanted:
            case Wanted.PRESENT:
                self._present(entry)
            case Wanted.ABSENT:
                self.stores.absent(entry.store, entry.user_id, entry.document_id)
        self.after(entry.document_id)

    def _present(self, entry: Entry) -> None:
        """Write what the other store has; else the result kept beside the upload, or made of it now."""
        with self._connection("settle.look") as connection:
            other = ledger.states(connection, entry.document_id).get(entry.store.other)
        if other is State.DONE:
            self.stores.present(entry.store, entry.user_id, entry.document_id, self._copy(entry))
            return
        document = self.load(entry.document_id)
        chunks = self.prepare(document)
        try:
            self.stores.present(entry.store, entry.user_id, entry.document_id, chunks)
        except DocumentGoneError:
            # Its deletion may have looked for the kept result before it was there.
            self.forget(document)
            raise

    def _copy(self, entry: Entry) -> list[Chunk]:
        with faults.point("settle.copy"):
            chunks = self.stores.copy_of(entry.store.other, entry.user_id, entry.document_id)
        if not chunks:
            raise PayloadMissingError(
                f"document {entry.document_id}: {entry.store.other} is done in the ledger but holds no chunk of it;"
                " run `rollout verify`, and bring back the file or directory it was in"
            )
        return chunks

    def after(self, document_id: int) -> None:
        """Once both stores are done, what was kept for them can go."""
        with self._connection("settle.after") as connection:
            states = ledger.states(connection, document_id)
        if set(states.values()) != {State.DONE}:
            return
        # A row that went with its user has left nothing to tidy: its path went with it.
        with suppress(DocumentNotFoundError):
            self.finished(self.load(document_id))

    def _postpone(self, entry: Entry, error: Exception, report: Settled) -> None:
        """Record the failure, unless the entry was withdrawn or done by others while this one tried."""
        mends = isinstance(error, MAY_MEND) and not isinstance(error, CANNOT_MEND)
        reason = str(error) or repr(error)
        with self._connection("settle.postpone") as connection:
            state = ledger.postpone(connection, entry, reason, mends=mends, jitter=self.jitter())
        about = {"document_id": entry.document_id, "store": entry.store, "attempts": entry.attempts, "error": reason}
        match state:
            case None:
                log.info("settle.apply.gone", **about)
                return
            case State.ASIDE:
                report.aside.append((entry.document_id, entry.store))
                log.error("settle.apply.aside", **about, exc_info=error)
            case State.OWED | State.DONE:
                log.warning("settle.apply.failed", **about)
        report.failed[entry.document_id, entry.store] = reason

    def _withdraw(self, entry: Entry) -> None:
        """The document's row went with its user: nobody can find it any more, so no store is to hold it."""
        with self._connection("settle.withdraw") as connection:
            ledger.withdraw(connection, entry.document_id, entry.user_id)
        log.info("settle.apply.withdrawn", document_id=entry.document_id, store=entry.store)

    def _finish_ready(self, report: Settled) -> None:
        with self._connection("settle.stage") as connection:
            view = latest(connection)
        with self._connection("settle.ready") as connection:
            report.ready = len(ledger.finish_ready(connection, view.transition_id, view.stage))

    @contextmanager
    def _connection(self, point: str) -> Iterator[Connection]:
        """For one statement, each its own transaction."""
        with unavailable("settle"), faults.point(point), self.stores.pgvector.pool.connection() as connection:
            yield connection
