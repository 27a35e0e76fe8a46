"""The situations in which on-call opens the RUNBOOK at a question, each made on a filled installation.

All begin in stage `dualwrite` with both stores filled; a situation ends when its block of `with` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from src.tools.rag_tools.migration.causes import Cause
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import Stage, Store
from tests.support.backend import away
from tests.support.planted import Planted, approximate_index, planting
from tests.support.routers import router_on, write_note
from tests.support.seeds import restore
from tests.support.small import Small

ADA, BEN = 1, 2
# In each of the guard's last three windows.
LEAKS = """
INSERT INTO shadow_diffs (at, transition_id, stage, user_id, cohort, cause, served_by, served_ms, shadow_ms,
                          fingerprint, event)
SELECT now() - make_interval(secs => 60 * w + 1), max(t.id), 'live', 1, 'small', 'missing_in_pgvector', 'faiss', 1, 1,
       '', '{}'
FROM rollout_transitions t, generate_series(0, 2) AS w, generate_series(1, 50) AS n GROUP BY w, n
"""
FAILED = """
UPDATE vector_ledger SET attempts = 6, last_error = 'OSError: [Errno 28] No space left on device'
WHERE store = 'pgvector' AND state = 'owed'
"""
STEP = """
INSERT INTO rollout_transitions (id, stage, read_percent, read_threshold, shadow_sample_rate, actor, reason)
SELECT max(id) + 1, %s, %s, %s, 1, 'ben', 'as agreed' FROM rollout_transitions
"""
SILENT = """
INSERT INTO rollout_instances (instance, host, pid, transition_id, seen_at)
VALUES ('3f2a91c0-5b1d-4e6e-9a55-0c8f6f1d2b47', 'app-2', 4711, 1, clock_timestamp() - interval '40 seconds')
"""

Situation = Callable[[Small], AbstractContextManager[None]]


@contextmanager
def planted_on(made: Small, *steps: tuple[Stage, int]) -> Iterator[Planted]:
    """A backend process on the installation, ada and ben with a document each more; gone when `with` ends."""
    with router_on(made.database, made.folder) as router, planting(made.database, router) as planted:
        for user in (ADA, BEN):
            planted.add(user, [planted.unit() for _ in range(3)])
        planted.settle_down()
        for stage, percent in steps:
            planted.as_owner(STEP, stage, percent, percent)
            planted.router.refresh()
            planted.router.refresh()
        yield planted


@contextmanager
def as_it_is(_: Small) -> Iterator[None]:
    yield


@contextmanager
def a_leak(made: Small) -> Iterator[None]:
    with planted_on(made, (Stage.SHADOW, 0), (Stage.LIVE, 50)) as planted:
        chunk, *_ = planted.held[Store.FAISS][ADA].values()
        planted.give_away(chunk, ADA, BEN)
        assert planted.compare(ADA, planted.near(chunk)) is Cause.OWNER_MISMATCH
    yield


@contextmanager
def something_missing(made: Small) -> Iterator[None]:
    with planted_on(made, (Stage.SHADOW, 0)) as planted:
        chunk, *_ = planted.held[Store.FAISS][ADA].values()
        planted.gone(Store.PGVECTOR, ADA, [chunk.document_id])
        assert planted.compare(ADA, planted.near(chunk)) is Cause.MISSING_IN_PGVECTOR
    yield


@contextmanager
def an_index(made: Small) -> Iterator[None]:
    with planted_on(made, (Stage.SHADOW, 0)) as planted, approximate_index(planted):
        chunk, *_ = planted.held[Store.FAISS][ADA].values()
        assert planted.compare(ADA, planted.near(chunk)) is Cause.APPROXIMATE
    yield


@contextmanager
def little_traffic(made: Small) -> Iterator[None]:
    with planted_on(made, (Stage.SHADOW, 0), (Stage.LIVE, 10)) as planted:
        for user in (ADA, BEN):
            chunk, *_ = planted.held[Store.FAISS][user].values()
            assert planted.compare(user, planted.near(chunk)) is Cause.MATCH
    yield


@contextmanager
def the_guard_acted(made: Small) -> Iterator[None]:
    with planted_on(made, (Stage.SHADOW, 0), (Stage.LIVE, 50)) as planted:
        planted.as_owner(LEAKS)
        planted.router.refresh()
        assert planted.router.guard.look() is not None
    yield


@contextmanager
def a_debt(made: Small) -> Iterator[None]:
    with planted_on(made, (Stage.SHADOW, 0)) as planted:
        planted.owe(Store.PGVECTOR, ADA, {chunk.document_id for chunk in planted.held[Store.FAISS][ADA].values()})
        planted.as_owner(FAILED)
    yield


@contextmanager
def lost_commits(made: Small) -> Iterator[None]:
    with router_on(made.database, made.folder) as router:
        kept, *_ = (_upload(router, made, name) for name in ("kept.md", "lost.md"))
        restore(made.database, kept)
    yield


@contextmanager
def a_silent_process(made: Small) -> Iterator[None]:
    with made.database.connect(autocommit=True) as connection:
        connection.execute(SILENT)
    yield


@contextmanager
def somebody_stepped(made: Small) -> Iterator[None]:
    with planted_on(made, (Stage.SHADOW, 0)):
        pass
    yield


@contextmanager
def no_postgres(made: Small) -> Iterator[None]:
    with away(made.database):
        yield


def _upload(router: Router, made: Small, name: str) -> int:
    document_id = router.receive(ADA, write_note(made.folder, name, f"text of {name}"), name)
    router.index(document_id)
    return document_id


SITUATIONS: dict[str, Situation] = {
    "A user sees another's document": a_leak,
    "A diff says approximate": an_index,
    "Comparisons differ and nothing excuses it": something_missing,
    "Too few comparisons": little_traffic,
    "Owed entries grow": a_debt,
    "pgvector is slow": little_traffic,
    "The guard took us back": the_guard_acted,
    "A user misses a document": as_it_is,
    "The disk is full": a_debt,
    "PostgreSQL is away": no_postgres,
    "PostgreSQL failed over": lost_commits,
    "A worker is stuck on the old stage": a_silent_process,
    "Two of us are advancing": somebody_stepped,
    "We must go back to the old release": as_it_is,
}
