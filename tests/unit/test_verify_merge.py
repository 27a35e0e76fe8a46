"""What verify makes of two streams and of one document's two copies, on data alone."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.repair import Act, act_on
from rollout.verify_judge import Look, judge
from rollout.verify_merge import (
    Entries,
    Kind,
    LedgerEntry,
    PgvectorRow,
    Survey,
    compared,
    merge,
)
from rollout.verify_report import DocumentDifference, by_document
from src.tools.rag_tools.migration.ledger import State, Wanted
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.store import InventoryRow

pytestmark = pytest.mark.migration

ADA, BEN = 1, 2
DOCUMENT, OTHER_DOCUMENT = 10, 20
CONTENT, VECTOR, DRIFTED = b"c" * 32, b"v" * 32, b"d" * 32


def chunk(number: int) -> uuid.UUID:
    return uuid.UUID(int=number)


def in_faiss(number: int, document_id: int = DOCUMENT) -> InventoryRow:
    return InventoryRow(chunk(number), document_id, CONTENT, VECTOR)


def in_pgvector(
    number: int,
    document_id: int = DOCUMENT,
    *,
    user_id: int = ADA,
    content: bytes = CONTENT,
    vector: bytes = VECTOR,
    stored: bytes = CONTENT,
) -> PgvectorRow:
    return PgvectorRow(user_id, chunk(number), document_id, content, vector, stored)


def entries(faiss: State = State.DONE, pgvector: State = State.DONE, wanted: Wanted = Wanted.PRESENT) -> Entries:
    return {
        Store.FAISS: LedgerEntry(ADA, wanted, faiss),
        Store.PGVECTOR: LedgerEntry(ADA, wanted, pgvector),
    }


def surveyed(faiss: list[InventoryRow], pgvector: list[PgvectorRow]) -> Survey:
    survey = Survey()
    for pair in merge(faiss, pgvector):
        survey.add(pair)
    return survey


def look(
    faiss: list[InventoryRow],
    pgvector: list[PgvectorRow],
    ledger: Entries | None = None,
    *,
    faiss_user: int = ADA,
    given_by_faiss: Mapping[uuid.UUID, int | None] | None = None,
    elsewhere: frozenset[uuid.UUID] = frozenset(),
) -> Look:
    return Look(
        DOCUMENT,
        entries() if ledger is None else ledger,
        {row.chunk_id: row for row in faiss},
        faiss_user if faiss else None,
        pgvector,
        given_by_faiss or {},
        elsewhere,
    )


def kinds(made: Look) -> list[tuple[Kind, int]]:
    return [(each.kind, each.user_id) for each in judge(made).differences]


# -- merging


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_every_chunk_of_either_store_comes_out_once_beside_its_like(mine: set[int], theirs: set[int]) -> None:
    pairs = list(merge(map(in_faiss, sorted(mine)), (in_pgvector(number) for number in sorted(theirs))))
    assert {a.chunk_id.int for a, b in pairs if a and b} == mine & theirs
    assert {a.chunk_id.int for a, b in pairs if a and not b} == mine - theirs
    assert {b.chunk_id.int for a, b in pairs if b and not a} == theirs - mine
    assert len(pairs) == len(mine | theirs)


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_a_chunk_id_held_twice_by_a_store_is_not_taken_for_agreement(mine: list[int], theirs: list[int]) -> None:
    pairs = list(merge(map(in_faiss, sorted(mine)), (in_pgvector(number) for number in sorted(theirs))))
    both = sum(1 for a, b in pairs if a and b)
    assert both == sum(min(mine.count(number), theirs.count(number)) for number in range(10))
    assert len(pairs) == len(mine) + len(theirs) - both


def test_merging_reads_no_further_than_it_has_to() -> None:
    read: list[int] = []

    def noted(number: int) -> InventoryRow:
        read.append(number)
        return in_faiss(number)

    pairs = merge(map(noted, range(1000)), (in_pgvector(number) for number in range(1000)))
    for _ in range(10):
        next(pairs)
    assert len(read) == 10


# -- comparing


def test_equal_copies_do_not_differ() -> None:
    assert compared(in_faiss(1), in_pgvector(1)) is None


@pytest.mark.parametrize(
    ("theirs", "kind"),
    [
        (in_pgvector(1, OTHER_DOCUMENT, content=DRIFTED), Kind.DOCUMENT_MISMATCH),
        (in_pgvector(1, content=DRIFTED, stored=DRIFTED, vector=DRIFTED), Kind.CONTENT_DRIFT),
        (in_pgvector(1, content=DRIFTED), Kind.CONTENT_DRIFT),
        (in_pgvector(1, stored=DRIFTED), Kind.CONTENT_DRIFT),
        (in_pgvector(1, vector=DRIFTED), Kind.VECTOR_DRIFT),
    ],
)
def test_a_copy_that_differs_is_named_by_the_gravest_difference(theirs: PgvectorRow, kind: Kind) -> None:
    assert compared(in_faiss(1), theirs) is kind


# -- the first look


def test_a_document_that_both_stores_hold_alike_is_not_looked_at_again() -> None:
    survey = surveyed([in_faiss(1), in_faiss(2)], [in_pgvector(1), in_pgvector(2)])
    ledger = {DOCUMENT: entries()}
    assert survey.suspects(ledger) == set()
    assert survey.owed(ledger) == set()
    assert survey.chunks == 2
    assert survey.documents == {DOCUMENT}


def test_a_document_that_pgvector_is_owed_is_owed_and_not_suspect() -> None:
    survey = surveyed([in_faiss(1), in_faiss(2)], [in_pgvector(1)])
    ledger = {DOCUMENT: entries(pgvector=State.OWED)}
    assert survey.suspects(ledger) == set()
    assert survey.owed(ledger) == {DOCUMENT}


@pytest.mark.parametrize("state", [State.OWED, State.ASIDE])
def test_a_deletion_under_way_is_owed_and_not_suspect(state: State) -> None:
    survey = surveyed([in_faiss(1)], [])
    ledger = {DOCUMENT: entries(faiss=state, wanted=Wanted.ABSENT)}
    assert survey.suspects(ledger) == set()
    assert survey.owed(ledger) == {DOCUMENT}


def test_a_chunk_that_a_store_should_have_makes_its_document_suspect() -> None:
    ledger = {DOCUMENT: entries()}
    assert surveyed([in_faiss(1), in_faiss(2)], [in_pgvector(1)]).suspects(ledger) == {DOCUMENT}
    assert surveyed([in_faiss(1)], [in_pgvector(1), in_pgvector(2)]).suspects(ledger) == {DOCUMENT}


def test_a_document_done_in_the_ledger_and_held_by_nobody_is_suspect() -> None:
    assert surveyed([], []).suspects({DOCUMENT: entries()}) == {DOCUMENT}


def test_a_document_deleted_in_the_ledger_and_held_by_both_alike_is_suspect() -> None:
    survey = surveyed([in_faiss(1)], [in_pgvector(1)])
    assert survey.suspects({DOCUMENT: entries(wanted=Wanted.ABSENT)}) == {DOCUMENT}


def test_a_document_that_the_ledger_gives_to_nobody_or_another_is_suspect() -> None:
    assert surveyed([in_faiss(1)], [in_pgvector(1)]).suspects({}) == {DOCUMENT}


def test_a_chunk_in_two_documents_makes_both_suspect_even_while_owed() -> None:
    survey = surveyed([in_faiss(1)], [in_pgvector(1, OTHER_DOCUMENT)])
    ledger = {
        DOCUMENT: entries(pgvector=State.OWED),
        OTHER_DOCUMENT: entries(pgvector=State.OWED),
    }
    assert survey.suspects(ledger) == {DOCUMENT, OTHER_DOCUMENT}


# -- the second look


def test_a_document_found_equal_at_the_second_look_is_no_difference() -> None:
    made = judge(look([in_faiss(1)], [in_pgvector(1)]))
    assert made.differences == []
    assert not made.owed


def test_what_pgvector_lacks_and_what_faiss_lacks_is_missing_there() -> None:
    made = look([in_faiss(1)], [in_pgvector(2)], given_by_faiss={chunk(2): None})
    assert kinds(made) == [(Kind.MISSING_IN_PGVECTOR, ADA), (Kind.MISSING_IN_FAISS, ADA)]


@pytest.mark.parametrize("state", [State.OWED, State.ASIDE])
def test_what_the_lacking_store_is_owed_is_no_difference(state: State) -> None:
    made = judge(look([in_faiss(1)], [], entries(pgvector=state)))
    assert made.differences == []
    assert made.owed


def test_being_owed_to_one_store_does_not_excuse_the_other() -> None:
    made = look([], [in_pgvector(1)], entries(pgvector=State.OWED), given_by_faiss={chunk(1): None})
    assert kinds(made) == [(Kind.MISSING_IN_FAISS, ADA)]


def test_a_document_held_by_nobody_is_missing_in_each_store_that_is_done() -> None:
    assert kinds(look([], [])) == [(Kind.MISSING_IN_FAISS, ADA), (Kind.MISSING_IN_PGVECTOR, ADA)]
    once = look([], [], entries(pgvector=State.OWED))
    assert kinds(once) == [(Kind.MISSING_IN_FAISS, ADA)]


def test_a_chunk_under_the_wrong_user_is_one_difference_and_not_two_missing() -> None:
    made = judge(look([in_faiss(1)], [in_pgvector(1, user_id=BEN)], elsewhere=frozenset([chunk(1)])))
    assert [(each.kind, each.user_id, each.belongs_to) for each in made.differences] == [
        (Kind.OWNER_MISMATCH, BEN, ADA)
    ]
    assert made.displaced


def test_a_copy_under_another_user_is_a_mismatch_though_the_right_one_is_there() -> None:
    made = look([in_faiss(1)], [in_pgvector(1), in_pgvector(1, user_id=BEN)])
    assert kinds(made) == [(Kind.OWNER_MISMATCH, BEN)]


def test_somebody_elses_chunk_among_ones_own_is_an_owner_mismatch() -> None:
    made = look([in_faiss(1)], [in_pgvector(1), in_pgvector(2)], given_by_faiss={chunk(2): BEN})
    assert [(each.kind, each.user_id, each.belongs_to) for each in judge(made).differences] == [
        (Kind.OWNER_MISMATCH, ADA, BEN)
    ]


def test_a_chunk_that_pgvector_has_in_another_document_is_counted_there() -> None:
    here = judge(look([in_faiss(1)], [], elsewhere=frozenset([chunk(1)])))
    assert here.differences == []
    assert here.displaced
    there = look([], [in_pgvector(1)], given_by_faiss={chunk(1): ADA})
    assert kinds(there) == [(Kind.DOCUMENT_MISMATCH, ADA)]


def test_both_stores_giving_a_document_to_somebody_else_than_the_ledger_is_a_mismatch() -> None:
    made = look([in_faiss(1)], [in_pgvector(1, user_id=BEN)], faiss_user=BEN)
    assert kinds(made) == [(Kind.OWNER_MISMATCH, BEN), (Kind.OWNER_MISMATCH, BEN)]
    assert {each.store for each in judge(made).differences} == set(Store)


@pytest.mark.parametrize("pgvector", list(State))
def test_drift_is_a_difference_whatever_is_owed(pgvector: State) -> None:
    made = look([in_faiss(1)], [in_pgvector(1, vector=DRIFTED)], entries(pgvector=pgvector))
    assert kinds(made) == [(Kind.VECTOR_DRIFT, ADA)]


def test_a_deleted_document_still_held_is_extra_where_its_deletion_is_done() -> None:
    made = look([in_faiss(1)], [in_pgvector(1)], entries(pgvector=State.OWED, wanted=Wanted.ABSENT))
    assert [(each.kind, each.store) for each in judge(made).differences] == [(Kind.EXTRA, Store.FAISS)]
    assert judge(made).owed


def test_a_document_that_the_ledger_does_not_know_is_extra() -> None:
    assert kinds(look([in_faiss(1)], [in_pgvector(1)], {})) == [(Kind.EXTRA, ADA), (Kind.EXTRA, ADA)]


# -- reporting and mending


def only(made: Look) -> DocumentDifference:
    (found,) = by_document(made, judge(made).differences)
    return found


def test_a_report_counts_a_documents_chunks_and_names_some() -> None:
    made = look([in_faiss(number) for number in range(9)], [in_pgvector(0)])
    found = only(made)
    assert (found.chunks, len(found.examples)) == (8, 5)
    assert found.held == {Store.FAISS: 9, Store.PGVECTOR: 1}


def test_what_a_store_lacks_is_owed_to_it_again() -> None:
    assert act_on(only(look([in_faiss(1)], []))) == Act(DOCUMENT, Store.PGVECTOR)
    lacking = look([], [in_pgvector(1)], given_by_faiss={chunk(1): None})
    assert act_on(only(lacking)) == Act(DOCUMENT, Store.FAISS)


def test_a_document_that_no_store_holds_is_left_with_the_reason() -> None:
    made = look([], [])
    reasons = [str(act_on(found)) for found in by_document(made, judge(made).differences)]
    assert ["no store holds" in reason for reason in reasons] == [True, True]


def test_drifted_rows_go_before_they_are_owed() -> None:
    drifted = look([in_faiss(1)], [in_pgvector(1, content=DRIFTED)])
    assert act_on(only(drifted)) == Act(DOCUMENT, Store.PGVECTOR, remove_of=ADA, concerns=(ADA,))


def test_rows_under_the_wrong_user_go_from_that_user() -> None:
    swapped = look([in_faiss(1)], [in_pgvector(1, user_id=BEN)], elsewhere=frozenset([chunk(1)]))
    assert act_on(only(swapped)) == Act(DOCUMENT, Store.PGVECTOR, remove_of=BEN, concerns=(ADA, BEN))


def test_the_reference_is_not_overruled_where_it_names_another_owner_than_the_ledger() -> None:
    made = look([in_faiss(1)], [], faiss_user=BEN)
    (found,) = (each for each in by_document(made, judge(made).differences))
    assert "assign-owners" in str(act_on(found))


def test_what_should_be_gone_is_owed_its_absence_again() -> None:
    made = look([], [in_pgvector(1)], entries(wanted=Wanted.ABSENT))
    assert act_on(only(made)) == Act(DOCUMENT, Store.PGVECTOR, Wanted.ABSENT, remove_of=ADA)
