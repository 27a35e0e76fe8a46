"""What the stores say about two answers that differ: whose a chunk is, how near it truly is, what was owed.

Asked after the answer is out, and under the time limit of a shadow read. Changes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, LiteralString

from structlog.contextvars import get_contextvars

from src.tools.rag_tools.migration.causes import SIMILARITY_TOLERANCE, Cause, Evidence, classify
from src.tools.rag_tools.migration.comparison import Comparison
from src.tools.rag_tools.migration.flags import View
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.migration.stores import Stores
from src.tools.rag_tools.pgvector_store import SCOPE, unavailable
from src.tools.rag_tools.store import Hit, Vector

# Nobody asks what was owed where it decides nothing; most answers agree.
WHATEVER_IS_OWED = (Cause.MATCH, Cause.TIE, Cause.OWNER_MISMATCH)
# A margin of a second for the time that a commit needs to be seen; it can only make a diff `stale`.
OWED_MEANWHILE = """
SELECT EXISTS (
    SELECT 1 FROM vector_ledger
    WHERE user_id = %(user_id)s
      AND (state <> 'done' OR changed_at >= clock_timestamp() - make_interval(secs => %(seconds)s + 1))
)
"""
# By primary key, so whatever an index makes of the search: where the chunk stands in an exact answer.
EXACT = """
SELECT id, -(embedding <#> %(vector)b) FROM document_chunks
WHERE user_id = %(user_id)s AND id = ANY (%(chunks)s)
"""
CHUNK_OWNER = "SELECT chunk_owner(%s)"


def current_request() -> str:
    """The id of the HTTP request that is being answered, under which the log has it; else a new one."""
    return str(get_contextvars().get("request_id") or uuid.uuid4().hex)


@dataclass(frozen=True, slots=True)
class Read:
    """One answered read. `begun` and `ended` are seconds of the monotonic clock."""

    view: View
    user_id: int
    vector: Vector
    k: int
    served_by: Store
    hits: Sequence[Hit]
    begun: float
    ended: float
    request_id: str = field(default_factory=current_request)


class Witness:
    """Asks both stores of one process."""

    def __init__(self, stores: Stores, *, limit_ms: int, clock: Callable[[], float]) -> None:
        self.stores = stores
        self.limit_ms = limit_ms
        self.clock = clock

    def evidence(self, read: Read, hits: Sequence[Hit], comparison: Comparison) -> Evidence:
        """What `classify` needs of the served answer `read` and of `hits`, the other store's. Raises StoreError."""
        served, other = read.served_by, read.served_by.other
        # A tie at the cut is forgiven, but not before it is known that nobody else owns the chunk.
        alone = {
            served: [hit for hit in hits if hit.chunk_id in comparison.only_in_second],
            other: [hit for hit in read.hits if hit.chunk_id in comparison.only_in_first],
        }
        exact = {store: self._exact(store, read, shown) for store, shown in alone.items()}
        theirs = {hit.chunk_id: hit for hit in hits}
        both = [(hit, theirs[hit.chunk_id]) for hit in read.hits if hit.chunk_id in theirs]
        found = Evidence(
            user_id=read.user_id,
            comparison=comparison,
            owed_meanwhile=False,
            missing={served: comparison.missing_in_first, other: comparison.missing_in_second},
            holders={store: self._holders(store, read, shown, exact[store]) for store, shown in alone.items()},
            content_differs=tuple(one.chunk_id for one, another in both if one.content != another.content),
            vector_differs=_drifted(both) + _moved(alone, exact),
        )
        if classify(found) in WHATEVER_IS_OWED:
            return found
        # Asked last: what has changed by then counts.
        return replace(found, owed_meanwhile=self._owed_meanwhile(read))

    def ask(self, statement: LiteralString, parameters: Any, user_id: int | None = None) -> list[tuple[Any, ...]]:
        """One round trip that does not wait for a lock for longer than a shadow read may. Raises StoreError."""
        with unavailable("search"), self.stores.pgvector.pool.connection() as connection:
            with connection.pipeline():
                connection.execute(SCOPE, ("" if user_id is None else str(user_id), str(self.limit_ms)))
                cursor = connection.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def _exact(self, store: Store, read: Read, shown: Sequence[Hit]) -> dict[uuid.UUID, float]:
        """How near to the question `store` has these chunks, those of them that it gives to the user."""
        chunks = [hit.chunk_id for hit in shown]
        match store:
            case _ if not chunks:
                return {}
            case Store.FAISS:
                documents = {hit.document_id for hit in shown}
                held = {chunk.id: chunk for each in documents for chunk in self.stores.faiss.document(each)}
                mine = [each for each in chunks if each in held and self._holder(store, each) == read.user_id]
                return {each: float(held[each].vector @ read.vector) for each in mine}
            case Store.PGVECTOR:
                parameters = {"user_id": read.user_id, "vector": read.vector, "chunks": chunks}
                return dict(self.ask(EXACT, parameters, read.user_id))

    def _holders(
        self, store: Store, read: Read, shown: Sequence[Hit], exact: Mapping[uuid.UUID, float]
    ) -> dict[uuid.UUID, int | None]:
        return {
            hit.chunk_id: read.user_id if hit.chunk_id in exact else self._holder(store, hit.chunk_id) for hit in shown
        }

    def _holder(self, store: Store, chunk: uuid.UUID) -> int | None:
        match store:
            case Store.FAISS:
                return self.stores.faiss.owner_of(chunk)
            case Store.PGVECTOR:
                ((owner,),) = self.ask(CHUNK_OWNER, (chunk,))
                return None if owner is None else int(owner)

    def _owed_meanwhile(self, read: Read) -> bool:
        parameters = {"user_id": read.user_id, "seconds": self.clock() - read.begun}
        ((owed,),) = self.ask(OWED_MEANWHILE, parameters)
        return bool(owed)


def _drifted(both: Sequence[tuple[Hit, Hit]]) -> tuple[uuid.UUID, ...]:
    return tuple(one.chunk_id for one, another in both if _differ(one.similarity, another.similarity))


def _moved(
    alone: Mapping[Store, Sequence[Hit]], exact: Mapping[Store, Mapping[uuid.UUID, float]]
) -> tuple[uuid.UUID, ...]:
    """Chunks that one answer shows alone because the other store has them elsewhere."""
    return tuple(
        hit.chunk_id
        for store, shown in alone.items()
        for hit in shown
        if hit.chunk_id in exact[store] and _differ(hit.similarity, exact[store][hit.chunk_id])
    )


def _differ(one: float, another: float) -> bool:
    return abs(one - another) > SIMILARITY_TOLERANCE
