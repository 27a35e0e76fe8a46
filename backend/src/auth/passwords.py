"""Passwords, kept as argon2id hashes with the library's recommended parameters.

One hash takes 64 MiB for its duration, so only a few are computed at once however many ask.
"""

from __future__ import annotations

import threading

import structlog
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError

MINIMUM_LENGTH = 8
MAXIMUM_LENGTH = 1024
AT_ONCE = 4

log = structlog.get_logger(__name__)

_hasher = PasswordHasher()
_room = threading.BoundedSemaphore(AT_ONCE)
# Of a password that nobody has: what an unknown account is compared with, so that it takes as long.
_NOBODYS = "$argon2id$v=19$m=65536,t=3,p=4$W2zZb1rtW19wNR66vrwmSA$3xx2sQQ1ctEgGw4t82bJ6lRclndIiuSR/2qNPdbqx/E"


def hash_password(password: str) -> str:
    """The hash to store."""
    with _room:
        return _hasher.hash(_encoded(password))


def is_password(password: str, stored: str | None) -> bool:
    """Whether `stored` is the hash of `password`. None (an account without one) takes as long."""
    with _room:
        try:
            return _hasher.verify(stored or _NOBODYS, _encoded(password)) and stored is not None
        except VerifyMismatchError:
            return False
        except (InvalidHashError, VerificationError) as error:
            # An older release may have hashed otherwise: its owner needs a new password.
            log.warning("auth.password.unreadable", error=type(error).__name__)
            return False


def is_outdated(stored: str) -> bool:
    """Whether a verified hash was made with weaker parameters than today's."""
    return _hasher.check_needs_rehash(stored)


def _encoded(password: str) -> bytes:
    return password.encode("utf-8", "surrogatepass")
