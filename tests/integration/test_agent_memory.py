"""What the agent is told of a conversation: window and summary, on both databases, under contention."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker
from structlog.testing import capture_logs

from src.agent import conversations
from src.agent import memory as module
from src.agent.errors import ConversationNotFoundError
from src.agent.memory import FOLD_AT, WINDOW, Context, ConversationContextManager, Said
from src.database import SessionLocal
from src.models import ConversationMemory, Message, MessageRole, User
from tests.support.backend import sqlite_database

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Writer:
    """In place of the model: lists what it was given to fold in."""

    def __init__(self) -> None:
        self.calls: list[tuple[str | None, list[str]]] = []

    def __call__(self, summary: str | None, messages: Sequence[Said]) -> str:
        self.calls.append((summary, [one.content for one in messages]))
        return " ".join(([summary] if summary else []) + [one.content for one in messages])


@pytest.fixture(params=["postgresql", "sqlite"])
def sessions(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[sessionmaker[Session]]:
    if request.param == "postgresql":
        request.getfixturevalue("configured_database")
        yield SessionLocal
    else:
        with sqlite_database(tmp_path, monkeypatch):
            yield SessionLocal


@pytest.fixture
def ada(sessions: sessionmaker[Session]) -> int:
    with sessions.begin() as db:
        user = User(email="ada@example.org", username="ada")
        db.add(user)
        db.flush()
        return user.id


@pytest.fixture
def conversation(sessions: sessionmaker[Session], ada: int) -> str:
    with sessions() as db:
        return conversations.create(db, ada).id


@pytest.fixture
def say(sessions: sessionmaker[Session], ada: int, conversation: str) -> Callable[..., None]:
    """Adds messages of those numbers through the code that the service uses."""

    def say(*numbers: int) -> None:
        with sessions() as db:
            for number in numbers:
                conversations.add_message(db, ada, conversation, MessageRole.USER, str(number))

    return say


def plant(
    sessions: sessionmaker[Session], user: int, conversation: str, rows: Sequence[tuple[str, str, object]]
) -> None:
    """Messages as the legacy release left them: (id, content, created_at)."""
    with sessions.begin() as db:
        for id_, content, at in rows:
            message = Message(
                id=id_, conversation_id=conversation, user_id=user, role="user", content=content, created_at=at
            )  # fmt: skip
            db.add(message)
            if at is None:
                db.flush()
                db.execute(update(Message).where(Message.id == id_).values(created_at=None))


def context(sessions: sessionmaker[Session], user: int, conversation: str, writer: Writer | None = None) -> Context:
    with sessions() as db:
        owner = db.get_one(User, user)
        return ConversationContextManager(db, owner, conversation, writer or Writer()).get_context()


def stored(sessions: sessionmaker[Session], conversation: str) -> tuple[int, str | None, str | None]:
    with sessions() as db:
        row = db.scalars(select(ConversationMemory).where(ConversationMemory.conversation_id == conversation)).one()
        return row.summary_version, row.summary_text, row.summarized_until_message_id


def contents(found: Context) -> list[str]:
    return [one.content for one in found.messages]


def numbers(first: int, last: int) -> list[str]:
    return [str(number) for number in range(first, last + 1)]


def test_a_short_conversation_is_given_whole(
    sessions: sessionmaker[Session], ada: int, conversation: str, say: Callable[..., None]
) -> None:
    say(1, 2, 3)
    found = context(sessions, ada, conversation)
    assert (found.summary, contents(found)) == (None, ["1", "2", "3"])


def test_until_eight_have_fallen_out_of_the_window_nothing_is_summarised(
    sessions: sessionmaker[Session], ada: int, conversation: str, say: Callable[..., None]
) -> None:
    say(*range(1, WINDOW + FOLD_AT))
    writer = Writer()
    found = context(sessions, ada, conversation, writer)
    assert contents(found) == numbers(FOLD_AT, WINDOW + FOLD_AT - 1)
    assert (found.summary, writer.calls) == (None, [])


def test_the_eighth_to_fall_out_folds_all_eight_into_the_summary(
    sessions: sessionmaker[Session], ada: int, conversation: str, say: Callable[..., None]
) -> None:
    say(*range(1, 21))
    writer = Writer()
    found = context(sessions, ada, conversation, writer)
    assert writer.calls == [(None, numbers(1, 8))]
    assert found.summary == "1 2 3 4 5 6 7 8"
    assert contents(found) == numbers(9, 20)
    version, summary, until = stored(sessions, conversation)
    assert (version, summary) == (1, found.summary)
    with sessions() as db:
        assert db.get_one(Message, until).content == "8"


def test_each_message_is_folded_in_once_over_a_long_conversation(
    sessions: sessionmaker[Session], ada: int, conversation: str, say: Callable[..., None]
) -> None:
    writer = Writer()
    for number in range(1, 61):
        say(number)
        found = context(sessions, ada, conversation, writer)
        assert contents(found) == numbers(max(1, number - WINDOW + 1), number)
    assert [folded for _, folded in writer.calls] == [numbers(n, n + 7) for n in range(1, 48, 8)]
    version, summary, _ = stored(sessions, conversation)
    assert (version, summary) == (6, " ".join(numbers(1, 48)))


@pytest.mark.parametrize("at", [NOON, NOON.replace(microsecond=1), None])
def test_messages_of_one_moment_are_told_apart_by_their_ids(
    sessions: sessionmaker[Session], ada: int, conversation: str, at: datetime | None
) -> None:
    plant(sessions, ada, conversation, [(f"{n:04}", str(n), at) for n in reversed(range(1, 29))])
    writer = Writer()
    found = context(sessions, ada, conversation, writer)
    assert contents(found) == numbers(17, 28)
    assert writer.calls == [(None, numbers(1, 16))]
    plant(sessions, ada, conversation, [(f"{n:04}", str(n), at) for n in range(29, 37)])
    assert contents(context(sessions, ada, conversation, writer)) == numbers(25, 36)
    assert writer.calls[1:] == [(" ".join(numbers(1, 16)), numbers(17, 24))]


def test_a_message_without_a_time_is_the_oldest(
    sessions: sessionmaker[Session], ada: int, conversation: str, say: Callable[..., None]
) -> None:
    plant(sessions, ada, conversation, [("zz", "timeless", None)])
    say(*range(1, 20))
    writer = Writer()
    context(sessions, ada, conversation, writer)
    assert writer.calls == [(None, ["timeless", *numbers(1, 7)])]


def test_a_summary_of_the_legacy_release_is_gone_on_with(
    sessions: sessionmaker[Session], ada: int, conversation: str
) -> None:
    rows = [(f"{n:04}", str(n), NOON + timedelta(seconds=n)) for n in range(1, 31)]
    plant(sessions, ada, conversation, rows)
    with sessions.begin() as db:
        db.add(
            ConversationMemory(
                conversation_id=conversation, user_id=ada, summary_text="of old", summary_version=4,
                summarized_until_message_id="0010", summarized_until_created_at=NOON + timedelta(seconds=10),
            )
        )  # fmt: skip
    writer = Writer()
    context(sessions, ada, conversation, writer)
    assert writer.calls == [("of old", numbers(11, 18))]
    assert stored(sessions, conversation)[0] == 5


def test_where_the_last_summarised_message_is_gone_its_time_serves(
    sessions: sessionmaker[Session], ada: int, conversation: str
) -> None:
    rows = [(f"{n:04}", str(n), NOON + timedelta(seconds=n)) for n in range(1, 31)]
    plant(sessions, ada, conversation, [row for row in rows if row[0] != "0010"])
    with sessions.begin() as db:
        db.add(
            ConversationMemory(
                conversation_id=conversation, user_id=ada, summary_text="of old", summary_version=4,
                summarized_until_message_id="0010", summarized_until_created_at=NOON + timedelta(seconds=10),
            )
        )  # fmt: skip
    writer = Writer()
    context(sessions, ada, conversation, writer)
    assert writer.calls == [("of old", numbers(11, 18))]


def test_a_long_conversation_that_never_had_a_summary_is_folded_in_steps(
    sessions: sessionmaker[Session], ada: int, conversation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_CHARACTERS", 20 * 4)
    rows = [(f"{n:04}", f"{n:04}", NOON + timedelta(seconds=n)) for n in range(1, 71)]
    plant(sessions, ada, conversation, rows)
    writer = Writer()
    found = context(sessions, ada, conversation, writer)
    assert [len(folded) for _, folded in writer.calls] == [20, 20, 18]
    assert found.summary == " ".join(f"{n:04}" for n in range(1, 59))
    assert stored(sessions, conversation)[0] == 3


def test_one_message_longer_than_a_request_is_folded_alone(
    sessions: sessionmaker[Session], ada: int, conversation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_CHARACTERS", 10)
    rows = [(f"{n:04}", "x" * 50, NOON + timedelta(seconds=n)) for n in range(1, 21)]
    plant(sessions, ada, conversation, rows)
    writer = Writer()
    context(sessions, ada, conversation, writer)
    assert [len(folded) for _, folded in writer.calls] == [1]  # then only seven are left: too few


def test_a_summary_that_cannot_be_written_is_left_for_the_next_time(
    sessions: sessionmaker[Session], ada: int, conversation: str, say: Callable[..., None]
) -> None:
    say(*range(1, 21))

    def fail(*_: object) -> str:
        raise ConnectionError("the model is away")

    with sessions() as db, capture_logs() as logs:
        manager = ConversationContextManager(db, db.get_one(User, ada), conversation, fail)
        found = manager.get_context()
    assert (found.summary, contents(found)) == (None, numbers(9, 20))
    assert [entry["event"] for entry in logs] == ["memory.summary.failed"]
    assert context(sessions, ada, conversation).summary == " ".join(numbers(1, 8))


def test_no_connection_is_held_while_the_summary_is_written(
    sessions: sessionmaker[Session], ada: int, conversation: str, say: Callable[..., None]
) -> None:
    say(*range(1, 21))
    out: list[int] = []
    pool = sessions.kw["bind"].pool

    def look(_summary: str | None, _messages: Sequence[Said]) -> str:
        out.append(pool.checkedout())
        return "looked"

    with sessions() as db:
        ConversationContextManager(db, db.get_one(User, ada), conversation, look).get_context()
    assert out == [0]


def test_of_several_who_summarise_at_once_one_wins_and_the_others_read_it(
    sessions: sessionmaker[Session], ada: int, conversation: str, say: Callable[..., None]
) -> None:
    say(*range(1, 21))
    people = 4
    all_have_read = threading.Barrier(people)

    class Together(Writer):
        def __call__(self, summary: str | None, messages: Sequence[Said]) -> str:
            if summary is None:
                all_have_read.wait(30)
            return super().__call__(summary, messages) + f" by {threading.get_ident()}"

    writers = [Together() for _ in range(people)]
    with ThreadPoolExecutor(people) as threads, capture_logs() as logs:
        found = list(threads.map(lambda one: context(sessions, ada, conversation, one), writers))
    version, summary, _ = stored(sessions, conversation)
    assert version == 1
    assert {one.summary for one in found} == {summary}
    outcomes = sorted(entry["event"] for entry in logs)
    assert outcomes == ["memory.summary.done"] + ["memory.summary.overtaken"] * (people - 1)


def test_messages_added_at_once_get_a_place_each_and_none_is_before_a_committed_one(
    sessions: sessionmaker[Session], ada: int, conversation: str
) -> None:
    def add(number: int) -> str:
        with sessions() as db:
            return conversations.add_message(db, ada, conversation, MessageRole.USER, str(number))

    with ThreadPoolExecutor(4) as threads:
        ids = set(threads.map(add, range(24)))
    with sessions() as db:
        said = conversations.history(db, ada, conversation, 100)
    moments = [message.created_at for message in said]
    assert {message.id for message in said} == ids
    assert len(set(moments)) == len(moments)


def test_a_clock_that_goes_back_does_not_put_a_message_before_the_summary(
    sessions: sessionmaker[Session], ada: int, conversation: str, say: Callable[..., None]
) -> None:
    plant(sessions, ada, conversation, [("future", "0", datetime(2100, 1, 1, tzinfo=UTC))])
    say(1, 2)
    assert contents(context(sessions, ada, conversation)) == ["0", "1", "2"]


def test_anothers_or_a_deleted_conversation_is_not_there(
    sessions: sessionmaker[Session], ada: int, conversation: str
) -> None:
    with sessions.begin() as db:
        bob = User(email="bob@example.org", username="bob")
        db.add(bob)
        db.flush()
        bob_id = bob.id
    with pytest.raises(ConversationNotFoundError):
        context(sessions, bob_id, conversation)
    with sessions() as db, pytest.raises(ConversationNotFoundError):
        conversations.add_message(db, bob_id, conversation, MessageRole.USER, "hello")
    with sessions() as db:
        conversations.delete(db, ada, conversation)
    with pytest.raises(ConversationNotFoundError):
        context(sessions, ada, conversation)


def test_the_history_is_read_page_by_page_from_the_end(
    sessions: sessionmaker[Session], ada: int, conversation: str
) -> None:
    plant(sessions, ada, conversation, [(f"{n:04}", str(n), NOON) for n in range(1, 11)])
    with sessions() as db:
        pages, before = [], None
        while page := conversations.history(db, ada, conversation, 4, before):
            pages.append([message.content for message in page])
            before = page[0].id
    assert pages == [numbers(7, 10), numbers(3, 6), numbers(1, 2)]
