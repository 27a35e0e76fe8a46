"""What the HTTP service counts, and how Prometheus reads it.

The metrics live in the process. With several workers each answers for itself, unless
PROMETHEUS_MULTIPROC_DIR names a folder that is empty when the service starts: then any of them answers
for all. What a worker that has ended counted stays counted; what it said of itself is forgotten. Labels are
route templates, never paths, so their number is bounded.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from fastapi import APIRouter, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

REQUESTS = Counter("http_requests", "Answered HTTP requests", ["method", "route", "status"])
SECONDS = Histogram("http_request_seconds", "Until the last byte was sent", ["method", "route"])
UPLOADS = Counter("uploads", "Uploads by what became of them", ["outcome"])
CHATS = Counter("chat_runs", "Runs of the agent by how they ended", ["outcome"])
CHATS_RUNNING = Gauge("chat_runs_running", "Running now", multiprocess_mode="livesum")

LIVE_GAUGE = re.compile(r"gauge_live\w+_(\d+)\.db")

router = APIRouter(tags=["operations"])


@router.get("/metrics", response_class=Response)
def metrics() -> Response:
    """Prometheus' text format."""
    return Response(generate_latest(_registry()), media_type=CONTENT_TYPE_LATEST)


def _registry() -> CollectorRegistry:
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is None:
        return REGISTRY
    forget_ended(Path(folder))
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


def forget_ended(folder: Path) -> None:
    """Drop the gauges of workers that are gone, else a stage that they left would be shown for ever."""
    for pid in {int(found[1]) for path in folder.iterdir() if (found := LIVE_GAUGE.fullmatch(path.name))}:
        if not _lives(pid):
            with suppress(FileNotFoundError):  # another worker is asked at the same time
                mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
