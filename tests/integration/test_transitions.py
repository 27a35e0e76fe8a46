"""Steps on a real database and real processes: one at a time, by everybody, and with nothing left behind."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from rollout import steps
from rollout.control import Control
from rollout.errors import RefusedError
from rollout.gates import Criterion, Verdict
from rollout.transitions import Target, step
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.migration.targeting import bucket
from src.tools.rag_tools.store import StoreError
from tests.support.control import control_on
from tests.support.routers import add_users, router_on, set_stage, write_note

pytestmark = pytest.mark.migration


@pytest.fixture
def made(configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    with control_on(tmp_path, monkeypatch) as control:
        yield control


@pytest.fixture
def open_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown here are the rules that hold beside the gates."""
    for stage in Stage:
        monkeypatch.setitem(steps.GATES, stage, lambda *_: {})


def to_stage(database: Any, stage: Stage, percent: int = 0, *routers: Router) -> None:
    with database.connect(autocommit=True) as connection:
        set_stage(connection, stage, percent)
    for router in routers:
        router.refresh()
        router.refresh()


def upload(router: Router, user_id: int, folder: Path, name: str = "note.md", text: str = "The tide turns.") -> int:
    document_id = router.receive(user_id, write_note(folder, name, text), name)
    router.index(document_id)
    return document_id


def stages(database: Any) -> list[tuple[int, str]]:
    with database.connect() as connection:
        return connection.execute("SELECT id, stage FROM rollout_transitions ORDER BY id").fetchall()


def state(database: Any, document_id: int, store: Store) -> str:
    with database.connect() as connection:
        row = connection.execute(
            "SELECT state FROM vector_ledger WHERE document_id = %s AND store = %s", (document_id, store)
        ).fetchone()
    return str(row[0])


def go(control: Control, stage: Stage, actor: str = "me", percent: int | None = None) -> steps.Stepped:
    target = None if percent is None else Target(stage, percent)
    return steps.advance(control, target=target, execute=True, actor=actor, reason=f"{actor} wants {stage}")


def back(control: Control, target: Target | None = None) -> steps.Stepped:
    return steps.roll_back(control, target=target, execute=True, actor="me", reason="back")


# -- two at once


def test_of_two_who_step_at_once_one_wins_and_the_other_is_told_who_and_why(
    made: Control, configured_database: Any
) -> None:
    view, together = made.view(), threading.Barrier(2)

    def attempt(name: str) -> int:
        with made.connection() as connection:
            together.wait()
            return step(
                connection, view, Target(Stage.DUALWRITE, 0), made.profile,
                actor=name, reason=f"{name} is on call", evidence={},
            )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        attempts = {name: pool.submit(attempt, name) for name in ("ada", "ben")}
    won = [name for name, each in attempts.items() if each.exception() is None]
    refused = [each.exception() for each in attempts.values() if each.exception() is not None]
    assert len(won) == 1
    assert isinstance(refused[0], RefusedError)
    assert f"{won[0]} was first: transition 2 to dualwrite" in str(refused[0])
    assert f"({won[0]} is on call)" in str(refused[0])
    assert stages(configured_database) == [(1, "off"), (2, "dualwrite")]


def test_the_second_is_told_who_was_first_also_when_the_fleet_has_arrived_there_already(
    made: Control, configured_database: Any, tmp_path: Path
) -> None:
    with router_on(configured_database, tmp_path) as router:
        view = made.view()
        to_stage(configured_database, Stage.DUALWRITE, 0, router)
        with made.connection() as connection, pytest.raises(RefusedError, match="test was first: transition 2"):
            step(connection, view, Target(Stage.DUALWRITE, 0), made.profile, actor="me", reason="", evidence={})


