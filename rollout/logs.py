"""Where a command's log events go: JSON lines on the stream it is given, never on stdout, and without secrets."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog


def log_to(stream: TextIO) -> None:
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _as_the_backend_does,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(stream),
    )


def _as_the_backend_does(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A driver's error quotes the row that it refused, so of an exception only the first line is told."""
    # Loaded at the first event: most commands log nothing, and `--help` should answer at once.
    from src.log import describe_exception, without_secrets

    return without_secrets(logger, method, describe_exception(logger, method, event))
