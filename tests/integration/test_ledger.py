"""The ledger's statements: what is wanted only ever turns to absent, `done` is never untrue, work is shared out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from src.database import Role
from src.tools.rag_tools.migration import ledger
from src.tools.rag_tools.migration.ledger import ATTEMPTS_BEFORE_ASIDE, Entry, State, Wanted
from src.tools.rag_tools.migration.stages import ORDER, ROUTING, Stage, Store
from tests.support.routers import add_users, set_stage

pytestmark = pytest.mark.migration

F, P = Store.FAISS, Store.PGVECTOR
USER = 1

DOCUMENT = "INSERT INTO documents (user_id, filename, path, status, created_at) VALUES (%s, 'a', 'a', %s, now())"
ROW = "SELECT wanted, state, attempts, last_error FROM vector_ledger WHERE document_id = %s AND store = %s"


@pytest.fixture
def app(database: Any) -> Iterator[psycopg.Connection[Any]]:
    with database.connect(Role.APP, autocommit=True) as connection:
        yield connection


@pytest.fixture
def other(database: Any) -> Iterator[psycopg.Connection[Any]]:
    with database.connect(Role.APP) as connection:
        yield connection


@pytest.fixture
def owner(database: Any) -> Iterator[psycopg.Connection[Any]]:
    with database.connect(autocommit=True) as connection:
        yield connection


def row(connection: psycopg.Connection[Any], document_id: int, store: Store) -> tuple[Any, ...]:
    found: tuple[Any, ...] | None = connection.execute(ROW, (document_id, store)).fetchone()
    assert found is not None
    return found


def due(connection: psycopg.Connection[Any], *documents: int) -> None:
    """Owed entries without a lease, the first document the longest due."""
    for place, document_id in enumerate(documents):
        ledger.intend(connection, document_id, USER)
        connection.execute(
            "UPDATE vector_ledger SET next_attempt_at = clock_timestamp() - interval '1 hour'"
            " + make_interval(mins => %s) WHERE document_id = %s",
            (place, document_id),
        )


def claimed(entries: list[Entry]) -> list[tuple[int, Store]]:
    return [(entry.document_id, entry.store) for entry in entries]


# -- what is wanted


def test_an_upload_is_owed_to_both_stores_in_every_stage(app: psycopg.Connection[Any]) -> None:
    ledger.intend(app, 1, USER)
    assert ledger.states(app, 1) == {F: State.OWED, P: State.OWED}
    assert {row(app, 1, store)[0] for store in Store} == {"present"}


def test_a_document_is_intended_once(app: psycopg.Connection[Any]) -> None:
    ledger.intend(app, 1, USER)
    with pytest.raises(psycopg.errors.UniqueViolation):
        ledger.intend(app, 1, USER)


@pytest.mark.parametrize("store", Store)
def test_done_is_marked_only_where_it_is_still_wanted(app: psycopg.Connection[Any], store: Store) -> None:
    ledger.intend(app, 1, USER)
    assert not ledger.mark(app, 1, store, Wanted.ABSENT)
    assert ledger.mark(app, 1, store, Wanted.PRESENT)
    assert ledger.mark(app, 1, store, Wanted.PRESENT), "marking twice is fine"
    assert ledger.states(app, 1) == {store: State.DONE, store.other: State.OWED}
    ledger.withdraw(app, 1, USER)
    assert ledger.states(app, 1) == {F: State.OWED, P: State.OWED}
    assert not ledger.mark(app, 1, store, Wanted.PRESENT), "who comes late marks nothing"
    assert ledger.states(app, 1)[store] is State.OWED
    assert ledger.mark(app, 1, store, Wanted.ABSENT)


def test_nothing_is_marked_for_a_document_that_the_ledger_does_not_know(app: psycopg.Connection[Any]) -> None:
    assert not ledger.mark(app, 404, F, Wanted.PRESENT)
    assert ledger.states(app, 404) == {}


def test_a_withdrawal_is_final_and_repeating_it_undoes_nothing(app: psycopg.Connection[Any]) -> None:
    ledger.intend(app, 1, USER)
    ledger.withdraw(app, 1, USER)
    for store in Store:
        ledger.mark(app, 1, store, Wanted.ABSENT)
    ledger.withdraw(app, 1, USER)
    assert ledger.states(app, 1) == {F: State.DONE, P: State.DONE}
    with pytest.raises(psycopg.errors.UniqueViolation):
        ledger.intend(app, 1, USER)


def test_a_document_that_the_ledger_never_knew_can_be_withdrawn(app: psycopg.Connection[Any]) -> None:
    ledger.withdraw(app, 7, USER)
    assert ledger.states(app, 7) == {F: State.OWED, P: State.OWED}
    assert {row(app, 7, store)[0] for store in Store} == {"absent"}


def test_a_write_that_holds_what_is_wanted_lets_no_withdrawal_between(
    app: psycopg.Connection[Any], other: psycopg.Connection[Any]
) -> None:
    ledger.intend(app, 1, USER)
    assert ledger.mark(other, 1, P, Wanted.PRESENT)
    app.execute("SET lock_timeout = '50ms'")
    with pytest.raises(psycopg.errors.LockNotAvailable):
        ledger.withdraw(app, 1, USER)
    other.rollback()
    ledger.withdraw(app, 1, USER)
    assert not ledger.mark(other, 1, P, Wanted.PRESENT)


# -- claims


@pytest.mark.parametrize("stage", ORDER)
def test_a_claim_takes_what_the_stores_in_force_are_owed(
    app: psycopg.Connection[Any], owner: psycopg.Connection[Any], stage: Stage
) -> None:
    due(app, 1)
    number = set_stage(owner, stage)
    entries = ledger.claim(app, limit=9)
    assert {entry.store for entry in entries} == set(ROUTING[stage].writes)
    assert {(entry.transition_id, entry.stage) for entry in entries} == {(number, stage)}
    assert {(entry.user_id, entry.wanted, entry.attempts) for entry in entries} == {(USER, Wanted.PRESENT, 1)}


def test_a_claim_by_store_disregards_the_stage(app: psycopg.Connection[Any]) -> None:
    due(app, 1)
    assert claimed(ledger.claim(app, limit=9, stores=[P])) == [(1, P)]


def test_two_who_claim_at_once_get_different_entries_and_nobody_waits(
    app: psycopg.Connection[Any], other: psycopg.Connection[Any]
) -> None:
    due(app, 1, 2, 3, 4)
    first = ledger.claim(other, limit=2)
    app.execute("SET lock_timeout = '1ms'")
    second = ledger.claim(app, limit=2)
    third = ledger.claim(app, limit=2)
    other.commit()
    assert claimed(first) + claimed(second) == [(number, F) for number in (1, 2, 3, 4)]
    assert third == []


def test_what_a_dead_claimer_had_not_committed_is_claimed_by_the_next(
    app: psycopg.Connection[Any], other: psycopg.Connection[Any]
) -> None:
    due(app, 1)
    assert len(ledger.claim(other, limit=9)) == 1
    other.rollback()
    assert [entry.attempts for entry in ledger.claim(app, limit=9)] == [1]


def test_a_claimed_entry_is_left_alone_until_its_lease_is_over(app: psycopg.Connection[Any]) -> None:
    due(app, 1, 2)
    assert claimed(ledger.claim(app, limit=1, lease_seconds=3600)) == [(1, F)]
    assert claimed(ledger.claim(app, limit=9, lease_seconds=0)) == [(2, F)]
    assert [(entry.document_id, entry.attempts) for entry in ledger.claim(app, limit=9)] == [(2, 2)]


def test_at_once_disregards_leases_and_ends_because_it_remembers_what_it_tried(app: psycopg.Connection[Any]) -> None:
    due(app, 1, 2, 3)
    ledger.claim(app, limit=9, lease_seconds=3600)
    tried: list[Entry] = []
    while entries := ledger.claim(app, limit=2, at_once=True, tried=tried):
        tried += entries
    assert sorted(claimed(tried)) == [(1, F), (2, F), (3, F)]


def test_who_was_tried_in_one_store_is_still_claimed_for_the_other(app: psycopg.Connection[Any]) -> None:
    due(app, 1)
    tried = ledger.claim(app, limit=9, stores=[F])
    assert claimed(ledger.claim(app, limit=9, stores=[F, P], at_once=True, tried=tried)) == [(1, P)]


def test_an_entry_that_keeps_failing_goes_behind_the_others(app: psycopg.Connection[Any]) -> None:
    due(app, 1, 2, 3)
    (failing,) = ledger.claim(app, limit=1)
    ledger.postpone(app, failing, "no", mends=True, jitter=1.0)
    assert [entry.document_id for _ in range(3) for entry in ledger.claim(app, limit=1)] == [2, 3]


def test_the_longest_due_is_claimed_first(app: psycopg.Connection[Any]) -> None:
    due(app, 5, 3, 4)
    assert [entry.document_id for _ in range(3) for entry in ledger.claim(app, limit=1)] == [5, 3, 4]


@pytest.mark.parametrize("state", ["done", "aside"])
def test_what_is_done_or_set_aside_is_not_claimed(
    app: psycopg.Connection[Any], owner: psycopg.Connection[Any], state: str
) -> None:
    due(app, 1)
    owner.execute("UPDATE vector_ledger SET state = %s", (state,))
    assert ledger.claim(app, limit=9, stores=list(Store), at_once=True) == []


def test_an_upload_that_has_just_been_received_is_left_to_its_own_process(app: psycopg.Connection[Any]) -> None:
    ledger.intend(app, 1, USER)
    assert ledger.claim(app, limit=9) == []
    assert claimed(ledger.claim(app, limit=9, at_once=True)) == [(1, F)]


def test_a_stage_of_another_release_is_owed_nothing(
    app: psycopg.Connection[Any], owner: psycopg.Connection[Any]
) -> None:
    due(app, 1)
    owner.execute(
        "INSERT INTO rollout_transitions (id, stage, read_percent, shadow_sample_rate, actor, reason)"
        " VALUES (2, 'contracted', 0, 1, 'test', 'test')"
    )
    assert ledger.claim(app, limit=9, at_once=True) == []


# -- failures


def try_once(connection: psycopg.Connection[Any], *, mends: bool, error: str = "no") -> State | None:
    (entry,) = ledger.claim(connection, limit=1, at_once=True)
    return ledger.postpone(connection, entry, error, mends=mends, jitter=1.0)


def test_a_failure_that_may_mend_is_tried_for_ever(app: psycopg.Connection[Any]) -> None:
    due(app, 1)
    assert {try_once(app, mends=True) for _ in range(20)} == {State.OWED}
    assert row(app, 1, F) == ("present", "owed", 20, "no")
    assert ledger.claim(app, limit=9) == [], "not before its time"


def test_a_failure_that_cannot_mend_is_set_aside_after_a_few_attempts_until_somebody_says_so(
    app: psycopg.Connection[Any],
) -> None:
    due(app, 1)
    found = [try_once(app, mends=False) for _ in range(ATTEMPTS_BEFORE_ASIDE)]
    assert found == [State.OWED] * (ATTEMPTS_BEFORE_ASIDE - 1) + [State.ASIDE]
    assert ledger.claim(app, limit=9, at_once=True) == []
    assert ledger.retry_aside(app) == [1]
    assert row(app, 1, F)[1:3] == ("owed", 0)
    assert len(ledger.claim(app, limit=9)) == 1
    assert ledger.retry_aside(app) == []


def test_a_withdrawal_takes_up_what_was_set_aside(app: psycopg.Connection[Any]) -> None:
    due(app, 1)
    for _ in range(ATTEMPTS_BEFORE_ASIDE):
        try_once(app, mends=False)
    ledger.withdraw(app, 1, USER)
    assert row(app, 1, F) == ("absent", "owed", 0, None)


def test_a_failure_to_add_what_was_withdrawn_meanwhile_is_no_failure(app: psycopg.Connection[Any]) -> None:
    due(app, 1)
    (entry,) = ledger.claim(app, limit=1)
    ledger.withdraw(app, 1, USER)
    assert ledger.postpone(app, entry, "no", mends=False, jitter=1.0) is None
    assert row(app, 1, F) == ("absent", "owed", 0, None)


def test_a_failure_after_another_process_has_done_it_is_no_failure(app: psycopg.Connection[Any]) -> None:
    due(app, 1)
    (entry,) = ledger.claim(app, limit=1)
    ledger.mark(app, 1, F, Wanted.PRESENT)
    assert ledger.postpone(app, entry, "no", mends=False, jitter=1.0) is None
    assert row(app, 1, F)[1] == "done"


def test_a_reason_that_postgresql_cannot_hold_is_recorded_as_near_as_it_can(app: psycopg.Connection[Any]) -> None:
    due(app, 1)
    assert try_once(app, mends=True, error="bad \0 byte, half a \ud83d pair" + "!" * 5_000) is State.OWED
    assert row(app, 1, F)[3].startswith("bad   byte, half a � pair!")


# -- ready


@pytest.mark.parametrize(
    ("stage", "done", "ready"),
    [
        (Stage.OFF, F, True),
        (Stage.OFF, P, False),
        (Stage.DUALWRITE, F, True),
        (Stage.DUALWRITE, P, False),
        (Stage.SHADOW, P, False),
        (Stage.LIVE, F, True),
        (Stage.LIVE, P, True),
        (Stage.RAMPDOWN, F, False),
        (Stage.RAMPDOWN, P, True),
        (Stage.COMPLETE, F, False),
        (Stage.COMPLETE, P, True),
    ],
)
def test_a_document_is_ready_once_the_store_that_serves_has_it(
    database: Any, app: psycopg.Connection[Any], stage: Stage, done: Store, ready: bool
) -> None:
    (user,) = add_users(database, 1)
    app.execute(DOCUMENT, (user, "received"))
    ledger.intend(app, 1, user)
    ledger.mark(app, 1, done, Wanted.PRESENT)
    assert ledger.finish_ready(app, 1, stage) == ([1] if ready else [])


def test_one_who_is_two_transitions_behind_makes_nothing_ready(
    database: Any, app: psycopg.Connection[Any], owner: psycopg.Connection[Any]
) -> None:
    (user,) = add_users(database, 1)
    app.execute(DOCUMENT, (user, "received"))
    ledger.intend(app, 1, user)
    ledger.mark(app, 1, F, Wanted.PRESENT)
    for stage in (Stage.DUALWRITE, Stage.SHADOW):
        set_stage(owner, stage)
    assert ledger.finish_ready(app, 1, Stage.OFF) == []
    assert ledger.finish_ready(app, 2, Stage.DUALWRITE) == [1]


@pytest.mark.parametrize("status", ["failed", "deleted", "ready"])
def test_what_was_given_up_or_deleted_is_never_made_ready(
    database: Any, app: psycopg.Connection[Any], status: str
) -> None:
    (user,) = add_users(database, 1)
    app.execute(DOCUMENT, (user, status))
    ledger.intend(app, 1, user)
    for store in Store:
        ledger.mark(app, 1, store, Wanted.PRESENT)
    assert ledger.finish_ready(app, 1, Stage.LIVE) == []


def test_absence_that_is_done_makes_nothing_ready(database: Any, app: psycopg.Connection[Any]) -> None:
    (user,) = add_users(database, 1)
    app.execute(DOCUMENT, (user, "received"))
    ledger.withdraw(app, 1, user)
    for store in Store:
        ledger.mark(app, 1, store, Wanted.ABSENT)
    assert ledger.finish_ready(app, 1, Stage.LIVE) == []


def test_a_store_owes_a_user_the_ready_documents_that_it_has_not_got(
    database: Any, app: psycopg.Connection[Any]
) -> None:
    one, another = add_users(database, 2)
    for status in ("ready", "received"):
        app.execute(DOCUMENT, (one, status))
    for document_id in (1, 2):
        ledger.intend(app, document_id, one)
    ledger.mark(app, 1, F, Wanted.PRESENT)
    assert ledger.owing_stores(app, one) == {P}
    assert ledger.owing_stores(app, another) == set()
    ledger.mark(app, 1, P, Wanted.PRESENT)
    assert ledger.owing_stores(app, one) == set()
    assert ledger.owed_among(app, [1, 2, 3]) == {2}
