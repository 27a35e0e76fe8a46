"""Faults planted in real stores are told apart: the confusion of every cause with every other, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from src.tools.rag_tools.migration.causes import Cause, Evidence
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.store import Vector
from tests.support.planted import Planted, approximate_index, at_cosine, one_of_each_side, planting
from tests.support.routers import add_users, router_on

pytestmark = pytest.mark.migration

ENOUGH = 50
REQUIRED = 0.99
SAME = frozenset({Cause.MATCH, Cause.TIE})
DOCUMENTS, CHUNKS, FAULTY = 5, 30, 3
PAIRS = 26
TIMEOUT_SECONDS = 0.2

Question = tuple[int, Vector]
"""A user and what they ask."""


class Confusion:
    """How often each true cause was taken for which; `match` and `tie` are one where nothing was planted."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[Cause | None, Cause]] = Counter()

    def add(self, true: Cause | None, found: Cause) -> None:
        self.counts[true, found] += 1

    def check(self, cause: Cause) -> None:
        right = self.counts[cause, cause]
        true = sum(count for (each, _), count in self.counts.items() if each is cause)
        found = sum(count for (_, each), count in self.counts.items() if each is cause)
        assert true >= ENOUGH, f"{cause}: only {true} differences planted"
        assert right / true >= REQUIRED, f"{cause}: recall {right} of {true}; {self.counts}"
        assert right / found >= REQUIRED, f"{cause}: precision {right} of {found}; {self.counts}"

    def unexplained(self) -> dict[Cause, int]:
        """What was said of questions to which both stores have the same answer."""
        return {found: count for (true, found), count in self.counts.items() if true is None and found not in SAME}


@pytest.fixture
def planted(database: Any, tmp_path: Path) -> Iterator[Planted]:
    """A router in `live` at 50 percent, so that either store serves half of the users and is checked by the other."""
    with (
        router_on(database, tmp_path, SHADOW_TIMEOUT_SECONDS=TIMEOUT_SECONDS) as router,
        planting(database, router) as made,
    ):
        made.to(Stage.DUALWRITE)
        made.to(Stage.SHADOW)
        made.to(Stage.LIVE, 50)
        yield made


def test_planted_faults_are_told_apart_and_what_nobody_touched_is_the_same(planted: Planted) -> None:
    found = Confusion()
    pairs = iter(one_of_each_side(add_users(planted.database, 60)))
    groups: list[tuple[Cause | None, list[Question]]] = [
        (None, ordinary(planted, fill(planted, *next(pairs)))),
        *(
            (cause, fault(planted, *fill(planted, *next(pairs))))
            for cause, fault in (
                (Cause.MISSING_IN_PGVECTOR, gone_from_pgvector),
                (Cause.MISSING_IN_FAISS, gone_from_faiss),
                (Cause.STALE, owed_to_pgvector),
                (Cause.STALE, owed_to_faiss),
                (Cause.CONTENT_DRIFT, content_changed),
                (Cause.VECTOR_DRIFT, vector_changed),
                (Cause.OWNER_MISMATCH, owner_swapped),
            )
        ),
        (Cause.TIE, pairs_at(planted, *next(pairs), apart=4e-6)),
        (Cause.REORDER, pairs_at(planted, *next(pairs), apart=4e-5)),
    ]
    planted.settle_down()
    for cause, questions in groups:
        for user, question in questions:
            differs = planted.differs(user, question)
            found.add(cause if differs else None, planted.compare(user, question))
    clean = ordinary(planted, fill(planted, *next(pairs)))
    planted.settle_down()
    with pgvector_refuses(planted):
        for user, question in clean:
            found.add(Cause.ERROR, planted.compare(user, question))
    for cause in compare_while_locked(planted, clean):
        found.add(Cause.TIMEOUT, cause)
    for cause in set(Cause) - {Cause.MATCH, Cause.APPROXIMATE}:
        found.check(cause)
    assert found.unexplained() == {}
    assert found.counts[None, Cause.MATCH] >= ENOUGH
    assert found.counts[Cause.APPROXIMATE, Cause.APPROXIMATE] == 0
    assert recorded(planted) == Counter(said for _, said in found.counts.elements())


