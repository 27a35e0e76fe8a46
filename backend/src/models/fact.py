"""Facts that the agent remembers about a user."""

from __future__ import annotations

from sqlalchemy import Text
from sqlalchemy.orm import Mapped, mapped_column

from src.database import Base
from src.models.columns import IntegerKey, UpdatedAt


class UserFact(Base):
    """`user_id` is the user's id as text, without a foreign key: so the legacy table has it."""

    __tablename__ = "user_facts"

    id: Mapped[IntegerKey]
    user_id: Mapped[str]
    key: Mapped[str]
    value: Mapped[str | None] = mapped_column(Text)
    last_updated: Mapped[UpdatedAt | None]
