"""What a command of `rollout` works on, on a test's database and directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout.control import Control, control
from rollout.profiles import PRODUCTION, Profile
from src.config import settings
from src.tools.rag_tools.migration.settings import migration_settings
from tests.support.routers import HashEmbeddings

EASY = replace(PRODUCTION, name="test", comparisons=10, cohort_comparisons=5, agreement=0.5, ramp_soak=0, long_soak=0)
"""Few comparisons and no waiting; everything else as in production."""


@contextmanager
def control_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, profile: Profile = EASY, embeddings: Any = None
) -> Iterator[Control]:
    """On the configured database, and on the FAISS directory and the uploads in `folder`."""
    monkeypatch.setattr(migration_settings, "FAISS_INDEX_PATH", folder / "faiss_index")
    monkeypatch.setattr(settings, "UPLOAD_DIR", folder / "uploads")
    monkeypatch.setattr("rollout.steps.FLEET_SECONDS", 0.0)
    with control() as made:
        made.profile = profile
        made.embeddings = HashEmbeddings() if embeddings is None else embeddings
        yield made
