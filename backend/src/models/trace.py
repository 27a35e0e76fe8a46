"""Traces of what the agent did, step by step."""

from __future__ import annotations

from sqlalchemy import ForeignKey, Text
from sqlalchemy.orm import Mapped, mapped_column

from src.database import Base
from src.models.columns import CreatedAt, IntegerKey, Moment, TextKey


class Trace(Base):
    """`user_id` and `conversation_id` carry no foreign key: a trace outlives what it is about."""

    __tablename__ = "traces"

    id: Mapped[TextKey]
    user_id: Mapped[int | None]
    conversation_id: Mapped[str | None]
    name: Mapped[str | None]
    status: Mapped[str | None]
    started_at: Mapped[CreatedAt | None]
    finished_at: Mapped[Moment | None]
    metadata_json: Mapped[str | None] = mapped_column(Text)


class TraceStep(Base):
    """`args` is JSON as text; `duration_ms` may have a fraction."""

    __tablename__ = "trace_steps"

    id: Mapped[IntegerKey]
    trace_id: Mapped[str] = mapped_column(ForeignKey("traces.id", ondelete="CASCADE"))
    tool_name: Mapped[str | None]
    args: Mapped[str | None] = mapped_column(Text)
    decision: Mapped[str | None]
    output: Mapped[str | None] = mapped_column(Text)
    duration_ms: Mapped[float | None]
    created_at: Mapped[CreatedAt | None]
