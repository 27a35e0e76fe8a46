"""Conversations: create, list, read, delete."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, Field

from src.agent import conversations
from src.api.common import MISTAKES, Db, Limit, Offset, Out, Text, UserId, signed_in

router = APIRouter(
    prefix="/api/conversations",
    tags=["conversations"],
    dependencies=signed_in,
    responses=MISTAKES,
)


class NewConversation(BaseModel):
    title: Annotated[Text | None, Field(max_length=200)] = None


class Conversation(Out):
    id: str
    title: str
    pinned: bool
    archived: bool
    created_at: datetime | None
    updated_at: datetime | None


class Message(Out):
    id: str
    role: str
    content: str
    created_at: datetime | None


class History(Out):
    """`messages`: oldest first; ask with `before` = the first one's id for those before it."""

    conversation: Conversation
    messages: list[Message]


@router.post("", status_code=201)
def create(db: Db, user_id: UserId, body: NewConversation | None = None) -> Conversation:
    title = body.title if body is not None else None
    return Conversation.model_validate(conversations.create(db, user_id, title))


@router.get("")
def list_conversations(db: Db, user_id: UserId, limit: Limit = 50, offset: Offset = 0) -> list[Conversation]:
    """The pinned first, then by when something was last said."""
    found = conversations.newest(db, user_id, limit, offset)
    return [Conversation.model_validate(one) for one in found]


@router.get("/{conversation_id}")
def history(conversation_id: UUID, db: Db, user_id: UserId, limit: Limit = 50, before: UUID | None = None) -> History:
    """The newest messages of the conversation."""
    own = conversations.find(db, user_id, str(conversation_id))
    until = None if before is None else str(before)
    messages = conversations.history(db, user_id, own.id, limit, until)
    return History(
        conversation=Conversation.model_validate(own),
        messages=[Message.model_validate(message) for message in messages],
    )


@router.delete("/{conversation_id}", status_code=204)
def delete(conversation_id: UUID, db: Db, user_id: UserId) -> None:
    conversations.delete(db, user_id, str(conversation_id))
