"""With several workers: what one that has ended said of itself is forgotten, what it counted is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from src.api.metrics import forget_ended


def test_of_a_worker_that_has_ended_the_counts_stay_and_its_own_gauges_go(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    names = ["gauge_livemin", "gauge_livemax", "gauge_livesum", "gauge_mostrecent", "counter", "histogram"]
    for pid in (ended.pid, os.getpid(), 1):
        for name in names:
            (tmp_path / f"{name}_{pid}.db").touch()
    forget_ended(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert {name for name in names if f"{name}_{ended.pid}.db" in left} == {"gauge_mostrecent", "counter", "histogram"}
    assert all(f"{name}_{pid}.db" in left for name in names for pid in (os.getpid(), 1))
