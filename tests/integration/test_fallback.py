"""Requests that the serving store fails: who answers in its place, who must not, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from src.tools.rag_tools.migration.breaker import FAILURES, REST_SECONDS
from src.tools.rag_tools.migration.flags import STALE_SECONDS, FlagsUnknownError
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.migration.targeting import bucket
from src.tools.rag_tools.store import Chunk, Hit, StoreError
from tests.support.backend import away
from tests.support.planted import K, Planted, one_of_each_side, planting
from tests.support.routers import add_users, router_on

pytestmark = pytest.mark.migration

SERVED_BY_PGVECTOR = [(Stage.LIVE, 50), (Stage.LIVE, 100), (Stage.RAMPDOWN, 100)]
SERVED_BY_FAISS_ALONE = [(Stage.OFF, 0), (Stage.DUALWRITE, 0), (Stage.SHADOW, 0)]
REVOKE = "REVOKE SELECT ON document_chunks FROM victus_app"
GRANT = "GRANT SELECT ON document_chunks TO victus_app"


class Clock:
    """Of the router alone; moves when told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def planted(database: Any, tmp_path: Path, clock: Clock) -> Iterator[Planted]:
    with router_on(database, tmp_path) as router, planting(database, router) as made:
        router.clock = router.flags.clock = router.breaker.clock = clock
        for user in one_of_each_side(add_users(database, 20))[0]:
            made.add(user, [made.unit() for _ in range(4)])
        made.settle_down()
        yield made
        router.pool.timeout = 10.0


@pytest.fixture
def user(planted: Planted) -> int:
    """Whom pgvector serves from 50 percent on."""
    return min(planted.held[Store.FAISS], key=bucket)


def chunks(planted: Planted, user: int) -> list[Chunk]:
    return list(planted.held[Store.FAISS][user].values())


def search(planted: Planted, user: int) -> list[Hit]:
    return planted.router.search(user, planted.near(chunks(planted, user)[0]), K)


def counted(planted: Planted) -> dict[str, int]:
    """What the fleet knows, once the process has reported."""
    planted.router.flags.poll()
    with planted.database.connect() as connection:
        return dict(connection.execute("SELECT name, sum(count)::integer FROM rollout_counts GROUP BY name").fetchall())


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


# -- pgvector fails


@pytest.mark.parametrize(("stage", "percent"), SERVED_BY_PGVECTOR)
def test_a_read_that_pgvector_fails_is_answered_from_faiss_and_counted(
    planted: Planted, user: int, stage: Stage, percent: int
) -> None:
    planted.to(stage, percent)
    planted.as_owner(REVOKE)
    before = metric("rag_fallbacks_total"), metric("rag_reads_total", store="pgvector", outcome="error")
    with capture_logs() as logs:
        hits = search(planted, user)
    assert hits[0].chunk_id == chunks(planted, user)[0].id
    assert len(hits) == K
    (used,) = [each for each in logs if each["event"] == "read.fallback.used"]
    assert (used["store"], used["user_id"]) == (Store.FAISS, user)
    after = metric("rag_fallbacks_total"), metric("rag_reads_total", store="pgvector", outcome="error")
    assert after == (before[0] + 1, before[1] + 1)
    assert counted(planted) == {"fallback": 1, "reads.faiss": 1}


def test_a_read_that_pgvector_answers_is_no_fallback(planted: Planted, user: int) -> None:
    planted.to(Stage.RAMPDOWN, 100)
    assert search(planted, user)
    assert counted(planted) == {"reads.pgvector": 1}


def test_where_faiss_is_no_longer_written_nothing_stands_in_for_pgvector(planted: Planted, user: int) -> None:
    planted.to(Stage.COMPLETE, 100)
    planted.as_owner(REVOKE)
    for _ in range(FAILURES + 1):
        with pytest.raises(StoreError, match="permission denied"):
            search(planted, user)
    assert counted(planted) == {}


