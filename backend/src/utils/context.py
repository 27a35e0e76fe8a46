"""Who the current request belongs to; set by authentication, read by the tools, never by the model.

There is no default user: an unset identity is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_user_id: ContextVar[int | None] = ContextVar("user_id", default=None)
_session_id: ContextVar[str | None] = ContextVar("session_id", default=None)


class IdentityUnsetError(Exception):
    """A tool ran outside an authenticated request."""


def get_user_id() -> int:
    """The authenticated user's id. Raises IdentityUnsetError where none is set."""
    user_id = _user_id.get()
    if user_id is None:
        raise IdentityUnsetError("no user is set for this request; authenticate first (acting_as, or the bearer token)")
    return user_id


def set_session_id(session_id: str) -> None:
    _session_id.set(session_id)


def get_session_id() -> str | None:
    return _session_id.get()


@contextmanager
def acting_as(user_id: int) -> Iterator[None]:
    """Everything inside acts for `user_id`; the identity before is back afterwards."""
    token = _user_id.set(user_id)
    try:
        yield
    finally:
        _user_id.reset(token)
