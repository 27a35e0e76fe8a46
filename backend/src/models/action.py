"""Actions that wait for a person's approval."""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import Text
from sqlalchemy.orm import Mapped, mapped_column

from src.database import Base
from src.models.columns import CreatedAt, Moment, TextKey


class ActionStatus(StrEnum):
    PENDING = "PENDING"
    APPROVED = "APPROVED"
    REJECTED = "REJECTED"
    EXECUTED = "EXECUTED"


class PendingAction(Base):
    """`status` is an ActionStatus; `args` is JSON as text; `user_id` has no foreign key."""

    __tablename__ = "pending_actions"

    id: Mapped[TextKey]
    user_id: Mapped[int]
    tool_name: Mapped[str]
    risk_level: Mapped[str | None]
    args: Mapped[str | None] = mapped_column(Text)
    status: Mapped[str] = mapped_column(default=ActionStatus.PENDING, server_default=ActionStatus.PENDING)
    created_at: Mapped[CreatedAt | None]
    resolved_at: Mapped[Moment | None]