@pytest.mark.parametrize("store", list(Store))
def test_there_is_no_fallback_where_either_store_owes_the_user(planted: Planted, user: int, store: Store) -> None:
    """What the one lacks the other must answer, or nobody: half an answer looks like a whole one."""
    planted.to(Stage.LIVE, 50)
    planted.owe(store, user, [chunks(planted, user)[0].document_id])
    planted.router.refresh()
    if store is Store.PGVECTOR:
        assert {hit.chunk_id for hit in search(planted, user)} <= {chunk.id for chunk in chunks(planted, user)}
        planted.router.stores.faiss.journal.close()
    else:
        planted.as_owner(REVOKE)
    with pytest.raises(StoreError):
        search(planted, user)
    assert "fallback" not in counted(planted)


def test_a_deleted_document_is_in_no_fallback_either(planted: Planted, user: int, database: Any) -> None:
    """Deleted by a process that died before it had told FAISS."""
    planted.to(Stage.RAMPDOWN, 100)
    gone = chunks(planted, user)[0]
    planted.as_owner("UPDATE documents SET status = 'deleted' WHERE id = %s", gone.document_id)
    planted.as_owner(
        "UPDATE vector_ledger SET wanted = 'absent', state = 'owed' WHERE document_id = %s", gone.document_id
    )
    planted.router.refresh()
    planted.as_owner(REVOKE)
    assert gone.document_id not in {hit.document_id for hit in search(planted, user)}


