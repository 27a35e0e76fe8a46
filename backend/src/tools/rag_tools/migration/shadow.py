"""Shadow reads: the other store is asked the same question after the answer is out, and the two compared.

The queue is bounded; what does not fit is dropped and counted. Nothing here can change an answer. A process
that dies loses the comparisons still queued and nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import queue
import random
import secrets
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import psycopg.errors
import structlog
from psycopg.types.json import Jsonb

from src.config import settings as backend_settings
from src.tools.rag_tools import chunking
from src.tools.rag_tools.migration import metrics
from src.tools.rag_tools.migration.causes import Cause, classify
from src.tools.rag_tools.migration.comparison import Comparison, compare
from src.tools.rag_tools.migration.evidence import Read, Witness
from src.tools.rag_tools.migration.flags import View
from src.tools.rag_tools.migration.settings import MigrationSettings
from src.tools.rag_tools.migration.stores import Stores
from src.tools.rag_tools.pgvector_store import SEARCH, SEARCH_GIANT, PgvectorStore
from src.tools.rag_tools.store import Hit, StoreError

log = structlog.get_logger(__name__)

EVENT_VERSION = 1
DROPS_SECONDS = 10.0
"""No two lines of the log about drops are nearer than this."""
COHORTS = ((100, "small"), (10_000, "medium"))
LARGEST_COHORT = "large"

RECORD = """
INSERT INTO shadow_diffs (transition_id, stage, user_id, cohort, cause, served_by, overlap_at_k,
                          served_ms, shadow_ms, fingerprint, event)
VALUES (%(transition_id)s, %(stage)s, %(user_id)s, %(cohort)s, %(cause)s, %(served_by)s, %(overlap_at_k)s,
        %(served_ms)s, %(shadow_ms)s, %(fingerprint)s, %(event)s)
"""


def cohort(own_chunks: int) -> str:
    """small below 100 chunks of one's own, medium below 10,000, large from there."""
    return next((name for limit, name in COHORTS if own_chunks < limit), LARGEST_COHORT)


