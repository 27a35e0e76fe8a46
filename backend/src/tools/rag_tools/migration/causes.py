"""Why two stores answered a query differently, by evidence; the decision is pure and takes data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID

from src.tools.rag_tools.migration.comparison import Comparison
from src.tools.rag_tools.migration.stages import Store

SIMILARITY_TOLERANCE = 1e-4


class Cause(StrEnum):
    MATCH = "match"
    TIE = "tie"
    REORDER = "reorder"
    MISSING_IN_PGVECTOR = "missing_in_pgvector"
    MISSING_IN_FAISS = "missing_in_faiss"
    STALE = "stale"
    APPROXIMATE = "approximate"
    CONTENT_DRIFT = "content_drift"
    VECTOR_DRIFT = "vector_drift"
    OWNER_MISMATCH = "owner_mismatch"
    ERROR = "error"
    TIMEOUT = "timeout"


EXPLAINED = frozenset({Cause.MATCH, Cause.TIE, Cause.STALE})


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the two answers and the stores say. `holders` names, for each store and each chunk that its
    answer lacks, the user whom that store gives the chunk to; None where it holds no such chunk.
    `vector_differs` are chunks that both hold for the user, at different distances from the question."""

    user_id: int
    comparison: Comparison
    owed_meanwhile: bool
    missing: Mapping[Store, tuple[UUID, ...]] = field(default_factory=dict)
    holders: Mapping[Store, Mapping[UUID, int | None]] = field(default_factory=dict)
    content_differs: tuple[UUID, ...] = ()
    vector_differs: tuple[UUID, ...] = ()


def classify(evidence: Evidence) -> Cause:
    """The gravest cause that the evidence shows: a leak first, then what was owed, then what is lacking."""
    comparison = evidence.comparison
    if _held_by_another(evidence):
        return Cause.OWNER_MISMATCH
    lacking = _lacking(evidence)
    if lacking is None and _agree(evidence):
        return Cause.MATCH if comparison.same_order else Cause.TIE
    if evidence.owed_meanwhile:
        return Cause.STALE
    if lacking is not None:
        return lacking
    if evidence.content_differs:
        return Cause.CONTENT_DRIFT
    if evidence.vector_differs or comparison.largest_similarity_difference > SIMILARITY_TOLERANCE:
        return Cause.VECTOR_DRIFT
    return Cause.APPROXIMATE if any(evidence.missing.values()) else Cause.REORDER


def _agree(evidence: Evidence) -> bool:
    comparison = evidence.comparison
    return (
        not evidence.content_differs
        and not evidence.vector_differs
        and comparison.overlap_at_k == 1.0
        and (comparison.same_order or comparison.order_differs_only_by_ties)
        and comparison.largest_similarity_difference <= SIMILARITY_TOLERANCE
    )


def _held_by_another(evidence: Evidence) -> bool:
    return any(
        holder is not None and holder != evidence.user_id
        for holders in evidence.holders.values()
        for holder in holders.values()
    )


def _lacking(evidence: Evidence) -> Cause | None:
    for store, cause in (
        (Store.PGVECTOR, Cause.MISSING_IN_PGVECTOR),
        (Store.FAISS, Cause.MISSING_IN_FAISS),
    ):
        if any(holder is None for holder in evidence.holders.get(store, {}).values()):
            return cause
    return None
