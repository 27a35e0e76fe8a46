"""Errors of the command, each with the exit code that tells a script what kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RolloutError(Exception):
    """Something failed that no other class names. `data` goes into the output of --json."""

    exit_code = 1
    data: Mapping[str, Any] = {}


class UsageError(RolloutError):
    """The command was asked for something that does not exist."""

    exit_code = 2


class RefusedError(RolloutError):
    """A gate or a rule refuses; the message has the numbers."""

    exit_code = 3


class InconclusiveError(RolloutError):
    """There is not enough evidence to decide."""

    exit_code = 4


class PreconditionError(RolloutError):
    """Something that must be there first is missing."""

    exit_code = 5