def fingerprint(k: int) -> str:
    """What must not change within one body of evidence: model, k, chunker, retrieval SQL. 16 hex digits."""
    parts = (
        backend_settings.EMBEDDING_PROVIDER, backend_settings.EMBEDDING_MODEL, k,
        chunking.CHUNK_SIZE, chunking.CHUNK_OVERLAP, SEARCH, SEARCH_GIANT,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Shadow:
    """Bounded queue and workers; `drops` counts what did not fit or left no evidence, `causes` the comparisons."""

    def __init__(
        self,
        stores: Stores,
        settings: MigrationSettings,
        *,
        count: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.count = count
        self.clock = clock
        limit = int(settings.SHADOW_TIMEOUT_SECONDS * 1000)
        pgvector = stores.pgvector
        own = PgvectorStore(pgvector.pool, read_timeout_ms=limit, giants=pgvector.giants)
        self.stores = Stores(stores.faiss, own)
        self.witness = Witness(self.stores, limit_ms=limit, clock=clock)
        self.drops = 0
        self._told_of_drops = -DROPS_SECONDS
        self.causes: Counter[Cause] = Counter()
        self._queue: queue.Queue[Read | None] = queue.Queue(settings.SHADOW_QUEUE)
        self._threads: list[threading.Thread] = []
        key = settings.SHADOW_HMAC_KEY
        self._key = key.get_secret_value().encode() if key else secrets.token_bytes(32)

    def start(self) -> None:
        for number in range(self.settings.SHADOW_WORKERS):
            thread = threading.Thread(target=self._work, name=f"shadow-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def samples(self, view: View) -> bool:
        """Whether this read is to be compared: decided by chance, before anything is made for it."""
        return random.random() < view.sample_rate  # noqa: S311 - sampling, not a secret

    def offer(self, read: Read) -> None:
        """Queue a comparison if there is room; returns at once."""
        try:
            self._queue.put_nowait(read)
        except queue.Full:
            self._drop()
            self._tell_of_drops()

    def close(self) -> None:
        """Finish what is queued."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (read := self._queue.get()) is not None:
            try:
                self.compare(read)
            except Exception as error:
                # No evidence came of it, so it counts against the evidence.
                self._drop()
                log.exception("shadow.compare.failed", error=str(error))

    def _drop(self) -> None:
        self.drops += 1
        self.count("shadow.dropped")
        metrics.DROPPED.inc()

    def _tell_of_drops(self) -> None:
        """Once in a while: the caller waits for the line, and where one is dropped, thousands are."""
        now = self.clock()
        if now >= self._told_of_drops + DROPS_SECONDS:
            self._told_of_drops = now
            log.warning("shadow.read.dropped", drops=self.drops)

    def compare(self, read: Read) -> Cause:
        """Ask the other store, decide the cause, write event and row."""
        begun = self.clock()
        other = read.served_by.other
        hits: list[Hit] = []
        comparison: Comparison | None = None
        try:
            hits = self.stores.search((other,), read.user_id, read.vector, read.k, read.view.hidden)
            ended = self.clock()
            comparison = compare(_ranking(read.hits), _ranking(hits), read.k)
            cause = classify(self.witness.evidence(read, hits, comparison))
            if ended - begun > self.settings.SHADOW_TIMEOUT_SECONDS and cause is not Cause.OWNER_MISMATCH:
                cause = Cause.TIMEOUT
        except StoreError as error:
            ended = self.clock()
            timed_out = isinstance(error.__cause__, psycopg.errors.QueryCanceled)
            cause = Cause.TIMEOUT if timed_out else Cause.ERROR
            log.warning("shadow.read.failed", store=other, error=str(error))
        self._record(self._event(read, hits, comparison, cause, (ended - begun) * 1000))
        self.causes[cause] += 1
        metrics.COMPARISONS.labels(cause.value).inc()
        return cause

    def _event(
        self,
        read: Read,
        hits: Sequence[Hit],
        comparison: Comparison | None,
        cause: Cause,
        shadow_ms: float,
    ) -> dict[str, Any]:
        return {
            "version": EVENT_VERSION,
            "request_id": read.request_id,
            "user_id": read.user_id,
            "cohort": self._cohort(read.user_id),
            "stage": read.view.stage.value,
            "transition_id": read.view.transition_id,
            "served_by": read.served_by.value,
            "k": read.k,
            "query_hmac": hmac.new(self._key, read.vector.tobytes(), hashlib.sha256).hexdigest()[:32],
            "served": [[str(hit.chunk_id), round(hit.similarity, 6)] for hit in read.hits],
            "shadow": [[str(hit.chunk_id), round(hit.similarity, 6)] for hit in hits],
            "overlap_at_k": comparison.overlap_at_k if comparison else None,
            "rbo": comparison.rbo if comparison else None,
            "top1_match": comparison.top1_match if comparison else None,
            "largest_similarity_difference": comparison.largest_similarity_difference if comparison else None,
            "served_ms": round((read.ended - read.begun) * 1000, 3),
            "shadow_ms": round(shadow_ms, 3),
            "cause": cause.value,
            "fingerprint": fingerprint(read.k),
        }

    def _record(self, event: dict[str, Any]) -> None:
        log.info("rag.shadow_diff", **event)
        self.witness.ask(RECORD, {**event, "event": Jsonb(event)})

    def _cohort(self, user_id: int) -> str:
        try:
            return cohort(self.stores.faiss.count(user_id))
        except StoreError:
            return cohort(0)  # that FAISS cannot be read is the news, and must be recorded


def _ranking(hits: Sequence[Hit]) -> list[tuple[uuid.UUID, float]]:
    return [(hit.chunk_id, hit.similarity) for hit in hits]
