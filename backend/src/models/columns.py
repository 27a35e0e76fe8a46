"""Column types and defaults that several tables share."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Annotated, Any

from sqlalchemy import DateTime, Dialect, ForeignKey, func
from sqlalchemy.orm import mapped_column
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, always aware and in UTC on the Python side; a naive value counts as UTC.

    SQLite stores no offset: without the conversion a value from another zone would come back wrong,
    and comparing what was read with `datetime.now(UTC)` would fail there only.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else as_utc(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        return None if value is None else as_utc(value)


def as_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def utc_now() -> datetime:
    return datetime.now(UTC)


def new_id() -> str:
    return str(uuid.uuid4())


IntegerKey = Annotated[int, mapped_column(primary_key=True)]
TextKey = Annotated[str, mapped_column(primary_key=True, default=new_id)]
OwnerId = Annotated[int, mapped_column(ForeignKey("users.id", ondelete="CASCADE"))]

# Null is allowed in moments and free text: legacy rows may hold it, and nothing can make up for it.
Moment = Annotated[datetime, mapped_column(UtcDateTime)]
CreatedAt = Annotated[datetime, mapped_column(UtcDateTime, default=utc_now, server_default=func.now())]
UpdatedAt = Annotated[
    datetime,
    mapped_column(UtcDateTime, default=utc_now, onupdate=utc_now, server_default=func.now()),
]
