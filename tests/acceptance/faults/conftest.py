"""What every attack needs: victims, and a site on a database of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.faults.site import Site
from tests.acceptance.faults.victims import Victims, victims_ready

FULL = bool(os.environ.get("FAULTS"))


@pytest.fixture(scope="module")
def victims() -> Iterator[Victims]:
    with victims_ready() as ready:
        yield ready


@pytest.fixture
def site(database: Any, victims: Victims, tmp_path: Path) -> Site:
    return Site(database, victims, tmp_path / "uploads", tmp_path / "faiss_index")
