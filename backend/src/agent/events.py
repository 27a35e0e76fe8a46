"""What a run of the agent tells while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class EventKind(StrEnum):
    STATUS = "status"
    TOOL = "tool"
    TOKEN = "token"  # noqa: S105 - a piece of text, no secret
    ERROR = "error"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event; a run tells `status` first, and `error` or `done` last."""

    kind: EventKind
    data: dict[str, Any]


Emit = Callable[[Event], None]
