"""Users: whom everything else belongs to."""

from __future__ import annotations

from sqlalchemy import false, true
from sqlalchemy.orm import Mapped, mapped_column

from src.database import Base
from src.models.columns import CreatedAt, IntegerKey, Moment


class User(Base):
    """`hashed_password` is null for a user who signs in through OAuth only."""

    __tablename__ = "users"

    id: Mapped[IntegerKey]
    email: Mapped[str] = mapped_column(unique=True)
    username: Mapped[str] = mapped_column(unique=True)
    hashed_password: Mapped[str | None]
    full_name: Mapped[str | None]
    is_active: Mapped[bool] = mapped_column(default=True, server_default=true())
    is_verified: Mapped[bool] = mapped_column(default=False, server_default=false())
    provider: Mapped[str] = mapped_column(default="local", server_default="local")
    provider_id: Mapped[str | None]
    avatar_url: Mapped[str | None]
    created_at: Mapped[CreatedAt | None]
    last_login: Mapped[Moment | None]
