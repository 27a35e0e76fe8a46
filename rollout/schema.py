"""The Alembic configuration of this checkout, or of an image into which the packages were installed."""

from __future__ import annotations

import os
from pathlib import Path

from alembic.config import Config

ROOT = Path(__file__).parents[1]


def alembic_config(url: str | None = None) -> Config:
    """alembic.ini as it stands, where ALEMBIC_CONFIG says if it does; `url` in place of the configured owner's."""
    config = Config(os.environ.get("ALEMBIC_CONFIG", ROOT / "alembic.ini"))
    if url is not None:
        config.attributes["url"] = url
    return config
