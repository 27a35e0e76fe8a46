"""One run: the site, the rows, what was loaded so far, and what a figure gives back."""

from __future__ import annotations

import gc
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import Dataset
from benchmarks.peers import Peers
from benchmarks.site import Given, Site, adopt, save_legacy
from src.database import Role, url_of
from src.tools.rag_tools.migration.faiss_journal import Journal
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.settings import MigrationSettings

QUICK_CHUNKS = 10_000


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. `met` is None where there is no verdict. `figures`: what was measured, by name."""

    what: str
    goal: str
    ours: str
    raw: str
    peer: str
    met: bool | None
    figures: dict[str, float]


@dataclass
class Bench:
    """What every figure is given."""

    site: Site
    data: Dataset
    peers: Peers
    quick: bool
    loaded: str = ""
    """The database that the last backfill filled."""
    moved: Path = field(default_factory=Path)
    """The directory that it was filled from."""
    moving_seconds: float = 0.0
    peer_rows: int = 0
    """So many rows PGVector has written itself."""

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 3

    def questions(self, full: int) -> int:
        return max(20, full // 4) if self.quick else full

    @cached_property
    def legacy(self) -> Path:
        """The old release's directory; copied, never opened by this release."""
        directory = self.site.folder / "legacy_index"
        save_legacy(directory, self.data)
        return directory

    def directory(self) -> Path:
        """A fresh copy of the old release's directory."""
        copy = self.site.folder / f"faiss_index_{next(self.site.numbers)}"
        copy.mkdir()
        for file in self.legacy.iterdir():
            # The index is never written in place, so a link will do and costs no second copy.
            (copy / file.name).hardlink_to(file)
        # `assign-owners`, which comes before, has left its journal.
        Journal.open(copy).close()
        return copy

    def installation(self, stage: str = "dualwrite") -> str:
        """A new database in which pgvector is owed every document."""
        name = self.site.database()
        with self.site.connect(name, Role.OWNER) as connection:
            adopt(connection, self.data)
        self.site.step(name, stage)
        return name

    @cached_property
    def vectors_file(self) -> Path:
        path = self.site.folder / "vectors.npy"
        np.save(path, self.data.vectors)
        return path

    @cached_property
    def texts_file(self) -> Path:
        from benchmarks.loading import texts

        path = self.site.folder / "texts.jsonl"
        path.write_text("\n".join(texts(self)))
        return path

    def clear(self) -> None:
        """Drop what was loaded; the next size needs the room."""
        self.site.server.drop_database(self.loaded)
        for directory in (self.moved, self.legacy):
            shutil.rmtree(directory)

    def peer_database(self) -> str:
        """A database for PGVector: its URL."""
        name = "bench_peer"
        self.site.server.drop_database(name)
        self.site.server.create_database(name)
        return url_of(self.site.conninfo(name, Role.OWNER))

    @contextmanager
    def router(
        self, database: str, directory: Path, *, embeddings: Any = None, loops: bool = False, **settings: Any
    ) -> Iterator[Router]:
        """A started router, as one backend process has it."""
        configured = MigrationSettings(FAISS_INDEX_PATH=directory, **settings)
        with self.site.pool(database) as pool:
            router = Router(pool, embeddings or Given(self.data.vectors), settings=configured)
            router.start(loops=loops)
            try:
                yield router
            finally:
                # Without its loops it saves nothing, which would take as long as the measurement.
                router._loops.clear() if not loops else None
                router.close()
                del router
                # A router is part of a cycle and holds the whole index; the next one shall not come on top of it.
                gc.collect()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def times(ratio: float) -> str:
    return f"{ratio:.2f} x" if ratio < 10 else f"{ratio:.0f} x"


def ms(value: float) -> str:
    return f"{value:.2f} ms" if abs(value) < 10 else f"{value:.0f} ms"


Figure = Callable[[Bench], list[Row]]
