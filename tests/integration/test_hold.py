"""A hold keeps everything where it is, says who and why, and ends when somebody resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rollout import hold, steps
from rollout.control import Control
from rollout.errors import RefusedError
from rollout.profiles import PRODUCTION
from rollout.status import status
from src.database import Role
from src.tools.rag_tools.migration.settings import migration_settings
from src.tools.rag_tools.pgvector_store import open_pool
from tests.support.routers import HashEmbeddings

pytestmark = pytest.mark.migration


def test_nobody_advances_while_the_rollout_is_held(
    database: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration_settings, "FAISS_INDEX_PATH", tmp_path / "faiss_index")
    with open_pool(database.conninfo(Role.ROLLOUT), 4, name="hold") as pool:
        control = Control(pool, PRODUCTION, HashEmbeddings())
        with control.connection() as connection:
            hold.set_held(connection, True, actor="ada", reason="disk is being moved")
        with pytest.raises(RefusedError, match=r"ada.*disk is being moved"):
            steps.advance(control, target=None, execute=True, actor="ben", reason="onwards")
        assert hold.is_held(pool)
        assert "disk is being moved" in status(control)["hold"]
        with control.connection() as connection:
            hold.set_held(connection, False, actor="ada", reason="moved")
        assert not hold.is_held(pool)
        assert status(control)["hold"] is None
        assert control.view().transition_id == 1
