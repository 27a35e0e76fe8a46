"""Single values of the old release's SQLite file, as PostgreSQL can hold them; and their checksum.

SQLite enforces no types, so a column may hold anything. Everything here is pure.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Boolean, Column, Double, Integer, String, Uuid

from src.models.columns import UtcDateTime, as_utc

MAX_INTEGER = 2**31 - 1
SHOWN_CHARACTERS = 40

Converter = Callable[[Any], Any]


class UnreadableError(Exception):
    """A value that its column cannot hold; `judge` turns it into the reason to set a row aside."""


@dataclass(slots=True)
class Checksum:
    """Counts rows and hashes them in the order they come; the same for both databases."""

    rows: int = 0
    _hash: Any = field(default_factory=hashlib.sha256)

    def add(self, row: Sequence[Any]) -> None:
        self.rows += 1
        self._hash.update(canonical(row))

    @property
    def sha256(self) -> str:
        return str(self._hash.hexdigest())


def canonical(row: Sequence[Any]) -> bytes:
    """A row as one line of JSON that does not depend on the database it came from."""
    return _CANONICAL.encode(row).encode() + b"\n"


def converter(column: Column[Any]) -> Converter:
    """What brings a value of SQLite to `column`'s type, or raises UnreadableError."""
    match column.type:
        case UtcDateTime():
            return moment
        case Boolean():
            return boolean
        case Integer():
            return integer
        case Double():
            return real
        case Uuid():
            return uuid_
        case String():
            return text
        case other:
            raise NotImplementedError(f"{column}: no conversion is written for {other!r}")


def integer(value: Any) -> int:
    match value:
        case int():
            number = value
        case float() if value.is_integer():
            number = int(value)
        case str() if value.isascii() and value.removeprefix("-").isdigit():
            number = int(value)
        case _:
            raise _unreadable(value, "an integer")
    if abs(number) > MAX_INTEGER:
        raise _unreadable(value, "an integer of 32 bits")
    return number


def real(value: Any) -> float:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    raise _unreadable(value, "a number")


def boolean(value: Any) -> bool:
    match value:
        case 1 | "1" | "t" | "true" | "True":
            return True
        case 0 | "0" | "f" | "false" | "False":
            return False
        case _:
            raise _unreadable(value, "true or false")


def moment(value: Any) -> datetime:
    """The old release wrote UTC without saying so."""
    try:
        return as_utc(datetime.fromisoformat(value))
    except (TypeError, ValueError, OverflowError) as error:
        raise _unreadable(value, "a date and time") from error


def uuid_(value: Any) -> uuid.UUID:
    try:
        return uuid.UUID(bytes=value) if isinstance(value, bytes) else uuid.UUID(value)
    except (AttributeError, TypeError, ValueError) as error:
        raise _unreadable(value, "a UUID") from error


def text(value: Any) -> str:
    """With a space for NUL and the replacement character for what is not UTF-8."""
    raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "replace").replace("\0", " ")


def _unreadable(value: Any, wanted: str) -> UnreadableError:
    shown = repr(value)
    return UnreadableError(f"is {shown[:SHOWN_CHARACTERS]}, not {wanted}")


def _plain(value: Any) -> str:
    match value:
        case datetime():
            return value.astimezone(UTC).isoformat(timespec="microseconds")
        case uuid.UUID():
            return str(value)
        case _:
            raise TypeError(f"no canonical form is written for {type(value).__name__}")


_CANONICAL = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_plain)
