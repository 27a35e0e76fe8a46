"""A poisoned rollout is taken back by the backend itself: when, whereto, by whom, and what is left to be read of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from rollout import hold
from rollout.control import Control
from rollout.profiles import PRODUCTION
from rollout.status import status
from src.database import Role
from src.tools.rag_tools.migration.causes import Cause
from src.tools.rag_tools.migration.guard import WINDOWS, Limits
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.migration.transitions import step
from src.tools.rag_tools.pgvector_store import open_pool
from tests.support.planted import Planted, one_of_each_side, planting
from tests.support.routers import HashEmbeddings, add_users, router_on
from tests.support.sessions import wait_until

pytestmark = pytest.mark.migration

LEAST = Limits().least
WINDOW_SECONDS = 60.0

TRANSITIONS = """
SELECT id, stage, read_percent, read_threshold, actor, reason, evidence FROM rollout_transitions ORDER BY id
"""
# In each of three windows, of the transition in force.
LEAKS = """
INSERT INTO shadow_diffs (at, transition_id, stage, user_id, cohort, cause, served_by, served_ms, shadow_ms,
                          fingerprint, event)
SELECT now() - make_interval(secs => %s * w + 1), max(t.id), 'live', 1, 'small', 'owner_mismatch', 'faiss', 1, 1,
       '', '{}'
