"""Why did the stores differ in this one comparison? Both lists, the cause, the proof as it is now, what mends it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from psycopg.rows import dict_row

from rollout.control import Control
from rollout.errors import UsageError
from src.tools.rag_tools.migration.causes import Cause
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.store import Chunk, vector_hash

DIFF = "SELECT id, at, cause, user_id, event FROM shadow_diffs WHERE id = %s"
HELD = """
SELECT user_id, document_id FROM document_chunks WHERE user_id = ANY (%(users)s) AND id = %(chunk)s
"""
OWNER = "SELECT chunk_owner(%s)"
LEDGER = """
SELECT store, wanted, state, attempts, last_error, changed_at FROM vector_ledger WHERE document_id = %s ORDER BY store
"""

MENDS: dict[Cause, str] = {
    Cause.MATCH: "nothing: the answers are the same",
    Cause.TIE: "nothing: the chunks that differ are equally near, within rounding",
    Cause.REORDER: "`rollout verify`: the same chunks in another order point at vectors that differ",
    Cause.MISSING_IN_PGVECTOR: "`rollout verify --repair --execute`, then `rollout settle --execute`",
    Cause.MISSING_IN_FAISS: "`rollout settle --store faiss --execute`, then `rollout verify`",
    Cause.STALE: "`rollout settle --execute`: entries of this user were owed at the time",
    Cause.APPROXIMATE: "drop the approximate index on document_chunks: an exact scan finds the chunk",
    Cause.CONTENT_DRIFT: "`rollout verify --repair --execute`, then `rollout settle --execute`",
    Cause.VECTOR_DRIFT: "`rollout verify --repair --execute`, then `rollout settle --execute`",
    Cause.OWNER_MISMATCH: (
        "`rollout rollback --execute` now, then `rollout verify`: RUNBOOK.md, 'a user sees another's document'"
    ),
    Cause.ERROR: "the log's `shadow.read.failed` of this time; is the store that was asked up?",
    Cause.TIMEOUT: "RUNBOOK.md, 'pgvector is slow'",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A chunk in one of the two answers, and where it is now. Ranks count from 1; None: not in that answer."""

    chunk_id: str
    served_rank: int | None
    served_similarity: float | None
    shadow_rank: int | None
    shadow_similarity: float | None
    faiss_owner: int | None
    pgvector_owner: int | None
    document_id: int | None


def explain(control: Control, diff_id: int) -> dict[str, Any]:
    """Everything that is known of the diff. UsageError where there is none of that id."""
    with control.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        diff = cursor.execute(DIFF, (diff_id,)).fetchone()
    if diff is None:
        raise UsageError(f"there is no diff {diff_id}; `rollout diffs` lists the newest (they are kept for 30 days)")
    event, cause = diff["event"], Cause(diff["cause"])
    places = _places(control, diff["user_id"], event)
    documents = sorted({place.document_id for place in places if place.document_id is not None})
    return {
        "id": diff["id"],
        "at": diff["at"],
        "cause": cause.value,
        "served_by": event["served_by"],
        "shadow": Store(event["served_by"]).other.value,
        "user_id": diff["user_id"],
        "numbers": {
            name: event[name] for name in ("overlap_at_k", "rbo", "top1_match", "largest_similarity_difference")
        },
        "chunks": [asdict(place) for place in places],
        "ledger": {document: _ledger(control, document) for document in documents},
        "proof": [*_drift(control, diff["user_id"], places), *proof(cause, diff["user_id"], places)],
        "mend": MENDS[cause],
    }


def proof(cause: Cause, user_id: int, places: list[Place]) -> list[str]:
    """What the stores say now of the chunks that only one answer has."""
    alone = [place for place in places if place.served_rank is None or place.shadow_rank is None]
    found = []
    for place in alone:
        for store, owner in (("faiss", place.faiss_owner), ("pgvector", place.pgvector_owner)):
            if owner is None:
                found.append(f"{place.chunk_id}: {store} holds no such chunk now")
            elif owner != user_id:
                found.append(f"{place.chunk_id}: {store} gives it to user {owner}, the question was user {user_id}'s")
    if not found and alone:
        return ["both stores hold every chunk for this user now: it was settled since, or the scan was not exact"]
    return found or ["both answers name the same chunks"] if cause is not Cause.ERROR else ["the store did not answer"]


def _drift(control: Control, user_id: int, places: list[Place]) -> list[str]:
    """The chunks of both answers that the stores hold differently now."""
    both = {place.chunk_id: place.document_id for place in places if place.served_rank and place.shadow_rank}
    found = []
    for document in sorted({each for each in both.values() if each is not None}):
        new = {str(chunk.id): chunk for chunk in control.router.pgvector.document(user_id, document)}
        for old in control.faiss.document(document):
            if str(old.id) in both and (held := new.get(str(old.id))) is not None:
                found += [f"{old.id}: {how}" for how in _differences(old, held)]
    return found


def _differences(old: Chunk, new: Chunk) -> list[str]:
    found = []
    if old.content_sha256 != new.content_sha256:
        found.append("its text in faiss is not its text in pgvector")
    if vector_hash(old.vector) != vector_hash(new.vector):
        found.append(f"its vectors differ, their cosine is {float(old.vector @ new.vector):.6f}")
    return found


def _places(control: Control, user_id: int, event: dict[str, Any]) -> list[Place]:
    served, shadow = _ranked(event["served"]), _ranked(event["shadow"])
    places = []
    for chunk in [*served, *(each for each in shadow if each not in served)]:
        owner, document_id = _in_pgvector(control, user_id, chunk)
        served_rank, served_similarity = served.get(chunk, (None, None))
        shadow_rank, shadow_similarity = shadow.get(chunk, (None, None))
        places.append(
            Place(
                chunk_id=chunk,
                served_rank=served_rank,
                served_similarity=served_similarity,
                shadow_rank=shadow_rank,
                shadow_similarity=shadow_similarity,
                faiss_owner=control.faiss.owner_of(UUID(chunk)),
                pgvector_owner=owner,
                document_id=document_id,
            )
        )
    return places


def _ranked(hits: list[list[Any]]) -> dict[str, tuple[int | None, float | None]]:
    return {str(chunk): (rank, float(similarity)) for rank, (chunk, similarity) in enumerate(hits, 1)}


def _in_pgvector(control: Control, user_id: int, chunk: str) -> tuple[int | None, int | None]:
    with control.connection() as connection:
        row = connection.execute(OWNER, (chunk,)).fetchone()
        users = [user_id] if row is None or row[0] is None else [user_id, row[0]]
        held = connection.execute(HELD, {"users": users, "chunk": chunk}).fetchone()
    return (None, None) if held is None else (int(held[0]), int(held[1]))


def _ledger(control: Control, document_id: int) -> list[dict[str, Any]]:
    with control.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(LEDGER, (document_id,)).fetchall()
