"""Facts on PostgreSQL: writers of one fact take turns, and those of two users do not wait."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event, select, text, update

import src.database
from src.models import User, UserFact
from src.tools.memory_tools import _hold_user, recall_fact, remember_fact
from src.utils.context import acting_as
from tests.support.database import Database

ADA, BOB = 1, 2
KEYS = [f"key {n}" for n in range(10)]  # a race is lost once in a while, not each time


@pytest.fixture(autouse=True)
def users(configured_database: Database) -> None:
    with src.database.SessionLocal.begin() as db:
        db.add_all(User(id=id_, email=f"{id_}@example.org", username=str(id_)) for id_ in (ADA, BOB))


def remember(key: str, value: str) -> str:
    with acting_as(ADA):
        return remember_fact(key, value)


def test_two_writers_of_one_new_fact_leave_one_row() -> None:
    both_hold_a_connection = threading.Barrier(2)

    def meet(*_: object) -> None:
        both_hold_a_connection.wait(timeout=30)

    event.listen(src.database.engine, "checkout", meet)
    with ThreadPoolExecutor(2) as threads:
        for key in KEYS:
            answers = sorted(threads.map(remember, (key, key), ("Graz", "Oslo")))
            assert [answer.split()[0] for answer in answers] == ["Remembered", "Updated"]
    event.remove(src.database.engine, "checkout", meet)
    with src.database.SessionLocal() as db:
        assert list(db.scalars(select(UserFact.key).order_by(UserFact.id))) == KEYS


def test_a_user_does_not_wait_for_another_ones_writer() -> None:
    with src.database.SessionLocal() as holds_bob:
        holds_bob.execute(update(User).where(User.id == BOB).values(full_name="Bob"))
        assert remember("city", "Graz").startswith("Remembered")


def test_who_reads_or_uploads_does_not_wait_for_a_writer_of_facts() -> None:
    """The writer's lock on the user leaves room for reads and for rows that refer to the user."""
    with src.database.SessionLocal() as writes, src.database.SessionLocal() as uploads:
        _hold_user(writes, ADA)
        uploads.execute(text("SET LOCAL lock_timeout = '1s'"))
        uploads.execute(text("INSERT INTO documents (user_id, filename, path) VALUES (1, 'a', 'uploads/a')"))
        with acting_as(ADA):
            assert recall_fact("city").startswith("Fact not found")
