"""Settings of the migration; they go when FAISS goes."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class MigrationSettings(BaseSettings):
    """Every name is an environment variable."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore")

    FAISS_INDEX_PATH: Path = Path("faiss_index")
    """The directory with `index.faiss` and `index.pkl`, on a local disk of this one host."""
    SECONDARY_TIMEOUT_SECONDS: float = 2.0
    """How long a write waits for the store that does not serve; then it stays owed."""
    SHADOW_TIMEOUT_SECONDS: float = 2.0
    SHADOW_QUEUE: int = 100
    SHADOW_WORKERS: int = 2
    SHADOW_HMAC_KEY: SecretStr | None = None
    """Keys the hash of a query in the diffs; without it one is made per process."""
    POLL_SECONDS: float = 1.0
    SETTLE_SECONDS: float = 1.0
    GUARD_SECONDS: float = 10.0
    """How often the guard looks."""
    GUARD_WINDOW_SECONDS: float = 60.0
    """It goes back when three windows of this length in a row are bad."""
    SAVE_FAISS_SECONDS: float = 3600.0


migration_settings = MigrationSettings()
