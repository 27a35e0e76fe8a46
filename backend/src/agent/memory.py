"""What the agent is told of a conversation: a summary of the old part, the newest part word for word.

The summary is written without holding a connection, then committed only if `summary_version` is still
what it was read at: of two that summarise at once, one wins and the other reads what it wrote. Cursor
and summary change in one statement, so a process that dies has folded a message in once or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog
from sqlalchemy import ColumnElement, Select, select, true, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from src.agent.conversations import NEWEST_FIRST, OLDEST_FIRST, find, is_after, said_at
from src.agent.models import summarise
from src.models import ConversationMemory, Message, User
from src.models.columns import utc_now

WINDOW = 12
"""How many of the newest messages are given word for word."""
FOLD_AT = 8
"""How many must have fallen out of the window since the last summary before the next is written."""
MOST_MESSAGES = 500
MOST_CHARACTERS = 100_000
"""In one summary; a long conversation that never had one is folded in several steps."""
CHARACTERS_A_TOKEN = 4

Summarise = Callable[[str | None, Sequence["Said"]], str]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Said:
    """A message as the model is given it; `role` is a MessageRole."""

    id: str
    role: str
    content: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Context:
    """`messages`: the newest, at most WINDOW, oldest first. `summary` covers what came before."""

    summary: str | None
    messages: list[Said]


@dataclass(frozen=True, slots=True)
class _Memory:
    version: int
    summary: str | None
    until_id: str | None
    until: datetime | None


class ConversationContextManager:
    """One conversation of one user. `summarise` writes the new summary from the old one and the
    messages to fold in; by default a small chat model does."""

    def __init__(self, db: Session, user: User, conversation_id: str, summarise: Summarise = summarise) -> None:
        self.db = db
        self.user_id = user.id
        self.conversation_id = conversation_id
        self.summarise = summarise

    def get_context(self) -> Context:
        """Folds in what is due, then gives summary and window.

        A summary that cannot be written now is left for the next time: the conversation goes on with
        the one before. Raises ConversationNotFoundError.
        """
        find(self.db, self.user_id, self.conversation_id)
        while self._fold():
            pass
        memory, window = self._memory(), self._window()
        self.db.rollback()
        return Context(memory.summary, window)

    def _fold(self) -> bool:
        """Folds in the messages that are due; True if some were, by us or by somebody else."""
        memory = self._memory()
        due = _bounded(self._fallen_out(memory))
        self.db.rollback()  # no connection is held while the model writes
        if not due:
            return False
        try:
            summary = self.summarise(memory.summary, due)
        except Exception as error:  # noqa: BLE001 - the boundary to the model: the answer matters more
            log.warning("memory.summary.failed", conversation_id=self.conversation_id, kind=type(error).__name__)
            return False
        won = self._store(memory, summary, due[-1])
        log.info(
            "memory.summary.done" if won else "memory.summary.overtaken",
            conversation_id=self.conversation_id, messages=len(due), version=memory.version + 1,
        )  # fmt: skip
        return True

    def _memory(self) -> _Memory:
        row = self.db.execute(
            select(
                ConversationMemory.summary_version,
                ConversationMemory.summary_text,
                ConversationMemory.summarized_until_message_id,
                ConversationMemory.summarized_until_created_at,
            ).where(ConversationMemory.conversation_id == self.conversation_id)
        ).first()
        return _Memory(0, None, None, None) if row is None else _Memory(*row)

    def _window(self) -> list[Said]:
        newest = self._messages(true()).order_by(*NEWEST_FIRST).limit(WINDOW)
        return [Said(*row) for row in reversed(self.db.execute(newest).all())]

    def _fallen_out(self, memory: _Memory) -> list[Said]:
        """Those between the cursor and the window, oldest first; none while they are too few."""
        fresh: ColumnElement[bool] = true()
        if memory.until_id is not None:
            fresh = is_after(self.conversation_id, memory.until_id, fallback=memory.until)
        window = self._window()
        if len(window) < WINDOW:
            return []
        rows = self.db.execute(
            self._messages(fresh, ~is_after(self.conversation_id, window[0].id, inclusive=True))
            .order_by(*OLDEST_FIRST)
            .limit(MOST_MESSAGES)
        )
        fallen = [Said(*row) for row in rows]
        return fallen if len(fallen) >= FOLD_AT else []

    def _messages(self, *conditions: ColumnElement[bool]) -> Select[str, str, str, datetime]:
        return select(Message.id, Message.role, Message.content, said_at).where(
            Message.conversation_id == self.conversation_id, *conditions
        )

    def _store(self, read: _Memory, summary: str, last: Said) -> bool:
        """Compare-and-set on the version that the summary was made from; False if it was overtaken."""
        values = {
            "summary_text": summary,
            "summary_version": read.version + 1,
            "summarized_until_message_id": last.id,
            "summarized_until_created_at": last.at,
            "last_summary_token_estimate": len(summary) // CHARACTERS_A_TOKEN + 1,
            "updated_at": utc_now(),
        }
        self._ensure_row()
        changed = self.db.execute(
            update(ConversationMemory)
            .where(
                ConversationMemory.conversation_id == self.conversation_id,
                ConversationMemory.summary_version == read.version,
            )
            .values(**values)
            .returning(ConversationMemory.id)
            .execution_options(synchronize_session=False)
        ).first()
        self.db.commit()
        return changed is not None

    def _ensure_row(self) -> None:
        known = select(ConversationMemory.id).where(ConversationMemory.conversation_id == self.conversation_id)
        if self.db.scalar(known) is not None:
            return
        self.db.add(ConversationMemory(conversation_id=self.conversation_id, user_id=self.user_id))
        try:
            self.db.commit()
        except IntegrityError:
            self.db.rollback()  # somebody else made it


def _bounded(due: list[Said]) -> list[Said]:
    """The oldest that fit into one request to the model, and at least one."""
    total, taken = 0, 0
    for one in due:
        total += len(one.content)
        if taken and total > MOST_CHARACTERS:
            break
        taken += 1
    return due[:taken]
