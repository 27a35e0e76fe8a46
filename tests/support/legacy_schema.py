"""The schema as the old release had it, and Alembic on a given database."""

from __future__ import annotations

from pathlib import Path

from alembic.config import Config
from sqlalchemy import MetaData

import src.models  # noqa: F401  fills Base.metadata
from src.database import Base

ALEMBIC_INI = Path(__file__).parents[2] / "alembic.ini"
LEGACY_HEAD = "4f95b897a5b8"
NEW_IN_DOCUMENTS = {"status", "error", "updated_at", "deleted_at"}


def alembic_config(url: str) -> Config:
    made = Config(str(ALEMBIC_INI))
    made.attributes["url"] = url
    return made


def legacy_metadata() -> MetaData:
    """The tables as the old release's models had them."""
    metadata = MetaData()
    for table in Base.metadata.sorted_tables:
        copy = table.to_metadata(metadata)
        for name in NEW_IN_DOCUMENTS if table.name == "documents" else ():
            copy._columns.remove(copy.c[name])  # what Table has no public way for
    return metadata
