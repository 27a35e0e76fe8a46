"""Logs: one JSON object a line on stdout, with the request's id, and without what must not be there.

Our own events and those of libraries go the same way. Not logged: passwords, tokens and keys; the text
of documents, questions and answers; URLs with their query, which is why uvicorn's access log is off and
the middleware writes its own line a request.
"""

from __future__ import annotations

import logging
import logging.config
import re
import sys
import traceback
from collections.abc import MutableMapping
from typing import Any

import structlog
from sqlalchemy.exc import DBAPIError
from structlog.typing import Processor

SECRET_NAMES = re.compile(r"password|passwd|secret|token|authorization|api_?key|cookie", re.IGNORECASE)
SECRET_VALUES = re.compile(
    r"(?P<before>://[^\s:/@]*:)[^\s/@]+(?=@)"
    r"|(?P<name>\bpassword=|\bBearer\s+)[^\s&'\"]+"
    r"|\bsk-[A-Za-z0-9_\-]{8,}|\beyJ[\w\-]+\.[\w\-]+\.[\w\-]+",
    re.IGNORECASE,
)
LONGEST_VALUE = 1_000
FRAMES = 20
# They log addresses with their query, or texts at the level DEBUG.
TALKATIVE = ("httpx", "httpcore", "httpx2", "httpcore2", "openai", "urllib3", "langsmith", "asyncio")

Event = MutableMapping[str, Any]


def configure(level: str = "INFO") -> None:
    """Take over structlog and the standard library's logging for this process."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        describe_exception,
        without_secrets,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(ensure_ascii=True, default=repr),
        ],
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=level, force=True)
    _quieten()


def _quieten() -> None:
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def describe_exception(_logger: object, _method: str, event: Event) -> Event:
    """`exc_info` as types, first lines and places: a driver's further lines quote stored values."""
    info = event.pop("exc_info", None)
    error = info if isinstance(info, BaseException) else sys.exc_info()[1] if info is True else None
    if isinstance(info, tuple):
        error = info[1]
    if error is not None:
        event["exception"] = [_described(one) for one in _chain(error)]
    return event


def without_secrets(_logger: object, _method: str, event: Event) -> Event:
    """Masks what is secret by its name or by its form, and cuts what is long."""
    for name, value in event.items():
        event[name] = "***" if SECRET_NAMES.search(name) else _masked(value)
    return event


def first_line(error: BaseException) -> str:
    """What an exception says, without the values that drivers append."""
    told = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return str(told).strip().partition("\n")[0]


def _masked(value: Any) -> Any:
    match value:
        case str():
            return _shortened(SECRET_VALUES.sub(lambda found: f"{found['before'] or found['name'] or ''}***", value))
        case dict():
            return {key: "***" if SECRET_NAMES.search(str(key)) else _masked(one) for key, one in value.items()}
        case list() | tuple():
            return [_masked(one) for one in value]
        case _:
            return value


def _shortened(value: str) -> str:
    """The beginning and, since tracebacks tell the most there, the end."""
    half = LONGEST_VALUE // 2
    return value if len(value) <= LONGEST_VALUE else f"{value[:half]} ... {value[-half:]}"


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _described(error: BaseException) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    return {
        "type": type(error).__name__,
        "says": first_line(error),
        "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