def test_a_step_decided_under_another_stage_is_refused_at_the_flip(
    made: Control, configured_database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_question() -> Criterion:
        to_stage(configured_database, Stage.DUALWRITE)
        return Criterion("slow", "?", "", "", Verdict.PASS)

    monkeypatch.setitem(steps.GATES, Stage.DUALWRITE, lambda *_: {"slow": slow_question})
    with pytest.raises(RefusedError, match="was first"):
        go(made, Stage.DUALWRITE)
    assert stages(configured_database) == [(1, "off"), (2, "dualwrite")]


def test_the_gate_and_its_numbers_are_in_the_record_with_actor_and_reason(
    made: Control, configured_database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Criterion("odd", "?", "7", "6", Verdict.FAIL)
    monkeypatch.setitem(steps.GATES, Stage.DUALWRITE, lambda *_: {"odd": lambda: failing})
    with pytest.raises(RefusedError, match="odd is 7, needed 6"):
        go(made, Stage.DUALWRITE)
    assert stages(configured_database) == [(1, "off")]
    steps.advance(
        made, target=None, execute=True, actor="ada", reason="go", overrides={"odd": "7 will do"}
    )  # fmt: skip
    with configured_database.connect() as connection:
        actor, reason, evidence = connection.execute(
            "SELECT actor, reason, evidence FROM rollout_transitions WHERE id = 2"
        ).fetchone()
    assert (actor, reason, evidence["profile"]) == ("ada", "go", "test")
    (kept,) = evidence["gate"]["criteria"]
    assert (kept["value"], kept["verdict"], kept["todo"]) == ("7", "overridden", "overridden: 7 will do")


@pytest.mark.usefixtures("open_gates")
def test_a_dry_run_takes_no_step(made: Control, configured_database: Any) -> None:
    stepped = steps.advance(made, target=None, execute=False, actor="me", reason="")
    assert (stepped.transition_id, str(stepped.target)) == (None, "dualwrite")
    assert stages(configured_database) == [(1, "off")]


# -- a gate cannot be gone around


def test_going_back_is_no_way_forward(made: Control, configured_database: Any) -> None:
    with pytest.raises(RefusedError, match="only `rollout advance` goes there"):
        back(made, Target(Stage.DUALWRITE, 0))
    to_stage(configured_database, Stage.LIVE, 1)
    with pytest.raises(RefusedError, match="only `rollout advance` goes there"):
        back(made, Target(Stage.LIVE, 10))
    assert stages(configured_database)[-1] == (2, "live")


@pytest.mark.usefixtures("open_gates")
def test_going_forward_is_no_way_back(made: Control, configured_database: Any) -> None:
    to_stage(configured_database, Stage.COMPLETE, 100)
    with pytest.raises(RefusedError, match="`rollout rollback` goes there"):
        go(made, Stage.RAMPDOWN, percent=100)
    to_stage(configured_database, Stage.LIVE, 50)
    with pytest.raises(RefusedError, match="`rollout rollback` goes there"):
        go(made, Stage.LIVE, percent=10)
    assert stages(configured_database)[-1] == (3, "live")


def test_no_gate_holds_up_the_way_back(
    made: Control, configured_database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> dict[str, Any]:
        raise AssertionError("a gate was asked")

    for stage in Stage:
        monkeypatch.setitem(steps.GATES, stage, never)
    to_stage(configured_database, Stage.COMPLETE, 100)
    seen = [str(back(made).target) for _ in range(5)]
    assert seen == ["rampdown", "live at 0 percent", "shadow", "dualwrite", "off"]
    with pytest.raises(RefusedError, match="save-faiss"):
        back(made)


# -- every process


@pytest.mark.usefixtures("open_gates")
def test_a_step_waits_for_every_live_process_and_names_those_that_are_late(
    made: Control, configured_database: Any, tmp_path: Path
) -> None:
    with router_on(configured_database, tmp_path) as quick, router_on(configured_database, tmp_path) as slow:
        stepped = go(made, Stage.DUALWRITE)
        assert {each.instance for each in stepped.late} == {str(each.flags.instance) for each in (quick, slow)}
        quick.refresh()
        quick.refresh()
        with pytest.raises(RefusedError) as refused:
            go(made, Stage.SHADOW)
        assert "transition 2 is not acted on yet" in str(refused.value)
        assert str(refused.value).count("acts on transition 1") == 1
        slow.refresh()
        slow.refresh()
        assert go(made, Stage.SHADOW).transition_id == 3


@pytest.mark.usefixtures("open_gates")
def test_a_process_arrives_only_once_its_last_request_of_before_is_over(
    made: Control, configured_database: Any, tmp_path: Path
) -> None:
    with router_on(configured_database, tmp_path) as router:
        with ExitStack() as in_flight:
            in_flight.enter_context(router.flags.request())
            go(made, Stage.DUALWRITE)
            for _ in range(3):
                router.refresh()
            assert router.flags.view().stage is Stage.DUALWRITE
            with pytest.raises(RefusedError, match="not acted on yet"):
                go(made, Stage.SHADOW)
        router.refresh()
        go(made, Stage.SHADOW)


@pytest.mark.usefixtures("open_gates")
def test_back_waits_for_every_process_as_well(made: Control, configured_database: Any, tmp_path: Path) -> None:
    with router_on(configured_database, tmp_path) as router:
        to_stage(configured_database, Stage.COMPLETE, 100, router)
        back(made)
        with pytest.raises(RefusedError, match="not acted on yet"):
            back(made)


@pytest.mark.usefixtures("open_gates")
def test_a_process_silent_for_a_minute_is_not_waited_for_and_one_silent_for_less_is(
    made: Control, configured_database: Any
) -> None:
    add = (
        "INSERT INTO rollout_instances (instance, host, pid, transition_id, seen_at)"
        " VALUES (gen_random_uuid(), %s, 17, 1, now() - make_interval(secs => %s))"
    )
    with configured_database.connect(autocommit=True) as connection:
        connection.execute(add, ("gone", 61))
        go(made, Stage.DUALWRITE)
        connection.execute(add, ("stuck", 30))
        with pytest.raises(RefusedError, match="stuck:17") as refused:
            go(made, Stage.SHADOW)
        assert "gone:17" not in str(refused.value)


# -- nothing left behind


def leave_owed(database: Any, router: Router, user_id: int, folder: Path, store: Store, monkeypatch: Any) -> int:
    """An upload that `store`, which does not serve, misses."""

    def away(*_: object, **__: object) -> None:
        raise StoreError("it is away")

    with monkeypatch.context() as broken:
        if store is Store.PGVECTOR:
            broken.setattr("src.tools.rag_tools.migration.stores.insert_chunks", away)
        else:
            broken.setattr(router.stores.faiss, "upsert", away)
        document_id = upload(router, user_id, folder)
    assert state(database, document_id, store) == "owed"
    return document_id


@pytest.mark.usefixtures("open_gates")
@pytest.mark.parametrize(
    ("here", "there", "store"),
    [
        ((Stage.RAMPDOWN, 100), Stage.COMPLETE, Store.PGVECTOR),
        ((Stage.DUALWRITE, 0), Stage.OFF, Store.FAISS),
    ],
)
@pytest.mark.parametrize("kind", ["owed", "aside"])
def test_the_store_that_would_serve_alone_must_be_owed_no_ready_document(
    made: Control,
    configured_database: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    here: tuple[Stage, int],
    there: Stage,
    store: Store,
    kind: str,
) -> None:
    (owner,) = add_users(configured_database, 1)
    with router_on(configured_database, tmp_path) as router:
        # Taken in where the other store serves.
        to_stage(configured_database, Stage.SHADOW if store is Store.PGVECTOR else Stage.RAMPDOWN, 0, router)
        document_id = leave_owed(configured_database, router, owner, tmp_path, store, monkeypatch)
        to_stage(configured_database, *here, router)
        with configured_database.connect(autocommit=True) as connection:
            connection.execute("UPDATE vector_ledger SET state = %s WHERE store = %s", (kind, store))
        take = go if there is Stage.COMPLETE else back
        with pytest.raises(RefusedError) as refused:
            take(made, *([there] if take is go else []))
        assert f"{store} would serve alone and is owed 1 ready documents" in str(refused.value)
        assert stages(configured_database)[-1][1] == here[0]
        with configured_database.connect(autocommit=True) as connection:
            connection.execute("UPDATE vector_ledger SET state = 'owed' WHERE state = 'aside'")
        router.settler.run(at_once=True)
        assert state(configured_database, document_id, store) == "done"
        take(made, *([there] if take is go else []))
        assert stages(configured_database)[-1][1] == there


@pytest.mark.usefixtures("open_gates")
def test_what_nobody_can_find_yet_or_any_more_does_not_hold_up_complete(
    made: Control, configured_database: Any, tmp_path: Path
) -> None:
    (owner,) = add_users(configured_database, 1)
    with router_on(configured_database, tmp_path) as router:
        to_stage(configured_database, Stage.RAMPDOWN, 100, router)
        router.receive(owner, write_note(tmp_path, "received.md", "not yet"), "received.md")
        gone = upload(router, owner, tmp_path)
        router.delete(owner, gone)
        with configured_database.connect(autocommit=True) as connection:
            connection.execute("UPDATE vector_ledger SET state = 'owed' WHERE document_id = %s", (gone,))
        assert go(made, Stage.COMPLETE).transition_id == 3


def test_going_back_from_complete_first_gives_faiss_what_it_is_owed(
    made: Control, configured_database: Any, tmp_path: Path
) -> None:
    (owner,) = add_users(configured_database, 1)
    with router_on(configured_database, tmp_path) as router:
        to_stage(configured_database, Stage.DUALWRITE, 0, router)
        dead = upload(router, owner, tmp_path, "dead.md", "To be deleted.")
        to_stage(configured_database, Stage.COMPLETE, 100, router)
        document_id = upload(router, owner, tmp_path)
        router.delete(owner, dead)
        assert {state(configured_database, each, Store.FAISS) for each in (document_id, dead)} == {"owed"}
        stepped = back(made)
        assert str(stepped.target) == "rampdown"
        router.refresh()
        assert {state(configured_database, each, Store.FAISS) for each in (document_id, dead)} == {"done"}
        assert [chunk.document_id for chunk in router.stores.faiss.document(document_id)] == [document_id]
        assert router.stores.faiss.document(dead) == []


def test_a_document_uploaded_between_settling_and_the_step_is_settled_too(
    made: Control, configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(configured_database, 1)
    with router_on(configured_database, tmp_path) as router:
        to_stage(configured_database, Stage.COMPLETE, 100, router)
        settle, late = steps.settle_store, list[int]()

        def and_then_an_upload(control: Control, store: Store) -> None:
            settle(control, store)
            if len(late) < 2:
                late.append(upload(router, owner, tmp_path, f"{len(late)}.md", f"late {len(late)}"))

        monkeypatch.setattr(steps, "settle_store", and_then_an_upload)
        assert back(made).transition_id == 3
        assert {state(configured_database, each, Store.FAISS) for each in late} == {"done"}


def test_going_back_from_complete_is_refused_while_faiss_cannot_take_something(
    made: Control, configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(configured_database, 1)
    with router_on(configured_database, tmp_path) as router:
        to_stage(configured_database, Stage.COMPLETE, 100, router)
        document_id = upload(router, owner, tmp_path)

        def full(*_: object) -> None:
            raise StoreError("the disk is full")

        with monkeypatch.context() as broken:
            broken.setattr(made.faiss, "upsert", full)
            with pytest.raises(RefusedError, match=f"faiss is still owed 1 entries, first document {document_id}"):
                back(made)
        with configured_database.connect(autocommit=True) as connection:
            connection.execute("UPDATE vector_ledger SET state = 'aside' WHERE store = 'faiss'")
        with pytest.raises(RefusedError, match="--retry-aside"):
            back(made)
        assert stages(configured_database)[-1] == (2, "complete")


def test_save_faiss_refuses_while_faiss_lacks_something_that_was_set_aside(
    made: Control, configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(configured_database, 1)
    with router_on(configured_database, tmp_path) as router:
        to_stage(configured_database, Stage.RAMPDOWN, 100, router)
        document_id = leave_owed(configured_database, router, owner, tmp_path, Store.FAISS, monkeypatch)
        with configured_database.connect(autocommit=True) as connection:
            connection.execute("UPDATE vector_ledger SET state = 'aside' WHERE store = 'faiss'")
        with pytest.raises(RefusedError, match=f"first document {document_id}: set aside"):
            steps.settle_store(made, Store.FAISS)


# -- between the check and the commit


@pytest.mark.usefixtures("open_gates")
def test_no_document_becomes_ready_between_the_check_and_the_commit(
    made: Control, configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document is being made ready when the step begins: the step waits, and then sees what pgvector is owed."""
    (owner,) = add_users(configured_database, 1)
    with router_on(configured_database, tmp_path) as router:
        to_stage(configured_database, Stage.SHADOW, 0, router)
        document_id = leave_owed(configured_database, router, owner, tmp_path, Store.PGVECTOR, monkeypatch)
        to_stage(configured_database, Stage.RAMPDOWN, 100, router)
    with configured_database.connect(autocommit=True) as connection:
        connection.execute("UPDATE documents SET status = 'indexing' WHERE id = %s", (document_id,))
    with ThreadPoolExecutor(1) as pool, configured_database.connect() as writer:
        writer.execute("UPDATE documents SET status = 'ready' WHERE id = %s", (document_id,))
        stepping = pool.submit(go, made, Stage.COMPLETE)
        wait_until_blocked(configured_database, writer)
        writer.commit()
        error = stepping.exception()
    assert isinstance(error, RefusedError)
    assert "pgvector would serve alone and is owed 1 ready documents" in str(error)


@pytest.mark.usefixtures("open_gates")
def test_a_document_that_wants_to_become_ready_during_a_step_waits_for_it(
    made: Control, configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.tools.rag_tools.migration import transitions

    (owner,) = add_users(configured_database, 1)
    with configured_database.connect(autocommit=True) as connection:
        connection.execute(
            "INSERT INTO documents (user_id, filename, path, status) VALUES (%s, 'a', 'a', 'indexing')", (owner,)
        )
    require_whole, refused = transitions.require_whole, list[type[BaseException]]()

    def and_then_somebody_is_ready(*given: Any) -> None:
        require_whole(*given)
        with configured_database.connect(autocommit=True) as other:
            other.execute("SET lock_timeout = '100ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable) as caught:
                other.execute("UPDATE documents SET status = 'ready'")
            refused.append(caught.type)

    monkeypatch.setattr(transitions, "require_whole", and_then_somebody_is_ready)
    go(made, Stage.DUALWRITE)
    assert refused == [psycopg.errors.LockNotAvailable]


@pytest.mark.usefixtures("open_gates")
def test_a_step_does_not_wait_for_ever_behind_a_long_transaction(
    made: Control, configured_database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.tools.rag_tools.migration import transitions

    execute = psycopg.Connection.execute

    def impatient(self: Any, query: Any, *rest: Any, **options: Any) -> Any:
        query = query.replace("5s", "50ms") if isinstance(query, str) else query
        return execute(self, query, *rest, **options)

    monkeypatch.setattr(transitions.psycopg.Connection, "execute", impatient)
    with configured_database.connect() as idle:
        idle.execute("LOCK TABLE documents IN ROW EXCLUSIVE MODE")
        with pytest.raises(RefusedError, match="pg_stat_activity"):
            go(made, Stage.DUALWRITE)
    assert go(made, Stage.DUALWRITE).transition_id == 2


# -- the threshold


@pytest.mark.usefixtures("open_gates")
def test_the_users_of_one_percent_are_still_among_those_of_ten_after_others_have_joined(
    made: Control, configured_database: Any, tmp_path: Path
) -> None:
    users = sorted(add_users(configured_database, 40), key=bucket)
    early, late = users[30], users[20]
    assert bucket(late) > 10
    with router_on(configured_database, tmp_path) as router:
        to_stage(configured_database, Stage.SHADOW, 0, router)
        upload(router, early, tmp_path)
        go(made, Stage.LIVE)
        router.refresh()
        router.refresh()
        assert router.flags.view().serving(early) is Store.PGVECTOR
        upload(router, late, tmp_path, "late.md", "joined later")
        go(made, Stage.LIVE)
        assert router.refresh().read_percent == 10
        assert router.flags.view().serving(early) is Store.PGVECTOR


def test_what_a_dry_rollback_says_is_true(
    made: Control, configured_database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner,) = add_users(configured_database, 1)
    with router_on(configured_database, tmp_path) as router:
        to_stage(configured_database, Stage.COMPLETE, 100, router)
        upload(router, owner, tmp_path)
        notes = notes_of(made)
        assert "FAISS is owed 1 entries; `rollout rollback --execute` settles them first" in notes
        assert "nothing is lost" in notes
        assert "would reopen the leak" in notes
        assert "`rollout save-faiss --execute`" in notes
        assert state(configured_database, 1, Store.FAISS) == "owed"
        back(made)
        router.refresh()
        router.refresh()
        notes = notes_of(made)
        assert "FAISS is owed nothing" in notes
        assert "lack the last 1 journal entries" in notes
        made.faiss.save()
        assert "hold everything" in notes_of(made)
        with configured_database.connect(autocommit=True) as connection:
            connection.execute("UPDATE vector_ledger SET state = 'aside' WHERE store = 'faiss'")
        assert "1 of them were set aside (document 1)" in notes_of(made)
    assert stages(configured_database)[-1] == (3, "rampdown")


def test_a_dry_rollback_says_how_long_it_takes_until_every_process_acts_on_it(
    made: Control, configured_database: Any
) -> None:
    add = (
        "INSERT INTO rollout_instances (instance, host, pid, transition_id, seen_at)"
        " VALUES (gen_random_uuid(), %s, 17, %s, now() - make_interval(secs => %s))"
    )
    to_stage(configured_database, Stage.DUALWRITE)
    assert "no backend process runs: the step is in force at once" in notes_of(made)
    with configured_database.connect(autocommit=True) as connection:
        connection.execute(add, ("gone", 1, 61))
        connection.execute(add, ("fresh", 2, 0))
        assert "every backend process (1) acts on it within about 2 seconds" in notes_of(made)
        assert "waited for" not in notes_of(made)
        connection.execute(add, ("silent", 2, 20))
        found = re.search(r"; silent:17 .* is waited for until it is heard, (\d+) seconds at most", notes_of(made))
        assert found is not None
        assert 0 < int(found[1]) <= 40
        connection.execute(add, ("late", 1, 0))
        notes = notes_of(made)
        assert "no step is taken before these act on the present one: late:17 (acts on transition 1" in notes


def notes_of(made: Control) -> str:
    stepped = steps.roll_back(made, target=None, execute=False, actor="me", reason="")
    assert stepped.as_dict()["notes"] == list(stepped.notes)
    return "\n".join(stepped.notes)


def wait_until_blocked(database: Any, blocker: psycopg.Connection[Any]) -> None:
    """Until somebody waits for a lock that `blocker` holds."""
    with database.connect(autocommit=True) as connection:
        while not connection.execute(
            "SELECT 1 FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))", (blocker.info.backend_pid,)
        ).fetchone():
            pass
