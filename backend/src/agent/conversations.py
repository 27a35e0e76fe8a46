"""Conversations and their messages, each a user's own.

Messages of a conversation are ordered by (created_at, id). Adding one takes the conversation's row for
the length of its transaction and gives it a time after every other, so the order in which they were
committed is the order in which they are read, whatever the clocks of several processes say. Rows of
the legacy release may share a time, or have none, which counts as the oldest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, func, literal, or_, select, update
from sqlalchemy.orm import Session

from src.agent.errors import ConversationNotFoundError
from src.models import Conversation, Message, MessageRole
from src.models.columns import UtcDateTime, new_id, utc_now

BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
TICK = timedelta(microseconds=1)

said_at = func.coalesce(Message.created_at, literal(BEGINNING, UtcDateTime), type_=UtcDateTime)
"""A message's place in time."""
OLDEST_FIRST = (said_at, Message.id)
NEWEST_FIRST = (said_at.desc(), Message.id.desc())


def create(db: Session, user_id: int, title: str | None = None) -> Conversation:
    """A new conversation, committed."""
    conversation = Conversation(user_id=user_id, **({"title": title} if title else {}))
    db.add(conversation)
    db.commit()
    return conversation


def find(db: Session, user_id: int, conversation_id: str) -> Conversation:
    """Raises ConversationNotFoundError where the user has none of that id."""
    conversation = db.scalars(select(Conversation).where(is_own(user_id, conversation_id))).first()
    if conversation is None:
        raise not_found(conversation_id)
    return conversation


def newest(db: Session, user_id: int, limit: int, offset: int) -> Sequence[Conversation]:
    """The user's conversations: the pinned first, then by when something was last said."""
    return db.scalars(
        select(Conversation)
        .where(Conversation.user_id == user_id, Conversation.deleted_at.is_(None))
        .order_by(Conversation.pinned.desc(), Conversation.updated_at.desc(), Conversation.id)
        .limit(limit)
        .offset(offset)
    ).all()


def delete(db: Session, user_id: int, conversation_id: str) -> None:
    """Hide the conversation for good. Raises ConversationNotFoundError."""
    _change(db, user_id, conversation_id, deleted_at=utc_now())
    db.commit()


def add_message(
    db: Session,
    user_id: int,
    conversation_id: str,
    role: MessageRole,
    content: str,
    metadata: dict[str, Any] | None = None,
) -> str:
    """Adds a message at the end, committed; returns its id. Raises ConversationNotFoundError."""
    now = utc_now()
    _change(db, user_id, conversation_id, updated_at=now)
    last = db.scalar(
        select(func.max(Message.created_at, type_=UtcDateTime)).where(Message.conversation_id == conversation_id)
    )
    message = Message(
        id=new_id(),
        conversation_id=conversation_id,
        user_id=user_id,
        role=role,
        content=content,
        metadata_json=None if metadata is None else json.dumps(metadata),
        created_at=now if last is None else max(now, last + TICK),
    )
    db.add(message)
    message_id = message.id
    db.commit()
    return message_id


def history(db: Session, user_id: int, conversation_id: str, limit: int, before: str | None = None) -> list[Message]:
    """The last `limit` messages, or the last before the message `before`; the oldest first.

    Raises ConversationNotFoundError.
    """
    find(db, user_id, conversation_id)
    wanted = select(Message).where(Message.conversation_id == conversation_id)
    if before is not None:
        wanted = wanted.where(~is_after(conversation_id, before, inclusive=True))
    return list(reversed(db.scalars(wanted.order_by(*NEWEST_FIRST).limit(limit)).all()))


def is_own(user_id: int, conversation_id: str) -> ColumnElement[bool]:
    return and_(
        Conversation.id == conversation_id,
        Conversation.user_id == user_id,
        Conversation.deleted_at.is_(None),
    )


def is_after(
    conversation_id: str, message_id: str, *, inclusive: bool = False, fallback: datetime | None = None
) -> ColumnElement[bool]:
    """Whether a message comes after the conversation's one of that id, or after `fallback` if that one is gone.

    An id of another conversation counts as gone: where it stands would tell when somebody else wrote it.
    The time is compared as the database has it: SQLite keeps text, and a time that went through
    Python may come back written otherwise.
    """
    at = func.coalesce(
        select(said_at)
        .where(Message.id == message_id, Message.conversation_id == conversation_id)
        .correlate(None)
        .scalar_subquery(),
        literal(fallback or BEGINNING, UtcDateTime),
        type_=UtcDateTime,
    )
    later_id = Message.id >= message_id if inclusive else Message.id > message_id
    return or_(said_at > at, and_(said_at == at, later_id))


def not_found(conversation_id: str) -> ConversationNotFoundError:
    return ConversationNotFoundError(f"there is no conversation {conversation_id}")


def _change(db: Session, user_id: int, conversation_id: str, **values: Any) -> None:
    """A write, so that it also takes the row: on PostgreSQL until the commit, on SQLite the file."""
    changed = db.execute(
        update(Conversation).where(is_own(user_id, conversation_id)).values(**values)
        .returning(Conversation.id)
        .execution_options(synchronize_session=False)
    ).first()  # fmt: skip
    if changed is None:
        db.rollback()
        raise not_found(conversation_id)
