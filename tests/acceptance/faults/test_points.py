"""No operation of the write path lies outside a fault point: what has no name, nobody can kill at."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from src.tools.rag_tools import faults
from src.tools.rag_tools.migration.stages import Stage
from tests.acceptance.faults.site import HalfRouter, Site
from tests.acceptance.faults.test_kills import owe

pytestmark = pytest.mark.migration

CHANGES = ("os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
READS = ("SELECT", "PRAGMA", "\nSELECT")
PRODUCTION = "/src/tools/rag_tools/"


class Watch:
    """Notes each operation of production code that lies outside a point, with the line that did it."""

    def __init__(self) -> None:
        self.outside: set[str] = set()
        self.seen: set[str] = set()
        self.on = False
        self._here = threading.local()
        sys.addaudithook(self._audit)  # nothing can remove it; it does nothing once `on` is over

    @contextmanager
    def hook(self, point: str) -> Iterator[None]:
        self.seen.add(point)
        self._here.depth = self._depth() + 1
        try:
            yield
        finally:
            self._here.depth -= 1

    def _depth(self) -> int:
        depth: int = self._here.__dict__.get("depth", 0)
        return depth

    def note(self, what: str) -> None:
        if not self.on or self._depth():
            return
        lines = [frame for frame in traceback.extract_stack() if PRODUCTION in frame.filename]
        if lines:
            where = lines[-1]
            self.outside.add(f"{what} in {where.filename.rpartition('/')[2]}:{where.name}: {where.line}")

    def wrapped(self, what: str, real: Callable[..., Any], noted: Callable[..., bool] = lambda *_: True) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if noted(*arguments):
                self.note(what)
            return real(*arguments, **options)

        return call

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in CHANGES:
            self.note(f"{event} {arguments[0]}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            self.note(f"open to write {arguments[0]}")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    made = Watch()

    class Journal(sqlite3.Connection):
        def execute(self, statement: str, *rest: Any) -> Any:
            if not statement.startswith(READS):
                made.note(f"sqlite {statement[:30]}")
            return super().execute(statement, *rest)

    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **o: real(*a, **{**o, "factory": Journal}))
    for owner, name in (
        (psycopg.Cursor, "execute"), (psycopg.Cursor, "executemany"), (psycopg.Cursor, "copy"),
        (psycopg.Transaction, "__enter__"), (psycopg.Transaction, "__exit__"), (psycopg.Connection, "commit"),
        (os, "fsync"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, made.wrapped(name, getattr(owner, name)))
    monkeypatch.setattr(faults, "hook", made.hook)
    yield made
    made.on = False


@pytest.mark.parametrize("stage", [Stage.OFF, Stage.DUALWRITE, Stage.COMPLETE], ids=str)
def test_every_operation_of_the_write_path_lies_within_a_fault_point(site: Site, watch: Watch, stage: Stage) -> None:
    site.go_to(stage)
    with site.router(HalfRouter) as half, site.router() as router:
        owe(site, half)
        site.time_passes()
        leaving = site.uploaded(router)
        watch.on = True
        site.uploaded(router)
        router.delete(leaving.user, leaving.id or 0)
        router.resume()
        router.stores.faiss.save()
        watch.on = False
    assert sorted(watch.outside) == []
    assert {"upload.intent", "delete.intent", "settle.claim", "kept.link"} <= watch.seen


def test_an_operation_outside_of_any_point_is_noticed(
    site: Site, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.go_to(Stage.DUALWRITE)

    @contextmanager
    def nothing(point: str) -> Iterator[None]:
        yield

    with site.router() as router:
        monkeypatch.setattr(faults, "point", nothing)
        watch.on = True
        site.uploaded(router)
        watch.on = False
    assert any("kept.py" in each for each in watch.outside)
    assert any("documents.py" in each for each in watch.outside)
