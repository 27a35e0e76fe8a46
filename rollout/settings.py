"""Settings of the command `rollout` itself, read anew by each that asks, so that nothing is remembered from before."""

from __future__ import annotations

from pydantic_settings import BaseSettings, SettingsConfigDict


class RolloutSettings(BaseSettings):
    """Every name is an environment variable, or a line of `.env`."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore")

    ROLLOUT_PROFILE: str = "production"
    """Which soaks and thresholds the gates ask for; `rehearsal` is for copies."""
    ROLLOUT_ACTOR: str = ""
    """Who acts, for the record; user@host where it is empty."""
