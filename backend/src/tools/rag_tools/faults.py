"""Named places where a process may die, stall, or find a store away: each operation of the write path has one.

A test may take the place of `hook` and do all that there, before an operation or after it. Nothing does so in
production, where a point costs one comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

hook: Callable[[str], AbstractContextManager[object]] | None = None


@contextmanager
def point(name: str) -> Iterator[None]:
    """Around one operation on a store or a file; `name` is `part.act`. Points may lie within each other."""
    if hook is None:
        yield
        return
    with hook(name):
        yield
