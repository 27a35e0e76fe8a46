"""The dashboard: the page over HTTP, in a process of its own, for whoever may see it.

On loopback everybody on this machine may; a browser that was led here under a foreign name is refused. Elsewhere a
token is asked for. It only reads; ending it, or its death, changes nothing.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from rollout.control import Control
from rollout.errors import PreconditionError, RolloutError, UsageError
from rollout.report.collect import collect, named
from rollout.report.page import policy, render, render_failure
from src.tools.rag_tools.store import StoreError

log = structlog.get_logger(__name__)

REFRESH_SECONDS = 15
FRESH_SECONDS = 10.0
SHARE = 10
"""A page is shown again for ten times as long as it took to collect: the database is asked a tenth of the time."""
TOKEN_LENGTH = 32
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
HEADERS = {
    "Content-Security-Policy": f"{policy(script=True)}; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Clock = Callable[[], float]


class Pages:
    """The page of each span, collected by one request at a time and shown to all for a while."""

    def __init__(self, control: Control, *, clock: Clock = time.monotonic) -> None:
        self.control = control
        self.clock = clock
        self._lock = threading.Lock()
        self._kept: dict[str | None, tuple[float, str]] = {}

    def page(self, span: str | None) -> str:
        """The page, not older than it may be. Raises what `collect` raises."""
        if span is not None:
            named(span)
        with self._lock:
            until, text = self._kept.get(span, (0.0, ""))
            begun = self.clock()
            if begun < until:
                return text
            text = render(collect(self.control, span=span), refresh_seconds=REFRESH_SECONDS)
            took = self.clock() - begun
            self._kept[span] = (self.clock() + max(FRESH_SECONDS, SHARE * took), text)
            return text


def application(control: Control, token: str | None, *, clock: Clock = time.monotonic) -> Starlette:
    """`/` is the page, `/healthz` says that the process lives. `token` None: for this machine alone."""
    pages = Pages(control, clock=clock)

    async def page(request: Request) -> Response:
        refused = _refused(request, token)
        if refused is not None:
            return refused
        return await run_in_threadpool(_answer, pages, request.query_params.get("span"))

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("alive", headers=HEADERS)

    return Starlette(routes=[Route("/", page), Route("/healthz", healthz)])


def serve(control: Control, host: str, port: int, token: str | None, tell: Callable[[str], None]) -> None:
    """Until interrupted. Raises UsageError where others could see the page without a token."""
    import uvicorn

    refuse_open(host, token)
    listening = bind(host, port)
    address, bound = listening.getsockname()[:2]
    tell(f"http://{f'[{address}]' if ':' in address else address}:{bound}/ (Ctrl-C ends it)")
    config = uvicorn.Config(
        application(control, token), log_config=None, access_log=False, server_header=False, ws="none"
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def refuse_open(host: str, token: str | None) -> None:
    """UsageError unless `host` is loopback or a token is asked for."""
    if token is None and not _is_loopback(host):
        raise UsageError(
            f"{host} can be reached from other machines, and the page names users and documents; add --token-file"
            " FILE, or leave out --host to listen on this machine alone"
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; `port` 0 takes a free one."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise PreconditionError(
            f"cannot listen on {host} port {port}: {error.strerror}; name another --port"
        ) from error


def read_token(path: Path) -> str:
    """The token in the file, without the white space around it."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as a token: {error}") from error
    if len(token) < TOKEN_LENGTH:
        raise UsageError(
            f"the token in {path} has fewer than {TOKEN_LENGTH} characters; `openssl rand -hex 32` makes one"
        )
    return token


def _answer(pages: Pages, span: str | None) -> Response:
    try:
        return HTMLResponse(pages.page(span), headers=HEADERS)
    except UsageError as error:
        return PlainTextResponse(str(error), 404, headers=HEADERS)
    except (RolloutError, StoreError) as error:
        log.warning("dashboard.collect.failed", error=str(error))
        return HTMLResponse(render_failure(str(error), refresh_seconds=REFRESH_SECONDS), 503, headers=HEADERS)


def _refused(request: Request, token: str | None) -> Response | None:
    if token is None:
        # A page elsewhere may have its name point at 127.0.0.1; then its scripts could read this one.
        if _host(request) in LOCAL_NAMES:
            return None
        return PlainTextResponse("ask for it as localhost\n", 421, headers=HEADERS)
    if any(hmac.compare_digest(given, token.encode()) for given in _given(request)):
        return None
    asked = {**HEADERS, "WWW-Authenticate": 'Basic realm="rollout dashboard: the token is the password"'}
    return PlainTextResponse("the token is missing or wrong\n", 401, headers=asked)


def _given(request: Request) -> list[bytes]:
    """The token of `Authorization: Bearer`, or the password that a browser asked for."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return [value.strip().encode()]
    if scheme.lower() == "basic":
        with suppress(binascii.Error):
            return [base64.b64decode(value, validate=True).partition(b":")[2]]
    return []


def _host(request: Request) -> str:
    """The name that was asked for, without its port."""
    host = request.headers.get("host", "").lower()
    return host if host.endswith("]") else host.rpartition(":")[0] or host


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}; name an address of this machine") from error
    return all(ipaddress.ip_address(str(each[4][0]).partition("%")[0]).is_loopback for each in found)
