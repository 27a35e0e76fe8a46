"""The ways to sign in beside a password, and the way back in after forgetting it."""

from __future__ import annotations

import uuid

from sqlalchemy import Text, text
from sqlalchemy.orm import Mapped, mapped_column

from src.database import Base
from src.models.columns import CreatedAt, IntegerKey, Moment, OwnerId, UpdatedAt


class OAuthAccount(Base):
    """`provider` is 'google' or 'microsoft'."""

    __tablename__ = "oauth_accounts"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    user_id: Mapped[OwnerId]
    provider: Mapped[str]
    provider_user_id: Mapped[str]
    email: Mapped[str | None]
    created_at: Mapped[CreatedAt | None]
    updated_at: Mapped[UpdatedAt | None]


class Passkey(Base):
    """`public_key` is kept as the text that the browser's library gave."""

    __tablename__ = "passkeys"

    id: Mapped[IntegerKey]
    user_id: Mapped[OwnerId]
    credential_id: Mapped[str] = mapped_column(unique=True)
    public_key: Mapped[str] = mapped_column(Text)
    sign_count: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    created_at: Mapped[CreatedAt | None]
    last_used_at: Mapped[Moment | None]


class PasswordResetToken(Base):
    """Only the token's hash is kept; `used_at` is null until it has been used."""

    __tablename__ = "password_reset_tokens"

    id: Mapped[IntegerKey]
    user_id: Mapped[OwnerId]
    token_hash: Mapped[str] = mapped_column(unique=True)
    expires_at: Mapped[Moment]
    used_at: Mapped[Moment | None]
    created_at: Mapped[CreatedAt | None]
