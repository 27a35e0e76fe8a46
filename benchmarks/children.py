"""What is measured in a process of its own, so that memory and imports are its own: `python -m benchmarks.children`.

The database and the directory come by the settings' environment variables; the answer is a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
MB = 1 << 20


def resident(which: str) -> float:
    """VmRSS now or VmHWM at its highest, in MB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def moving() -> dict[str, float]:
    """Backfill, then verify, each as its command does it: the directory is opened and given its owners first."""
    from rollout.backfill import backfill
    from rollout.control import control
    from rollout.verify import verify

    with control() as made:
        begun = time.perf_counter()
        faiss = made.faiss
        opened = time.perf_counter() - begun
        index = resident("VmRSS")
        CLEAR_REFS.write_text("5")
        report = backfill(made.pool, faiss, execute=True, progress=lambda _: None)
        ended = time.perf_counter() - begun
        memory = resident("VmHWM") - index
        if report.remaining or report.failed:
            raise RuntimeError(f"{report.remaining} documents remain, {len(report.failed)} failed")
        begun = time.perf_counter()
        checked = verify(made.pool, faiss, progress=lambda _: None)
        if checked.differences or checked.chunks != report.chunks:
            raise RuntimeError(f"{checked.differences} differences in {checked.chunks} chunks")
        verified = time.perf_counter() - begun + opened
        made.faiss.close()
        made.__dict__.pop("router")
    return {"open": opened, "backfill": ended, "verify": verified, "memory_mb": memory, "index_mb": index}


def open_() -> dict[str, float]:
    from rollout.control import control

    with control() as made:
        begun = time.perf_counter()
        made.faiss.load()
        seconds = time.perf_counter() - begun
        made.faiss.close()
        made.__dict__.pop("router")
    return {"seconds": seconds}


def load_local() -> dict[str, float]:
    from langchain_community.vectorstores import FAISS

    from rollout.saved import _Unused
    from src.tools.rag_tools.migration.settings import migration_settings

    begun = time.perf_counter()
    store = FAISS.load_local(str(migration_settings.FAISS_INDEX_PATH), _Unused(), allow_dangerous_deserialization=True)
    return {"seconds": time.perf_counter() - begun, "chunks": store.index.ntotal}


COMMANDS: dict[str, Callable[[], dict[str, Any]]] = {"moving": moving, "open": open_, "load_local": load_local}

if __name__ == "__main__":
    print(json.dumps(COMMANDS[sys.argv[1]]()))
