"""Settings of the backend, read once from the environment and `.env`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveFloat, PositiveInt, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

# Refused outside development, so it guards nothing.
DEFAULT_SECRET_KEY = "development-only-secret-key-never-used-in-production"  # noqa: S105


class Settings(BaseSettings):
    """The backend's settings; every name is an environment variable."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore")

    DATABASE_URL: str = "sqlite:///./victus.db"
    """`embedded:PATH`, a PostgreSQL URL for the role victus_app, or SQLite (relational part only)."""
    DATABASE_ADMIN_URL: str | None = None
    """The owner's URL, for Alembic; with `embedded:` derived, else DATABASE_URL."""
    DATABASE_ROLLOUT_URL: str | None = None
    """The URL of the role victus_rollout, for bulk work; with `embedded:` derived."""
    UPLOAD_DIR: Path = Path("uploads")
    EMBEDDING_PROVIDER: Literal["openai", "local"] = "openai"
    EMBEDDING_MODEL: str = "text-embedding-3-small"
    OPENAI_API_KEY: SecretStr | None = None
    OPENAI_BASE_URL: str | None = None
    DATABASE_POOL_SIZE: int = 10
    DATABASE_PREPARE: bool = True
    """False behind PgBouncer in transaction mode, which loses prepared statements between transactions."""

    # The HTTP service.
    ENVIRONMENT: Literal["development", "production"] = "production"
    """The default is the strict one, so that a forgotten variable refuses instead of allowing."""
    SECRET_KEY: SecretStr = SecretStr(DEFAULT_SECRET_KEY)
    """Signs the tokens; 32 bytes at least, and outside development not the default."""
    TOKEN_MINUTES: PositiveInt = 60
    LOG_LEVEL: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    MAX_UPLOAD_BYTES: PositiveInt = 50 * 2**20
    INDEX_WORKERS: PositiveInt = 2
    """How many uploads one process parses and embeds at once."""

    # The agent.
    CHAT_MODEL: str = "gpt-4o"
    SUMMARY_MODEL: str = "gpt-4o-mini"
    CHAT_TIMEOUT_SECONDS: PositiveFloat = 60.0
    CHAT_WORKERS: PositiveInt = 8
    """How many answers one process writes at once; a further question is refused with 503."""


settings = Settings()
