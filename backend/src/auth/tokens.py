"""Bearer tokens: JSON Web Tokens that say who asks, and nothing else.

Signed with SECRET_KEY by HMAC-SHA-256. The algorithm is fixed here and never read from the token.
A new SECRET_KEY ends all tokens; nothing is stored, so there is nothing to lose in a crash.
"""

from __future__ import annotations

import time
from datetime import timedelta

import jwt

from src.auth.errors import SecretKeyError, TokenExpiredError, TokenRefusedError
from src.config import DEFAULT_SECRET_KEY, Settings

ALGORITHM = "HS256"
MINIMUM_KEY_BYTES = 32
"""RFC 7518, section 3.2: a key at least as long as the hash."""
LARGEST_ID = 2**31 - 1
_CLAIMS = ["exp", "iat", "sub"]


def check_secret_key(settings: Settings) -> None:
    """Raises SecretKeyError where tokens could be forged by whoever has read our source."""
    key = settings.SECRET_KEY.get_secret_value()
    advice = "; set SECRET_KEY to the output of `openssl rand -hex 32`"
    if len(key.encode()) < MINIMUM_KEY_BYTES:
        raise SecretKeyError(f"SECRET_KEY is shorter than {MINIMUM_KEY_BYTES} bytes{advice}")
    if key == DEFAULT_SECRET_KEY and settings.ENVIRONMENT != "development":
        raise SecretKeyError(
            f"SECRET_KEY is the default, which everybody knows{advice},"
            " or ENVIRONMENT=development on a machine that serves nobody else"
        )


def issue_token(user_id: int, key: str, lifetime: timedelta, *, now: float | None = None) -> str:
    """A token for the user, valid from `now` (seconds since 1970) on."""
    issued = int(time.time() if now is None else now)
    claims = {"sub": str(user_id), "iat": issued, "exp": issued + int(lifetime.total_seconds())}
    return jwt.encode(claims, key, ALGORITHM)


def read_token(token: str, key: str) -> int:
    """The user's id. Raises TokenExpiredError, TokenRefusedError."""
    try:
        claims = jwt.decode(token, key, algorithms=[ALGORITHM], options={"require": _CLAIMS})
    except jwt.ExpiredSignatureError as error:
        raise TokenExpiredError("the token has expired: log in again") from error
    except (jwt.InvalidTokenError, ValueError) as error:
        raise TokenRefusedError("the token is not valid: log in again") from error
    return _user_id(str(claims["sub"]))


def _user_id(subject: str) -> int:
    if not (subject.isascii() and subject.isdigit() and 0 < int(subject[:11]) <= LARGEST_ID):
        raise TokenRefusedError("the token names no user: log in again")
    return int(subject)
