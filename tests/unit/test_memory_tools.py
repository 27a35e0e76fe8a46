"""Facts: the wording that the agent relies on, whose facts they are, and two writers at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock, Mock, patch

import pytest
from sqlalchemy import Engine, create_engine, event, insert, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import sessionmaker

from src.database import Base
from src.models import User, UserFact
from src.tools.memory_tools import recall_fact, remember_fact
from src.utils.context import acting_as

ADA, BOB = 1, 2
KEYS = [f"key {n}" for n in range(10)]  # a race is lost once in a while, not each time


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path}/victus.db")
    Base.metadata.create_all(engine)
    with patch("src.tools.memory_tools.SessionLocal", sessionmaker(engine, autoflush=False)) as new:
        with new.begin() as db:
            db.add_all(User(id=id_, email=f"{id_}@example.org", username=str(id_)) for id_ in (ADA, BOB))
        yield engine
    engine.dispose()


@pytest.fixture
def mock_db() -> Iterator[Mock]:
    """What callers do: the module's SessionLocal patched, its session a mock."""
    with patch("src.tools.memory_tools.SessionLocal") as factory:
        db = Mock()
        factory.return_value.__enter__ = Mock(return_value=db)
        factory.return_value.__exit__ = Mock(return_value=None)
        yield db


def facts(engine: Engine) -> list[tuple[str, str, str | None]]:
    with engine.connect() as connection:
        rows = connection.execute(select(UserFact.user_id, UserFact.key, UserFact.value).order_by(UserFact.id))
        return [(user_id, key, value) for user_id, key, value in rows]


def test_a_new_fact_is_added_through_the_patched_session(mock_db: Mock) -> None:
    mock_db.query.return_value.filter.return_value.first.return_value = None
    with acting_as(ADA):
        answer = remember_fact("favorite_color", "blue")
    assert answer == "Remembered new fact: 'favorite_color' set to 'blue'."
    added = mock_db.add.call_args.args[0]
    assert (added.user_id, added.key, added.value) == ("1", "favorite_color", "blue")
    mock_db.commit.assert_called_once()


def test_a_known_fact_is_updated_through_the_patched_session(mock_db: Mock) -> None:
    known = Mock(value="red")
    mock_db.query.return_value.filter.return_value.first.return_value = known
    with acting_as(ADA):
        answer = remember_fact("favorite_color", "blue")
    assert answer == "Updated fact 'favorite_color' to 'blue'."
    assert known.value == "blue"
    mock_db.add.assert_not_called()
    mock_db.commit.assert_called_once()


def test_a_fact_is_recalled_as_it_was_last_stored(engine: Engine) -> None:
    with acting_as(ADA):
        assert remember_fact("city", "Graz") == "Remembered new fact: 'city' set to 'Graz'."
        assert remember_fact("city", "Łódź 🎈") == "Updated fact 'city' to 'Łódź 🎈'."
        assert recall_fact("city") == "The stored fact for 'city' is: 'Łódź 🎈'"
    assert facts(engine) == [("1", "city", "Łódź 🎈")]


def test_an_update_says_when_it_happened_even_if_the_value_stays(engine: Engine) -> None:
    updates: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda _c, _cu, sql, *_rest: updates.append(str(sql)))
    with acting_as(ADA):
        remember_fact("city", "Graz")
        updates.clear()
        remember_fact("city", "Graz")
    assert any("UPDATE user_facts" in sql and "last_updated" in sql for sql in updates)


def test_a_fact_nobody_stored_is_said_to_be_unknown(engine: Engine) -> None:
    with acting_as(ADA):
        assert recall_fact("city") == "Fact not found. I don't have a stored fact for 'city'."


def test_a_fact_is_nobody_elses(engine: Engine) -> None:
    with acting_as(ADA):
        remember_fact("city", "Graz")
    with acting_as(BOB):
        assert recall_fact("city").startswith("Fact not found.")
        assert remember_fact("city", "Oslo").startswith("Remembered new fact")
    assert facts(engine) == [("1", "city", "Graz"), ("2", "city", "Oslo")]


def test_of_duplicates_the_one_that_was_always_answered_with_is_answered_and_updated(
    engine: Engine,
) -> None:
    with engine.begin() as connection:
        connection.execute(
            insert(UserFact),
            [{"user_id": "1", "key": "city", "value": value} for value in ("Graz", "Oslo")],
        )
    with acting_as(ADA):
        assert recall_fact("city") == "The stored fact for 'city' is: 'Graz'"
        remember_fact("city", "Rome")
        assert recall_fact("city") == "The stored fact for 'city' is: 'Rome'"
    assert facts(engine) == [("1", "city", "Rome"), ("1", "city", "Oslo")]


@pytest.mark.parametrize(
    ("call", "begins"),
    [
        (lambda: remember_fact("city", "Graz"), "Error remembering fact: no user is set"),
        (lambda: recall_fact("city"), "Error recalling fact: no user is set"),
    ],
)
def test_without_an_identity_nothing_is_read_or_written(call: Callable[[], str], begins: str) -> None:
    with patch("src.tools.memory_tools.SessionLocal") as factory:
        assert call().startswith(begins)
    factory.assert_not_called()


def test_a_database_that_fails_is_told_as_text() -> None:
    away = MagicMock(side_effect=OperationalError("SELECT 1", {}, Exception("the disk is full")))
    with patch("src.tools.memory_tools.SessionLocal", away), acting_as(ADA):
        assert remember_fact("city", "Graz").startswith("Error remembering fact: ")
        assert "the disk is full" in recall_fact("city")


def test_two_writers_of_one_new_fact_leave_one_row(engine: Engine) -> None:
    both_hold_a_connection = threading.Barrier(2)
    event.listen(engine, "checkout", lambda *_: both_hold_a_connection.wait(timeout=30))
    with ThreadPoolExecutor(2) as threads:
        for key in KEYS:
            answers = sorted(threads.map(remember, (key, key), ("Graz", "Oslo")))
            assert [answer.split()[0] for answer in answers] == ["Remembered", "Updated"]
    unhindered = create_engine(engine.url)
    assert [key for _user, key, _value in facts(unhindered)] == KEYS
    unhindered.dispose()


def remember(key: str, value: str) -> str:
    with acting_as(ADA):
        return remember_fact(key, value)
