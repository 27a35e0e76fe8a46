"""Conversations, their messages, and what a conversation's summary remembers."""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import ForeignKey, Text, false, text
from sqlalchemy.orm import Mapped, mapped_column

from src.database import Base
from src.models.columns import CreatedAt, Moment, OwnerId, TextKey, UpdatedAt


class MessageRole(StrEnum):
    USER = "user"
    ASSISTANT = "assistant"
    SYSTEM = "system"
    TOOL = "tool"


class Conversation(Base):
    __tablename__ = "conversations"

    id: Mapped[TextKey]
    user_id: Mapped[OwnerId]
    title: Mapped[str] = mapped_column(default="New Conversation", server_default="New Conversation")
    pinned: Mapped[bool] = mapped_column(default=False, server_default=false())
    archived: Mapped[bool] = mapped_column(default=False, server_default=false())
    created_at: Mapped[CreatedAt | None]
    updated_at: Mapped[UpdatedAt | None]
    deleted_at: Mapped[Moment | None]


class Message(Base):
    """`role` is a MessageRole; `metadata_json` is JSON as text."""

    __tablename__ = "messages"

    id: Mapped[TextKey]
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"))
    user_id: Mapped[OwnerId]
    role: Mapped[str]
    content: Mapped[str] = mapped_column(Text)
    token_count: Mapped[int | None]
    metadata_json: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[CreatedAt | None]


class ConversationMemory(Base):
    """The summary of what fell out of the window; `summarized_until_*` says how far it reaches."""

    __tablename__ = "conversation_memories"

    id: Mapped[TextKey]
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"), unique=True)
    user_id: Mapped[OwnerId]
    summary_text: Mapped[str | None] = mapped_column(Text)
    summary_version: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    summarized_until_message_id: Mapped[str | None]
    summarized_until_created_at: Mapped[Moment | None]
    last_summary_token_estimate: Mapped[int | None]
    updated_at: Mapped[UpdatedAt | None]
