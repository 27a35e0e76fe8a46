"""Why somebody is not let in. The messages are shown to whoever asked, so they tell nothing apart
that helps to guess an account."""

from __future__ import annotations


class AuthError(Exception):
    """A request was not let in; the message says what to do next."""


class TokenMissingError(AuthError):
    """The request carries no bearer token."""


class TokenRefusedError(AuthError):
    """The token is forged, damaged, or lacks what every token of ours has."""


class TokenExpiredError(AuthError):
    """The token was ours, and its time is over."""


class LoginRefusedError(AuthError):
    """No such account, or not its password: which of the two is not said."""


class AccountClosedError(AuthError):
    """The account of a valid token was closed or removed since it was issued."""


class AccountExistsError(AuthError):
    """The e-mail address or the name is taken."""


class TooManyAttemptsError(AuthError):
    """Too many failed log-ins; `retry_after` says in how many seconds one may be tried again."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many failed log-ins: try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after


class SecretKeyError(AuthError):
    """SECRET_KEY is not fit to sign tokens with; the backend does not start."""