FROM rollout_transitions t, generate_series(0, 2) AS w, generate_series(1, 50) AS n GROUP BY w, n
"""


@pytest.fixture
def planted(database: Any, tmp_path: Path) -> Iterator[Planted]:
    with (
        router_on(database, tmp_path, GUARD_WINDOW_SECONDS=WINDOW_SECONDS) as router,
        planting(database, router) as made,
    ):
        pair = one_of_each_side(add_users(database, 20))[0]
        for user in pair:
            made.add(user, [made.unit() for _ in range(6)])
        made.settle_down()
        yield made


def users(planted: Planted) -> list[int]:
    return sorted(planted.held[Store.FAISS])


def poison(planted: Planted) -> None:
    """Pgvector has lost everything, and nobody was told."""
    for user in users(planted):
        planted.gone(Store.PGVECTOR, user, {chunk.document_id for chunk in planted.held[Store.FAISS][user].values()})


def a_window_of_traffic(planted: Planted) -> list[Cause]:
    """A window passes, and in the next one is as much traffic as is needed to say anything."""
    planted.pass_by(WINDOW_SECONDS)
    asked = [users(planted)[number % 2] for number in range(LEAST)]
    causes = [planted.compare(user, planted.unit()) for user in asked]
    planted.router.refresh()
    return causes


def transitions(planted: Planted) -> list[dict[str, Any]]:
    with planted.database.connect() as connection:
        cursor = connection.execute(TRANSITIONS)
        names = [column.name for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor]


def by_the_guard(planted: Planted) -> list[tuple[str, int]]:
    return [(each["stage"], each["read_percent"]) for each in transitions(planted) if each["actor"] == "guard"]


# -- when, and whereto


@pytest.mark.parametrize(
    ("stage", "percent", "back"),
    [
        (Stage.SHADOW, 0, (Stage.DUALWRITE, 0)),
        (Stage.LIVE, 50, (Stage.LIVE, 0)),
        (Stage.LIVE, 100, (Stage.LIVE, 0)),
    ],
)
def test_a_poisoned_rollout_is_taken_back_in_the_third_window_and_once(
    planted: Planted, stage: Stage, percent: int, back: tuple[Stage, int]
) -> None:
    planted.to(stage, percent)
    poison(planted)
    for _ in range(WINDOWS - 1):
        assert set(a_window_of_traffic(planted)) <= {Cause.MISSING_IN_PGVECTOR}
        assert planted.router.guard.look() is None
    a_window_of_traffic(planted)
    number = planted.router.guard.look()
    assert number == transitions(planted)[-1]["id"]
    assert by_the_guard(planted) == [back]
    planted.router.refresh()
    assert {planted.router.flags.view().serving(user) for user in users(planted)} == {Store.FAISS}
    for _ in range(WINDOWS):
        if back[0] is Stage.LIVE:
            a_window_of_traffic(planted)
        assert planted.router.guard.look() is None
    assert by_the_guard(planted) == [back]


def test_failing_reads_take_rampdown_back_to_live_at_0(planted: Planted) -> None:
    """No read is shadowed in this stage: what tells is how many had to fall back."""
    planted.to(Stage.RAMPDOWN, 100)
    planted.as_owner("REVOKE SELECT ON document_chunks FROM victus_app")
    for window in range(WINDOWS):
        planted.pass_by(WINDOW_SECONDS)
        for number in range(LEAST):
            assert planted.router.search(users(planted)[number % 2], planted.unit(), 3)
        planted.router.refresh()
        planted.router.refresh()
        assert (planted.router.guard.look() is not None) == (window == WINDOWS - 1)
    assert by_the_guard(planted) == [(Stage.LIVE, 0)]
    assert transitions(planted)[-1]["reason"] == f"for 3 windows: fallbacks {LEAST} of {LEAST}"


def test_a_chunk_of_another_user_takes_it_back_at_once(planted: Planted) -> None:
    planted.to(Stage.LIVE, 50)
    one, other = users(planted)
    chunk = next(iter(planted.held[Store.FAISS][one].values()))
    assert planted.router.guard.look() is None
    planted.give_away(chunk, one, other)
    assert planted.compare(one, planted.near(chunk)) is Cause.OWNER_MISMATCH
    assert planted.router.guard.look() is not None
    assert by_the_guard(planted) == [(Stage.LIVE, 0)]
    assert planted.router.guard.look() is None, "the evidence was of the transition before"


@pytest.mark.parametrize("stage", [Stage.OFF, Stage.DUALWRITE, Stage.LIVE, Stage.COMPLETE])
def test_where_nobody_is_read_from_pgvector_or_faiss_is_written_no_more_it_does_nothing(
    planted: Planted, stage: Stage
) -> None:
    planted.to(stage)
    planted.as_owner(LEAKS, WINDOW_SECONDS)
    before = transitions(planted)
    assert planted.router.guard.look() is None
    assert transitions(planted) == before


def test_what_lies_longer_ago_than_three_windows_is_forgotten(planted: Planted) -> None:
    planted.to(Stage.LIVE, 50)
    poison(planted)
    for _ in range(WINDOWS):
        a_window_of_traffic(planted)
    planted.pass_by(WINDOW_SECONDS)
    assert planted.router.guard.look() is None


def test_good_traffic_is_left_alone(planted: Planted) -> None:
    planted.to(Stage.LIVE, 50)
    for _ in range(WINDOWS):
        assert set(a_window_of_traffic(planted)) == {Cause.MATCH}
        assert planted.router.guard.look() is None
    assert by_the_guard(planted) == []


# -- who acts, and who stops it


def test_of_two_guards_that_decide_at_once_one_acts(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready(planted)
    with another_backend(planted, tmp_path) as other, ThreadPoolExecutor(2) as pool:
        both = threading.Barrier(2)

        def together(*arguments: Any, **options: Any) -> int:
            both.wait(30)
            return step(*arguments, **options)

        monkeypatch.setattr("src.tools.rag_tools.migration.guard.step", together)
        with capture_logs() as logs:
            found = [pool.submit(each.guard.look) for each in (planted.router, other)]
            numbers = [future.result(60) for future in found]
    assert sorted(number is None for number in numbers) == [False, True]
    assert by_the_guard(planted) == [(Stage.LIVE, 0)]
    (refused,) = [each for each in logs if each["event"] == "guard.step.refused"]
    assert "guard was first" in refused["error"]


def test_it_waits_until_every_process_has_arrived_and_then_acts(planted: Planted, tmp_path: Path) -> None:
    with another_backend(planted, tmp_path) as late:
        ready(planted)
        with capture_logs() as logs:
            assert planted.router.guard.look() is None
        assert [each["event"] for each in logs] == ["guard.step.refused"]
        assert "is not acted on yet by process" in logs[0]["error"]
        late.refresh()
        late.refresh()
        assert planted.router.guard.look() is not None
    assert by_the_guard(planted) == [(Stage.LIVE, 0)]


def test_a_hold_stops_it_and_resuming_lets_it_act(planted: Planted) -> None:
    ready(planted)
    with planted.database.connect(Role.ROLLOUT) as connection:
        hold.set_held(connection, True, actor="ada", reason="looking into it")
    with capture_logs() as logs:
        assert planted.router.guard.look() is None
    (held,) = [each for each in logs if each["event"] == "guard.step.held"]
    assert (held["held_by"], held["because"]) == ("ada", "looking into it")
    assert by_the_guard(planted) == []
    with planted.database.connect(Role.ROLLOUT) as connection:
        hold.set_held(connection, False, actor="ada", reason="found it")
    assert planted.router.guard.look() is not None


def test_backends_take_a_poisoned_ramp_back_while_it_is_used(database: Any, tmp_path: Path) -> None:
    """With every loop running in two backends, and nobody who looks."""
    loops: dict[str, Any] = {"POLL_SECONDS": 0.05, "GUARD_SECONDS": 0.05, "GUARD_WINDOW_SECONDS": 0.5}
    with (
        router_on(database, tmp_path) as quiet,
        planting(database, quiet) as made,
        router_on(database, tmp_path, loops=True, **loops) as one,
        router_on(database, tmp_path, loops=True, **loops) as two,
        ThreadPoolExecutor(2) as pool,
    ):
        pair = one_of_each_side(add_users(database, 20))[0]
        for user in pair:
            made.add(user, [made.unit() for _ in range(6)])
        made.settle_down()
        quiet.flags.leave()
        made.to(Stage.LIVE, 50)
        poison(made)
        quiet.flags.leave()
        over = threading.Event()
        asking = [pool.submit(ask_until, over, router, pair, made.unit()) for router in (one, two)]
        wait_until(database, "EXISTS (SELECT FROM rollout_transitions WHERE actor = 'guard')")
        # Every process reads FAISS for everybody now, and still looks.
        wait_until(
            database,
            "(SELECT count(*) FROM rollout_instances"
            " WHERE transition_id = (SELECT max(id) FROM rollout_transitions)) = 2",
        )
        over.set()
        assert sum(future.result(60) for future in asking) > WINDOWS * LEAST
        assert by_the_guard(made) == [(Stage.LIVE, 0)]


# -- what is left to be read


def test_the_transition_names_the_reason_and_holds_the_evidence(planted: Planted) -> None:
    ready(planted)
    planted.router.guard.look()
    row = transitions(planted)[-1]
    assert (row["actor"], row["stage"], row["read_percent"], row["read_threshold"]) == ("guard", "live", 0, 0.0)
    assert row["reason"] == f"for 3 windows: agreement 0.00% of {LEAST}"
    assert [window["comparisons"] for window in row["evidence"]["guard"]] == [LEAST] * WINDOWS
    assert [window["agreements"] for window in row["evidence"]["guard"]] == [0] * WINDOWS
    assert row["evidence"]["limits"]["agreement"] == Limits().agreement


def test_log_status_and_metrics_show_it(planted: Planted, tmp_path: Path) -> None:
    ready(planted)
    with capture_logs() as logs:
        number = planted.router.guard.look()
    planted.router.refresh()
    planted.router.refresh()
    (done,) = [each for each in logs if each["event"] == "guard.step.done"]
    assert (done["transition"], done["to"], done["log_level"]) == (number, "live at 0 percent", "error")
    assert "agreement" in done["reason"]
    with open_pool(planted.database.conninfo(Role.ROLLOUT), 2, name="status") as pool:
        found = status(Control(pool, PRODUCTION, HashEmbeddings()))
    assert (found["stage"], found["read_percent"], found["transition"]) == ("live", 0, number)
    assert (found["transitions"][0]["actor"], found["transitions"][0]["reason"]) == ("guard", done["reason"])
    assert sample("rag_read_percent") == 0
    assert sample("rag_transition") == number
    assert sample("rag_stage", stage="live") == 1
    assert sample("rag_gate_value", criterion="agreements") == 0
    assert sample("rag_gate_value", criterion="comparisons") == LEAST
    report = planted.router.status()
    assert (report["ready"], report["transition"], report["read_percent"]) == (True, number, 0)


# -- parts


def ready(planted: Planted) -> None:
    """Live at 50, poisoned for three windows: the next look acts."""
    planted.to(Stage.LIVE, 50)
    poison(planted)
    for _ in range(WINDOWS):
        a_window_of_traffic(planted)


@contextmanager
def another_backend(planted: Planted, directory: Path) -> Iterator[Router]:
    with router_on(planted.database, directory, GUARD_WINDOW_SECONDS=WINDOW_SECONDS) as router:
        yield router


def ask_until(over: threading.Event, router: Router, users: tuple[int, ...], question: Any) -> int:
    asked = 0
    while not over.is_set():
        router.search(users[asked % len(users)], question, 3)
        asked += 1
    return asked


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)
