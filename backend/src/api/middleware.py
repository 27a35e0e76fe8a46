"""Around every request: its id, its line in the log, its metrics, and an answer if all else fails.

The id comes from the caller's X-Request-ID where that is harmless to log, and goes back to the caller.
"""

from __future__ import annotations

import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from src.api import metrics

REQUEST_ID = "X-Request-ID"
_HARMLESS = re.compile(r"[A-Za-z0-9._\-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

log = structlog.get_logger(__name__)


class RequestMiddleware:
    """The outermost part of ours."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, request_id(Headers(scope=scope)))
        begun = time.perf_counter()
        with bound_contextvars(request_id=answer.request_id):
            try:
                await self.app(scope, receive, answer.send)
            except Exception:
                log.exception("http.request.failed")
                if answer.status is not None:
                    raise  # half an answer is out: only cutting the connection can say so
                await _failed(answer.request_id)(scope, receive, answer.send)
            finally:
                _record(scope, answer.status, time.perf_counter() - begun)


class _Answer:
    """Passes the answer on, with the request's id, and remembers its status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID] = self.request_id
        await self._send(message)


def request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID, "")
    return given if _HARMLESS.fullmatch(given) else uuid.uuid4().hex


def _failed(request_id: str) -> JSONResponse:
    told = f"this is a fault of the service; report it with the request id {request_id}"
    return JSONResponse({"detail": told}, status_code=500)


def _record(scope: Scope, status: int | None, seconds: float) -> None:
    method = scope["method"] if scope["method"] in _METHODS else "other"
    route = str(getattr(scope.get("route"), "path", "none"))
    told = str(status or "none")
    metrics.REQUESTS.labels(method, route, told).inc()
    metrics.SECONDS.labels(method, route).observe(seconds)
    log.info("http.request.done", method=method, route=route, status=status, milliseconds=round(seconds * 1000, 1))
