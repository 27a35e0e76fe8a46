"""Which failure gets which answer: one table, and `{"detail": ...}` for all of them.

Failures of PostgreSQL and of other services are told in our words; theirs, which name hosts and quote
values, go to the log.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from src.agent.errors import AgentBusyError, AgentUnavailableError, ConversationNotFoundError
from src.api.upload_files import UnsupportedTypeError, UploadTooLargeError
from src.auth.errors import (
    AccountClosedError,
    AccountExistsError,
    LoginRefusedError,
    TooManyAttemptsError,
)
from src.database import DatabaseError, DocumentsNeedPostgresError
from src.log import first_line
from src.tools.rag_tools.documents import DocumentNotFoundError
from src.tools.rag_tools.embeddings import (
    EmbeddingError,
    EmbeddingRefusedError,
    EmbeddingUnavailableError,
)
from src.tools.rag_tools.store import StoreError, normalise_text
from src.utils.context import IdentityUnsetError

log = structlog.get_logger(__name__)

AWAY = "the database is away or refused this; nothing was changed. Try again in a moment"
NO_DOCUMENTS = (
    "documents are not available: PostgreSQL or the vector store is away or refused this;"
    " nothing was acknowledged. Try again in a moment"
)
RETRY_SECONDS = "5"


class NotFoundError(Exception):
    """The user has nothing of that id; whether somebody else has is not said."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`detail` None: the error's own message, which was written for whoever asked."""

    status: int
    detail: str | None = None
    headers: tuple[tuple[str, str], ...] = ()


_RETRY = (("Retry-After", RETRY_SECONDS),)
_LOG_IN = (("WWW-Authenticate", "Bearer"),)

# Looked up along the error's base classes, the nearest first.
ANSWERS: dict[type[Exception], Answer] = {
    IdentityUnsetError: Answer(401, headers=_LOG_IN),
    LoginRefusedError: Answer(401, headers=_LOG_IN),
    AccountClosedError: Answer(401, headers=_LOG_IN),
    AccountExistsError: Answer(409),
    TooManyAttemptsError: Answer(429),
    NotFoundError: Answer(404),
    UploadTooLargeError: Answer(413),
    UnsupportedTypeError: Answer(415),
    DocumentNotFoundError: Answer(404),
    ConversationNotFoundError: Answer(404),
    DocumentsNeedPostgresError: Answer(503),
    AgentUnavailableError: Answer(503),
    AgentBusyError: Answer(503, headers=_RETRY),
    EmbeddingRefusedError: Answer(422, "the text cannot be embedded: put it into other words"),
    EmbeddingUnavailableError: Answer(503, "searching is not set up: see the service's log"),
    EmbeddingError: Answer(503, "the embedding service is away: try again in a moment", _RETRY),
    StoreError: Answer(503, NO_DOCUMENTS, _RETRY),
    DatabaseError: Answer(503, AWAY, _RETRY),
    OperationalError: Answer(503, AWAY, _RETRY),
    InterfaceError: Answer(503, AWAY, _RETRY),
    PoolTimeoutError: Answer(503, AWAY, _RETRY),
    DataError: Answer(422, "a value cannot be stored: leave out what is no text, and shorten it"),
    IntegrityError: Answer(409, "this was changed by somebody else meanwhile: look, and try again"),
}


def install(app: FastAPI) -> None:
    """Make the table, and what FastAPI raises itself, the app's answers."""
    for kind in ANSWERS:
        app.add_exception_handler(kind, answer_for)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)


async def answer_for(_request: Request, error: Exception) -> JSONResponse:
    answer = next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)
    level = log.warning if answer.status >= 500 else log.info
    level("http.request.refused", status=answer.status, kind=type(error).__name__, reason=_reason(error))
    headers = dict(answer.headers)
    if isinstance(error, TooManyAttemptsError):
        headers["Retry-After"] = f"{error.retry_after:.0f}"
    detail = answer.detail or str(error)
    return JSONResponse({"detail": detail}, status_code=answer.status, headers=headers)


def _reason(error: Exception) -> str:
    """For the log. What PostgreSQL refuses as data quotes it, so of that only the kind is told."""
    if isinstance(error, DataError | IntegrityError):
        return str(getattr(error.orig, "sqlstate", None) or type(error.orig).__name__)
    if isinstance(error, DBAPIError | EmbeddingError):
        return first_line(error)
    return str(error)


async def _http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"detail": error.detail}, status_code=error.status_code, headers=error.headers)


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    """Which field and why, without the value: it may be a password, or text that is no Unicode."""
    assert isinstance(error, RequestValidationError)
    told = [
        {
            "loc": [normalise_text(part) if isinstance(part, str) else part for part in one["loc"]],
            "msg": normalise_text(one["msg"]),
            "type": one["type"],
        }
        for one in error.errors()
    ]
    return JSONResponse({"detail": told}, status_code=422)
