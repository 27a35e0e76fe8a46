"""From the bearer token to the context variable that everything below reads: `src.utils.context`.

A plain ASGI middleware, because a context variable set here is seen by the endpoint, by the threads
that run it and its dependencies, and by a streamed answer until its end; one set in a dependency that
runs in a thread is seen by nobody else. Requests below /api/ without a valid token are answered here,
before a byte of their body is read.
"""

from __future__ import annotations

import structlog
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from src.auth.errors import AuthError, TokenMissingError
from src.auth.tokens import read_token
from src.utils.context import acting_as

PROTECTED = "/api/"

log = structlog.get_logger(__name__)


class IdentityMiddleware:
    """Runs each request below /api/ as the user of its token."""

    def __init__(self, app: ASGIApp, *, key: str) -> None:
        self.app = app
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PROTECTED):
            await self.app(scope, receive, send)
            return
        try:
            user_id = read_token(bearer_token(Headers(scope=scope)), self.key)
        except AuthError as error:
            log.info("auth.token.refused", reason=type(error).__name__)
            await unauthenticated(error)(scope, receive, send)
            return
        with acting_as(user_id), bound_contextvars(user_id=user_id):
            await self.app(scope, receive, send)


def bearer_token(headers: Headers) -> str:
    """The token of the one Authorization header. Raises TokenMissingError."""
    given = headers.getlist("authorization")
    scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not token.strip():
        raise TokenMissingError("send `Authorization: Bearer <token>`; POST /auth/login gives a token")
    return token.strip()


def unauthenticated(error: AuthError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=401, headers={"WWW-Authenticate": "Bearer"})
