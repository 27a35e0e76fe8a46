"""Which cause the evidence shows, as a table; the gravest one wins."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from src.tools.rag_tools.migration.causes import EXPLAINED, Cause, Evidence, classify
from src.tools.rag_tools.migration.comparison import compare
from src.tools.rag_tools.migration.stages import Store

pytestmark = pytest.mark.migration

OWNER, STRANGER = 1, 2
A, B, C, D = (uuid.UUID(int=number) for number in range(1, 5))
K = 3

Answer = list[tuple[uuid.UUID, float]]


@dataclass(frozen=True)
class Case:
    """Two answers, FAISS' first, and what else was found out. `holder`: whom the store that lacks a chunk
    gives it to."""

    faiss: Answer
    pgvector: Answer
    expected: Cause
    owed: bool = False
    holder: Mapping[uuid.UUID, int | None] = field(default_factory=dict)
    content_differs: tuple[uuid.UUID, ...] = ()
    vector_differs: tuple[uuid.UUID, ...] = ()


ABC = [(A, 0.9), (B, 0.8), (C, 0.7)]
ABD = [(A, 0.9), (B, 0.8), (D, 0.7)]
AB = ABC[:2]

TABLE = {
    "the same": Case(ABC, ABC, Cause.MATCH),
    "nothing on either side": Case([], [], Cause.MATCH),
    "the same, while an upload was under way": Case(ABC, ABC, Cause.MATCH, owed=True),
    "the same up to rounding": Case(ABC, [(chunk, value + 1e-6) for chunk, value in ABC], Cause.MATCH),
    "tied chunks in another order": Case([(A, 0.9), (B, 0.8), (C, 0.8)], [(A, 0.9), (C, 0.8), (B, 0.8)], Cause.TIE),
    "a tie at the cut": Case(ABC, ABD, Cause.TIE, holder={C: OWNER, D: OWNER}),
    "untied chunks in another order": Case(ABC, [ABC[1], ABC[0], ABC[2]], Cause.REORDER),
    "a chunk that pgvector has not": Case(ABC, AB, Cause.MISSING_IN_PGVECTOR, holder={C: None}),
    "a chunk that FAISS has not": Case(AB, ABC, Cause.MISSING_IN_FAISS, holder={C: None}),
    "a chunk that pgvector has not, and it was owed": Case(AB, ABC, Cause.STALE, owed=True, holder={C: None}),
    "a chunk that an exact scan would find": Case(ABC, AB, Cause.APPROXIMATE, holder={C: OWNER}),
    "another text under one id": Case(ABC, ABC, Cause.CONTENT_DRIFT, content_differs=(B,)),
    "another text, while an upload was under way": Case(ABC, ABC, Cause.STALE, owed=True, content_differs=(B,)),
    "another vector under one id": Case(ABC, [(A, 0.9), (B, 0.75), (C, 0.7)], Cause.VECTOR_DRIFT, vector_differs=(B,)),
    "similarities too far apart": Case(ABC, [(A, 0.95), (B, 0.8), (C, 0.7)], Cause.VECTOR_DRIFT),
    "text and vector differ": Case(ABC, ABC, Cause.CONTENT_DRIFT, content_differs=(B,), vector_differs=(B,)),
    "a tie at the cut with a chunk that pgvector has not": Case(
        ABC, ABD, Cause.MISSING_IN_PGVECTOR, holder={C: None, D: OWNER}
    ),
    "a tie at the cut with one that it has not yet": Case(ABC, ABD, Cause.STALE, owed=True, holder={C: None, D: OWNER}),
    "a chunk that pgvector has elsewhere": Case(ABC, AB, Cause.VECTOR_DRIFT, holder={C: OWNER}, vector_differs=(C,)),
    "another user's chunk": Case(ABC, ABD, Cause.OWNER_MISMATCH, holder={D: STRANGER, C: OWNER}),
    "another user's chunk in a tie": Case(ABC, ABD, Cause.OWNER_MISMATCH, holder={D: STRANGER}),
    "another user's chunk, while an upload was under way": Case(
        ABC, ABD, Cause.OWNER_MISMATCH, owed=True, holder={C: STRANGER}
    ),
    "another user's chunk in place of one that is lacking": Case(
        AB, [(D, 0.99), (A, 0.9), (B, 0.8)], Cause.OWNER_MISMATCH, holder={D: STRANGER}
    ),
    "lacking and of another text": Case(ABC, AB, Cause.MISSING_IN_PGVECTOR, holder={C: None}, content_differs=(A,)),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_cause_follows_from_the_evidence(name: str) -> None:
    case = TABLE[name]
    assert classify(evidence(case)) is case.expected


def test_who_may_explain_a_difference_away_is_agreed() -> None:
    assert {cause.value for cause in EXPLAINED} == {"match", "tie", "stale"}


def test_a_leak_is_never_explained_away_by_what_was_owed() -> None:
    leaks = [case for case in TABLE.values() if STRANGER in case.holder.values()]
    assert leaks
    for case in leaks:
        for owed in (False, True):
            assert classify(evidence(case, owed=owed)) not in EXPLAINED


def evidence(case: Case, *, owed: bool | None = None) -> Evidence:
    comparison = compare(case.faiss, case.pgvector, K)
    lacks = {Store.FAISS: comparison.only_in_second, Store.PGVECTOR: comparison.only_in_first}
    return Evidence(
        user_id=OWNER,
        comparison=comparison,
        owed_meanwhile=case.owed if owed is None else owed,
        missing={Store.FAISS: comparison.missing_in_first, Store.PGVECTOR: comparison.missing_in_second},
        holders={
            store: {chunk: case.holder[chunk] for chunk in chunks if chunk in case.holder}
            for store, chunks in lacks.items()
        },
        content_differs=case.content_differs,
        vector_differs=case.vector_differs,
    )
