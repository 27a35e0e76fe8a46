"""The poll on a real PostgreSQL: one consistent look a second, and what this process did itself is never lost to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from src.database import Role
from src.tools.rag_tools.migration import failover
from src.tools.rag_tools.migration.flags import Flags, FlagsUnknownError, HaltedError
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.pgvector_store import Pool, open_pool
from src.tools.rag_tools.store import StoreError
from tests.support.dying import at
from tests.support.routers import add_users, router_on, set_stage, write_note

pytestmark = pytest.mark.migration

ENTRY = """
INSERT INTO vector_ledger (document_id, store, user_id, wanted, state, next_attempt_at)
VALUES (%s, %s, %s, %s, 'owed', now())
"""
DOCUMENT = """
INSERT INTO documents (user_id, filename, path, status, created_at) VALUES (%s, 'a.md', 'a.md', 'ready', now())
RETURNING id
"""
INSTANCE = "SELECT transition_id, halted FROM rollout_instances WHERE instance = %s"


@pytest.fixture
def pool(database: Any) -> Iterator[Pool]:
    with open_pool(database.conninfo(Role.APP), 4, name="flags") as made:
        yield made


@pytest.fixture
def owner(database: Any) -> Iterator[psycopg.Connection[Any]]:
    with database.connect(autocommit=True) as connection:
        yield connection


def upload(router: Router, user_id: int, folder: Path, name: str) -> int:
    document_id = router.receive(user_id, write_note(folder, name, f"What {name} says."), name)
    router.index(document_id)
    return document_id


def one(cursor: psycopg.Cursor[Any]) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = cursor.fetchone()
    assert row is not None
    return row


# -- one look


def test_a_poll_brings_the_stage_what_is_owed_what_is_being_deleted_and_the_owners(
    database: Any, pool: Pool, owner: psycopg.Connection[Any]
) -> None:
    (user,) = add_users(database, 1)
    (ready,) = one(owner.execute(DOCUMENT, (user,)))
    owner.execute(ENTRY, (ready, Store.PGVECTOR, user, "present"))
    owner.execute(ENTRY, (900, Store.FAISS, user, "absent"))
    owner.execute("INSERT INTO owner_assignments (actor, counts) VALUES ('test', '{}')")
    set_stage(owner, Stage.LIVE, 25)
    view = Flags(pool).poll()
    assert (view.transition_id, view.stage, view.read_percent, view.sample_rate) == (2, Stage.LIVE, 25, 1.0)
    assert dict(view.owed) == {user: frozenset({Store.PGVECTOR})}
    assert view.hidden == {900}
    assert view.owners_version == 1


def test_only_a_ready_document_turns_its_user_away_from_a_store(
    database: Any, pool: Pool, owner: psycopg.Connection[Any]
) -> None:
    (user,) = add_users(database, 1)
    set_stage(owner, Stage.DUALWRITE)
    for status in ("received", "indexing", "failed", "deleted"):
        (made,) = one(owner.execute(DOCUMENT, (user,)))
        owner.execute("UPDATE documents SET status = %s WHERE id = %s", (status, made))
        owner.execute(ENTRY, (made, Store.PGVECTOR, user, "present"))
    assert dict(Flags(pool).poll().owed) == {}


def test_what_is_set_aside_counts_as_owed(database: Any, pool: Pool, owner: psycopg.Connection[Any]) -> None:
    (user,) = add_users(database, 1)
    set_stage(owner, Stage.DUALWRITE)
    (made,) = one(owner.execute(DOCUMENT, (user,)))
    owner.execute(ENTRY, (made, Store.PGVECTOR, user, "present"))
    owner.execute(ENTRY, (901, Store.PGVECTOR, user, "absent"))
    owner.execute("UPDATE vector_ledger SET state = 'aside'")
    view = Flags(pool).poll()
    assert dict(view.owed) == {user: frozenset({Store.PGVECTOR})}
    assert view.hidden == {901}


def test_a_deletion_owed_to_a_store_that_the_stage_does_not_write_hides_nothing_until_a_stage_does(
    pool: Pool, owner: psycopg.Connection[Any]
) -> None:
    owner.execute(ENTRY, (902, Store.PGVECTOR, 1, "absent"))
    flags = Flags(pool)
    assert flags.poll().hidden == set()
    set_stage(owner, Stage.DUALWRITE)
    assert flags.poll().hidden == {902}


def test_a_poll_sees_a_step_and_what_was_owed_at_that_moment_together(database: Any, pool: Pool) -> None:
    """A stage with the deletions of another moment would serve a deleted document."""
    flags, last, rest, was_seen = Flags(pool), 60, 10, threading.Semaphore(0)

    def go_on() -> None:
        with database.connect() as connection:
            set_stage(connection, Stage.DUALWRITE)
            connection.commit()
            for number in range(3, last + 1):
                set_stage(connection, Stage.DUALWRITE)
                connection.execute(ENTRY, (number, Store.PGVECTOR, 1, "absent"))
                connection.commit()
                if number % rest == 0 and number < last:
                    was_seen.acquire(timeout=60)

    thread = threading.Thread(target=go_on)
    thread.start()
    seen = set()
    while (view := flags.poll()).transition_id < last:
        assert view.hidden == set(range(3, view.transition_id + 1))
        if view.transition_id % rest == 0 and view.transition_id not in seen:
            was_seen.release()
        seen.add(view.transition_id)
    thread.join()
    assert seen >= set(range(rest, last, rest)), "the poll met the steps under way"


# -- what this process did itself


def test_what_a_process_did_itself_survives_a_poll_that_was_begun_before(
    database: Any, tmp_path: Path, owner: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (user,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        set_stage(owner, Stage.DUALWRITE)
        router.refresh()
        doomed = upload(router, user, tmp_path, "doomed.md")
        begun, row = router.flags.fetch()
        with monkeypatch.context() as broken:
            broken.setattr("src.tools.rag_tools.migration.stores.insert_chunks", _away)
            missed = upload(router, user, tmp_path, "missed.md")
        router.delete(user, doomed)
        view = router.flags.adopt(begun, row)
        assert view.reads(user) == (Store.FAISS,)
        assert view.fallback(user) is None, f"pgvector has not got document {missed}"
        assert doomed in view.hidden
        view = router.refresh()
        assert view.fallback(user) is None
        assert view.hidden == set()


def test_two_uploads_of_one_user_at_once_hide_nothing_of_each_other(
    database: Any, tmp_path: Path, owner: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has looked what is owed and not noted it yet, when the second leaves something owed and notes it."""
    (user,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        set_stage(owner, Stage.SHADOW)
        router.refresh()
        missed: list[int] = []

        def second() -> None:
            with monkeypatch.context() as broken:
                broken.setattr("src.tools.rag_tools.migration.stores.insert_chunks", _away)
                missed.append(upload(router, user, tmp_path, "second.md"))

        with at("upload.ready", second, after=True):
            first = upload(router, user, tmp_path, "first.md")
        set_stage(owner, Stage.LIVE, 100)
        for _ in range(2):
            assert {hit.document_id for hit in router.query(user, "anything", 9)} == {first, *missed}
            assert router.flags.view().fallback(user) is None
            router.refresh()


def test_the_note_is_made_before_the_request_is_over(
    database: Any, tmp_path: Path, owner: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the fleet could step on between, and this process read where the document is not."""
    (user,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        set_stage(owner, Stage.DUALWRITE)
        router.refresh()
        in_flight: list[bool] = []
        note = router.flags.note_owed

        def noted(user_id: int, stores: frozenset[Store]) -> None:
            in_flight.append(bool(router.flags._in_flight))
            note(user_id, stores)

        monkeypatch.setattr(router.flags, "note_owed", noted)
        upload(router, user, tmp_path, "a.md")
        assert in_flight == [True]


def test_a_deletion_is_in_no_answer_from_the_moment_that_it_is_committed(
    database: Any, tmp_path: Path, owner: psycopg.Connection[Any]
) -> None:
    (user,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        set_stage(owner, Stage.DUALWRITE)
        router.refresh()
        document_id = upload(router, user, tmp_path, "a.md")
        answers: list[int] = []
        for place in ("journal.delete", "pgvector.absent"):
            with at(place, lambda: answers.append(len(router.query(user, "anything", 9)))):
                router.delete(user, document_id)
        assert answers == [0, 0]


# -- polls among themselves


def test_two_polls_at_once_are_no_failover(
    database: Any, tmp_path: Path, owner: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has looked before a step and is slow to act on it; the second looks after the step."""
    with router_on(database, tmp_path) as router:
        looked, go_on, fetch = threading.Event(), threading.Event(), router.flags.fetch

        def slow() -> Any:
            monkeypatch.setattr(router.flags, "fetch", fetch)
            found = fetch()
            looked.set()
            assert go_on.wait(30)
            return found

        monkeypatch.setattr(router.flags, "fetch", slow)
        first, second = (threading.Thread(target=router.refresh) for _ in range(2))
        first.start()
        assert looked.wait(30)
        set_stage(owner, Stage.DUALWRITE)
        second.start()
        second.join(0.5)  # its chance to overtake
        go_on.set()
        for thread in (first, second):
            thread.join(30)
        assert router.flags.halted is None
        assert router.flags.view().transition_id == 2


def test_uploads_of_others_during_a_poll_are_no_failover(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (user,) = add_users(database, 1)
    with router_on(database, tmp_path) as router, router_on(database, tmp_path) as other:
        of_postgres = failover.of_postgres

        def overtaken(connection: Any) -> failover.Marks:
            marks = of_postgres(connection)
            monkeypatch.setattr(failover, "of_postgres", of_postgres)
            upload(other, user, tmp_path, "a.md")
            return marks

        monkeypatch.setattr(failover, "of_postgres", overtaken)
        router.refresh()
        assert router.flags.halted is None


def test_new_owners_are_loaded_before_the_flags_that_came_with_them_are_acted_on(
    database: Any, tmp_path: Path, owner: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with router_on(database, tmp_path) as router:
        owner.execute("INSERT INTO owner_assignments (actor, counts) VALUES ('test', '{}')")
        set_stage(owner, Stage.DUALWRITE)
        with monkeypatch.context() as broken:
            broken.setattr(router, "load_owners", _away)
            with pytest.raises(StoreError):
                router.refresh()
        assert router.flags.view().transition_id == 1
        assert router.refresh().transition_id == 2
        assert router.stores.faiss.owners_version == 1


# -- the fleet


def test_a_process_reports_the_transition_of_its_oldest_request(pool: Pool, owner: psycopg.Connection[Any]) -> None:
    flags = Flags(pool)

    def reported() -> Any:
        return owner.execute(INSTANCE, (flags.instance,)).fetchone()

    flags.poll()
    with flags.request():
        set_stage(owner, Stage.DUALWRITE)
        for _ in range(3):
            flags.poll()
        assert flags.view().transition_id == 2
        assert reported() == (1, None)
    flags.poll()
    assert reported() == (2, None)


def test_what_is_counted_reaches_the_fleet_also_when_a_poll_failed(
    pool: Pool, owner: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = Flags(pool)
    flags.poll()
    flags.count("fallback")
    with monkeypatch.context() as broken:
        broken.setattr(flags, "pool", _NoPool())
        with pytest.raises(StoreError, match="away"):
            flags.poll()
    flags.count("fallback")
    flags.count("reads.faiss")
    for _ in range(2):
        flags.poll()
    found = owner.execute("SELECT name, sum(count) FROM rollout_counts WHERE transition_id = 1 GROUP BY name")
    assert dict(found.fetchall()) == {"fallback": 2, "reads.faiss": 1}


def test_a_process_that_leaves_is_no_longer_of_the_fleet(pool: Pool, owner: psycopg.Connection[Any]) -> None:
    flags = Flags(pool)
    flags.poll()
    flags.leave()
    assert owner.execute(INSTANCE, (flags.instance,)).fetchone() is None


# -- flags that cannot be acted on


def test_a_database_that_lost_a_step_stops_the_writes_and_the_fleet_sees_why(
    database: Any, pool: Pool, owner: psycopg.Connection[Any]
) -> None:
    flags = Flags(pool)
    set_stage(owner, Stage.DUALWRITE)
    flags.poll()
    owner.execute("ALTER TABLE rollout_transitions DISABLE TRIGGER append_only")
    owner.execute("DELETE FROM rollout_transitions WHERE id = 2")
    for _ in range(2):
        view = flags.poll()
    assert view.stage is Stage.DUALWRITE, "reads go on as they were"
    with pytest.raises(HaltedError, match="transition 1, this process acted on 2"), flags.request(write=True):
        pass
    transition, halted = one(owner.execute(INSTANCE, (flags.instance,)))
    assert transition == 2
    assert "failover" in halted


def test_a_stage_of_a_later_release_stops_the_writes_of_a_running_process_and_refuses_a_starting_one(
    database: Any, tmp_path: Path, pool: Pool, owner: psycopg.Connection[Any]
) -> None:
    (user,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        upload(router, user, tmp_path, "a.md")
        owner.execute(
            "INSERT INTO rollout_transitions (id, stage, read_percent, shadow_sample_rate, actor, reason)"
            " VALUES (2, 'contracted', 0, 1, 'test', 'test')"
        )
        with pytest.raises(FlagsUnknownError, match="contracted"):
            router.refresh()
        assert len(router.query(user, "anything", 3)) == 1
        with pytest.raises(HaltedError):
            upload(router, user, tmp_path, "b.md")
        assert router.status()["ready"] is False
    with pytest.raises(FlagsUnknownError, match="contracted"), router_on(database, tmp_path):
        pass


@pytest.mark.parametrize("table", ["rollout_transitions", "vector_ledger", "rollout_instances"])
def test_a_missing_table_is_a_refusal_to_start_and_never_a_default(
    database: Any, tmp_path: Path, owner: psycopg.Connection[Any], table: str
) -> None:
    owner.execute(f"DROP TABLE {table}")
    with pytest.raises(FlagsUnknownError, match="alembic upgrade head"), router_on(database, tmp_path):
        pass


def test_no_transition_at_all_is_a_refusal_too(pool: Pool, owner: psycopg.Connection[Any]) -> None:
    owner.execute("ALTER TABLE rollout_transitions DISABLE TRIGGER append_only")
    owner.execute("DELETE FROM rollout_transitions")
    with pytest.raises(FlagsUnknownError, match="restore"):
        Flags(pool).poll()


@pytest.mark.parametrize(("stage", "percent", "served"), [(Stage.SHADOW, 0, True), (Stage.LIVE, 0, False)])
def test_faiss_answers_on_old_flags_only_where_nobody_can_have_left_it_behind(
    database: Any, tmp_path: Path, owner: psycopg.Connection[Any], stage: Stage, percent: int, served: bool
) -> None:
    (user,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        document_id = upload(router, user, tmp_path, "a.md")
        set_stage(owner, stage, percent)
        polled = router.refresh().fetched_at
        router.clock = lambda: polled + 29.0
        assert [hit.document_id for hit in router.query(user, "anything", 3)] == [document_id]
        router.clock = lambda: polled + 31.0
        if served:
            assert [hit.document_id for hit in router.query(user, "anything", 3)] == [document_id]
        else:
            with pytest.raises(FlagsUnknownError, match="older than 30 seconds"):
                router.query(user, "anything", 3)


# -- the record


@pytest.mark.parametrize("role", [Role.OWNER, Role.APP, Role.ROLLOUT])
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE rollout_transitions SET reason = 'rewritten'",
        "UPDATE rollout_transitions SET stage = 'off' WHERE id = 99",
        "DELETE FROM rollout_transitions",
        "DELETE FROM rollout_transitions WHERE id = 99",
        "TRUNCATE rollout_transitions",
    ],
)
def test_nobody_rewrites_the_record_of_transitions(database: Any, role: Role, change: str) -> None:
    with (
        database.connect(role, autocommit=True) as connection,
        pytest.raises((psycopg.errors.RaiseException, psycopg.errors.InsufficientPrivilege)),
    ):
        connection.execute(change)


def test_of_two_people_who_step_from_the_same_transition_one_is_refused(database: Any) -> None:
    step = (
        "INSERT INTO rollout_transitions (id, stage, read_percent, shadow_sample_rate, actor, reason)"
        " VALUES (2, 'dualwrite', 0, 1, %s, 'test')"
    )
    with database.connect() as one, database.connect() as other:
        one.execute(step, ("one",))
        late = threading.Thread(target=one.commit)
        late.start()
        with pytest.raises(psycopg.errors.UniqueViolation):
            other.execute(step, ("other",))
        late.join()


def _away(*_: object) -> None:
    raise StoreError("the store is away")


class _NoPool:
    """As a pool whose server is away."""

    @contextmanager
    def connection(self) -> Iterator[Any]:
        raise psycopg.OperationalError("connection refused")
        yield