def test_what_is_compared_after_a_fallback_is_faiss_own_time(
    planted: Planted, user: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise pgvector's time-out would pass for a slow FAISS, and pgvector for as fast."""
    planted.to(Stage.LIVE, 50)
    pgvector = planted.router.stores.pgvector

    def slow(*_: Any) -> list[Hit]:
        clock.now += 5.0
        raise StoreError("PostgreSQL did not finish the search in time")

    monkeypatch.setattr(pgvector, "search", slow)
    read = planted.ask(user, planted.unit())
    assert (read.served_by, read.ended - read.begun) == (Store.FAISS, 0.0)


# -- and goes on failing


def test_after_five_failures_pgvector_is_not_tried_for_ten_seconds(
    planted: Planted, user: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.to(Stage.LIVE, 50)
    tried: list[int] = []
    search_pgvector = planted.router.stores.pgvector.search

    def counting(*arguments: Any) -> list[Hit]:
        tried.append(arguments[0])
        return search_pgvector(*arguments)

    monkeypatch.setattr(planted.router.stores.pgvector, "search", counting)
    planted.as_owner(REVOKE)
    for _ in range(FAILURES + 3):
        assert search(planted, user)
    assert len(tried) == FAILURES
    planted.as_owner(GRANT)
    clock.now += REST_SECONDS - 1
    assert search(planted, user)
    assert len(tried) == FAILURES, "it rests, though it would answer by now"
    clock.now += 1
    planted.router.refresh()
    assert planted.ask(user, planted.unit()).served_by is Store.PGVECTOR
    assert len(tried) == FAILURES + 1
    assert counted(planted) == {"fallback": FAILURES + 4, "reads.faiss": FAILURES + 4, "reads.pgvector": 1}


def test_while_pgvector_rests_it_is_still_asked_where_nobody_can_stand_in(
    planted: Planted, user: int, clock: Clock
) -> None:
    planted.to(Stage.LIVE, 50)
    for _ in range(FAILURES):
        planted.router.breaker.failed()
    planted.owe(Store.FAISS, user, [chunks(planted, user)[0].document_id])
    planted.router.refresh()
    hits = search(planted, user)
    assert hits[0].chunk_id in {chunk.id for chunk in planted.held[Store.PGVECTOR][user].values()}
    assert counted(planted) == {"reads.pgvector": 1}


def test_users_whom_faiss_serves_do_not_notice(planted: Planted, user: int) -> None:
    planted.to(Stage.LIVE, 50)
    planted.as_owner(REVOKE)
    (other,) = set(planted.held[Store.FAISS]) - {user}
    assert search(planted, other)
    assert counted(planted) == {"reads.faiss": 1}


# -- FAISS fails


@pytest.mark.parametrize(("stage", "percent"), [(Stage.DUALWRITE, 0), (Stage.SHADOW, 0), (Stage.LIVE, 0)])
def test_a_read_that_faiss_fails_is_answered_by_pgvector_where_it_holds_everything(
    planted: Planted, user: int, stage: Stage, percent: int
) -> None:
    planted.to(stage, percent)
    planted.router.stores.faiss.journal.close()
    hits = search(planted, user)
    assert hits[0].chunk_id == chunks(planted, user)[0].id
    assert counted(planted) == {"reads.pgvector": 1}, "a fallback on pgvector is no reason to go back"


def test_when_both_fail_the_request_does(planted: Planted, user: int) -> None:
    planted.to(Stage.LIVE, 50)
    planted.as_owner(REVOKE)
    planted.router.stores.faiss.journal.close()
    with pytest.raises(StoreError):
        search(planted, user)
    assert "reads.faiss" not in counted(planted)


# -- PostgreSQL is away


@pytest.mark.parametrize(("stage", "percent"), [*SERVED_BY_FAISS_ALONE, (Stage.LIVE, 50)])
def test_faiss_goes_on_serving_its_users_while_the_flags_are_fresh(
    planted: Planted, clock: Clock, user: int, stage: Stage, percent: int
) -> None:
    planted.to(stage, percent)
    (other,) = set(planted.held[Store.FAISS]) - {user}
    with away(planted.database):
        clock.now += STALE_SECONDS
        assert search(planted, other)[0].chunk_id == chunks(planted, other)[0].id


@pytest.mark.parametrize(("stage", "percent"), SERVED_BY_FAISS_ALONE)
def test_before_live_faiss_serves_on_flags_of_any_age(
    planted: Planted, clock: Clock, user: int, stage: Stage, percent: int
) -> None:
    planted.to(stage, percent)
    with away(planted.database):
        clock.now += 3_600.0
        assert search(planted, user)[0].chunk_id == chunks(planted, user)[0].id


@pytest.mark.parametrize("percent", [0, 50])
def test_in_live_faiss_does_not_serve_on_flags_older_than_30_seconds(
    planted: Planted, clock: Clock, user: int, percent: int
) -> None:
    """Somebody else may have moved the users on by now, and written where this process does not look."""
    planted.to(Stage.LIVE, percent)
    (other,) = set(planted.held[Store.FAISS]) - {user}
    with away(planted.database):
        clock.now += STALE_SECONDS + 0.1
        with pytest.raises(FlagsUnknownError, match="older than 30 seconds"):
            search(planted, other)


@pytest.mark.parametrize(("stage", "percent"), SERVED_BY_PGVECTOR)
def test_nor_does_it_stand_in_for_pgvector_then(
    planted: Planted, clock: Clock, user: int, stage: Stage, percent: int
) -> None:
    planted.to(stage, percent)
    planted.router.pool.timeout = 0.5
    with away(planted.database):
        assert search(planted, user)[0].chunk_id == chunks(planted, user)[0].id
        clock.now += STALE_SECONDS + 0.1
        with pytest.raises(StoreError):
            search(planted, user)
    planted.router.pool.timeout = 30.0
    planted.router.pool.check()
    assert counted(planted)["fallback"] == 1


def test_once_postgresql_is_back_so_are_the_users(planted: Planted, clock: Clock, user: int) -> None:
    planted.to(Stage.RAMPDOWN, 100)
    planted.router.pool.timeout = 0.5
    with away(planted.database):
        assert search(planted, user)
    planted.router.pool.timeout = 30.0
    clock.now += STALE_SECONDS + 0.1
    planted.router.pool.check()
    planted.router.refresh()
    assert search(planted, user)
    assert counted(planted) == {"fallback": 1, "reads.faiss": 1, "reads.pgvector": 1}
