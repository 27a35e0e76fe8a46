"""Locks between processes, by `flock` on a file. The kernel drops a dead process' locks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path


class Mode(Enum):
    SHARED = fcntl.LOCK_SH
    EXCLUSIVE = fcntl.LOCK_EX
    EXCLUSIVE_NOW = fcntl.LOCK_EX | fcntl.LOCK_NB
    """Raises BlockingIOError instead of waiting."""


def acquire(path: Path, mode: Mode) -> int:
    """The lock, as a file descriptor that programs started from here do not inherit.

    Closing it gives the lock up, except that a child forked off meanwhile still has its share.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, mode.value)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def holding(path: Path) -> Iterator[None]:
    """Runs the block while no other process (or thread) holds the lock of that file."""
    descriptor = acquire(path, Mode.EXCLUSIVE)
    try:
        yield
    finally:
        os.close(descriptor)