def test_an_approximate_index_is_told_from_what_is_lacking(planted: Planted) -> None:
    users = fill(planted, *one_of_each_side(add_users(planted.database, 20))[0])
    questions = ordinary(planted, users)
    planted.settle_down()
    with approximate_index(planted):
        through_the_index = Counter(planted.compare(user, question) for user, question in questions)
    without_it = Counter(planted.compare(user, question) for user, question in questions)
    assert through_the_index == {Cause.APPROXIMATE: len(questions)}
    assert len(questions) >= ENOUGH
    assert without_it == {Cause.MATCH: len(questions)}


def test_what_was_settled_between_the_two_reads_is_stale_and_then_the_same(planted: Planted) -> None:
    user, _ = one_of_each_side(add_users(planted.database, 20))[0]
    (chunk, *_) = planted.add(user, [planted.unit() for _ in range(5)])
    planted.settle_down()
    question = planted.near(chunk)
    before = planted.ask(user, question)
    planted.add(user, [question])
    assert planted.router.shadow.compare(before) is Cause.STALE
    assert planted.compare(user, question) is Cause.MATCH


def test_a_leak_that_was_slow_to_show_is_still_a_leak(planted: Planted) -> None:
    user, other = one_of_each_side(add_users(planted.database, 20))[0]
    mine, _ = (planted.add(each, [planted.unit() for _ in range(5)]) for each in (user, other))
    planted.settle_down()
    seconds = count()
    planted.router.shadow.clock = lambda: float(next(seconds))
    assert planted.compare(user, planted.near(mine[0])) is Cause.TIMEOUT
    planted.give_away(mine[0], user, other)
    assert planted.compare(user, planted.near(mine[0])) is Cause.OWNER_MISMATCH


def test_a_faiss_directory_that_cannot_be_read_is_recorded_as_an_error(planted: Planted) -> None:
    _, user = one_of_each_side(add_users(planted.database, 20))[0]
    (chunk, *_) = planted.add(user, [planted.unit() for _ in range(5)])
    planted.settle_down()
    read = planted.ask(user, planted.near(chunk))
    assert read.served_by is Store.PGVECTOR
    planted.router.stores.faiss.journal.close()
    assert planted.router.shadow.compare(read) is Cause.ERROR
    assert recorded(planted) == {Cause.ERROR: 1}


