"""The statements on `document_chunks` that the project's own code ran in this process, as the driver got them.

Citus distributes the table by user, and row-level security is the second wall and not the first: so each statement
on it names the user.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import psycopg

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = (f"{ROOT / 'backend'}/", f"{ROOT / 'rollout'}/")
DRIVER = ("psycopg", "contextlib")
LITERAL = re.compile(r"'[^']*'")

ran: dict[str, str] = {}
"""Where each was run from, by text."""


def names_no_user(statement: str) -> bool:
    """Whether it reads or writes rows of the table without naming `user_id`; a lock of the table does neither."""
    bare = LITERAL.sub("''", statement)
    return (
        re.search(r"\bdocument_chunks\b", bare) is not None
        and re.search(r"\buser_id\b", bare) is None
        and not bare.lstrip().upper().startswith("LOCK TABLE")
    )


def record() -> None:
    """From now on, every statement that goes through psycopg's cursors."""
    for cursor, method in (
        (psycopg.Cursor, "execute"),
        (psycopg.Cursor, "executemany"),
        (psycopg.Cursor, "copy"),
        (psycopg.ServerCursor, "execute"),
    ):
        setattr(cursor, method, _recording(getattr(cursor, method)))


def _recording(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def recorded(self: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        text = query if isinstance(query, str) else repr(query)
        if "document_chunks" in text:
            _note(text)
        return method(self, query, *arguments, **options)

    return recorded


def _note(text: str) -> None:
    """What a test itself asks of the table is its own affair."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in DRIVER:
        frame = frame.f_back  # type: ignore[assignment]  # None at the top
    if frame is not None and frame.f_code.co_filename.startswith(OURS):
        ran[text] = f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
