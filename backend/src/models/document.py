"""Uploaded documents."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import Text, func
from sqlalchemy.orm import Mapped, mapped_column

from src.database import Base
from src.models.columns import CreatedAt, IntegerKey, Moment, OwnerId, UtcDateTime, utc_now


class DocumentStatus(StrEnum):
    RECEIVED = "received"
    INDEXING = "indexing"
    READY = "ready"
    FAILED = "failed"
    DELETED = "deleted"


class Document(Base):
    """`status` is a DocumentStatus; `error` says why one failed. A deleted row stays, emptied.

    The default `ready` is for what the legacy release inserts: it knows no other state.
    """

    __tablename__ = "documents"

    id: Mapped[IntegerKey]
    user_id: Mapped[OwnerId]
    filename: Mapped[str]
    path: Mapped[str]
    created_at: Mapped[CreatedAt | None]
    status: Mapped[str] = mapped_column(server_default=DocumentStatus.READY)
    error: Mapped[str | None] = mapped_column(Text)
    updated_at: Mapped[datetime] = mapped_column(
        UtcDateTime, default=utc_now, onupdate=utc_now, server_default=func.now()
    )
    deleted_at: Mapped[Moment | None]