@pytest.mark.timeout(60)
def test_evidence_that_cannot_be_had_in_time_is_a_time_out(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    user, _ = one_of_each_side(add_users(planted.database, 20))[0]
    (chunk, *_) = planted.add(user, [planted.unit() for _ in range(5)])
    planted.settle_down()
    planted.gone(Store.PGVECTOR, user, [chunk.document_id])
    read = planted.ask(user, planted.near(chunk))
    witness = planted.router.shadow.witness
    with planted.database.connect() as locker:
        evidence = witness.evidence

        def locked(*arguments: Any) -> Evidence:
            locker.execute("LOCK TABLE document_chunks IN ACCESS EXCLUSIVE MODE")
            return evidence(*arguments)

        monkeypatch.setattr(witness, "evidence", locked)
        assert planted.router.shadow.compare(read) is Cause.TIMEOUT


# -- what is planted, and the questions that then may meet it


def fill(planted: Planted, *users: int) -> tuple[int, ...]:
    for user in users:
        planted.add(user, [planted.unit() for _ in range(CHUNKS)], per_document=CHUNKS // DOCUMENTS)
    return users


def ordinary(planted: Planted, users: tuple[int, ...]) -> list[Question]:
    """A question near every chunk that FAISS has of these users."""
    return [(user, planted.near(chunk)) for user in users for chunk in planted.held[Store.FAISS][user].values()]


def documents_of(planted: Planted, user: int) -> list[int]:
    """Three in five of the user's."""
    held = planted.held[Store.FAISS][user].values()
    return sorted({chunk.document_id for chunk in held})[:FAULTY]


def gone_from_pgvector(planted: Planted, *users: int) -> list[Question]:
    """Five percent of all chunks that are there."""
    questions = ordinary(planted, users)
    for user in users:
        planted.gone(Store.PGVECTOR, user, documents_of(planted, user))
    return questions


def gone_from_faiss(planted: Planted, *users: int) -> list[Question]:
    questions = ordinary(planted, users)
    for user in users:
        planted.gone(Store.FAISS, user, documents_of(planted, user))
    return questions


def owed_to_pgvector(planted: Planted, *users: int) -> list[Question]:
    questions = ordinary(planted, users)
    for user in users:
        planted.owe(Store.PGVECTOR, user, documents_of(planted, user))
    return questions


def owed_to_faiss(planted: Planted, *users: int) -> list[Question]:
    questions = ordinary(planted, users)
    for user in users:
        planted.owe(Store.FAISS, user, documents_of(planted, user))
    return questions


def content_changed(planted: Planted, *users: int) -> list[Question]:
    questions = ordinary(planted, users)
    for user in users:
        for chunk in list(planted.held[Store.FAISS][user].values())[: CHUNKS * FAULTY // DOCUMENTS]:
            planted.rewrite(chunk, user)
    return questions


def vector_changed(planted: Planted, *users: int) -> list[Question]:
    """Half of them a little, which leaves them among the first; half of them wholly, which does not."""
    questions = ordinary(planted, users)
    for user in users:
        for number, chunk in enumerate(list(planted.held[Store.FAISS][user].values())[: CHUNKS // 2]):
            another = planted.near(chunk, 0.3) if number % 2 else planted.unit()
            planted.turn(chunk, user, another)
            questions.append((user, planted.near(planted.held[Store.PGVECTOR][user][chunk.id])))
    return questions


def owner_swapped(planted: Planted, *users: int) -> list[Question]:
    """Asked by those who lost them and by those who got them."""
    questions = ordinary(planted, users)
    for user, other in (users, users[::-1]):
        for chunk in list(planted.held[Store.FAISS][user].values())[: CHUNKS // 4]:
            planted.give_away(chunk, user, other)
            questions.append((other, planted.near(chunk)))
    return questions


def pairs_at(planted: Planted, *users: int, apart: float) -> list[Question]:
    """Two chunks so near to each other that a change too small to be seen in either makes them change places."""
    near, far = 0.9 + apart / 2, 0.9 - apart / 2
    questions: list[Question] = []
    for user in users:
        pairs = [(planted.unit(), planted.unit(), planted.unit()) for _ in range(PAIRS)]
        vectors = [at_cosine(asked, *each) for asked, one, other in pairs for each in ((near, one), (far, other))]
        swapped = [at_cosine(asked, *each) for asked, one, other in pairs for each in ((far, one), (near, other))]
        for chunk, vector in zip(planted.add(user, vectors, per_document=PAIRS), swapped, strict=True):
            planted.turn(chunk, user, vector)
        questions += [(user, asked) for asked, _, _ in pairs]
    return questions


# -- comparing


@contextmanager
def pgvector_refuses(planted: Planted) -> Iterator[None]:
    planted.as_owner("REVOKE SELECT ON document_chunks FROM victus_app")
    try:
        yield
    finally:
        planted.as_owner("GRANT SELECT ON document_chunks TO victus_app")


def compare_while_locked(planted: Planted, questions: list[Question]) -> list[Cause]:
    """Questions that FAISS answers, compared while nobody can read pgvector's table."""
    view = planted.router.flags.view()
    reads = [planted.ask(user, each) for user, each in questions if view.serving(user) is Store.FAISS]
    assert all(read.served_by is Store.FAISS for read in reads)
    with planted.database.connect() as locker, ThreadPoolExecutor(3) as pool:
        locker.execute("LOCK TABLE document_chunks IN ACCESS EXCLUSIVE MODE")
        found = list(pool.map(planted.router.shadow.compare, reads + reads))
        locker.rollback()
    return found


def recorded(planted: Planted) -> Counter[Cause]:
    with planted.database.connect() as connection:
        return Counter(Cause(row[0]) for row in connection.execute("SELECT cause FROM shadow_diffs"))
