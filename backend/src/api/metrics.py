"""What the HTTP service counts, and how Prometheus reads it.

The metrics live in the process. With several workers each answers for itself, unless
PROMETHEUS_MULTIPROC_DIR names a folder that is empty when the service starts: then any of them answers
for all. Labels are route templates, never paths, so their number is bounded.
"""

from __future__ import annotations

import os

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
from prometheus_client.multiprocess import MultiProcessCollector

REQUESTS = Counter("http_requests", "Answered HTTP requests", ["method", "route", "status"])
SECONDS = Histogram("http_request_seconds", "Until the last byte was sent", ["method", "route"])
UPLOADS = Counter("uploads", "Uploads by what became of them", ["outcome"])
CHATS = Counter("chat_runs", "Runs of the agent by how they ended", ["outcome"])
CHATS_RUNNING = Gauge("chat_runs_running", "Running now", multiprocess_mode="livesum")

router = APIRouter(tags=["operations"])


@router.get("/metrics", response_class=Response)
def metrics() -> Response:
    """Prometheus' text format."""
    return Response(generate_latest(_registry()), media_type=CONTENT_TYPE_LATEST)


def _registry() -> CollectorRegistry:
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry
