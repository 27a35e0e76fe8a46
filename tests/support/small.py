"""A small installation of the old release, made once a run and adopted step by step; each test gets a copy.

Three uploads of ada and ben that can be assigned, and one file name that dan and cleo both used.
"""

from __future__ import annotations

import pickle
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rollout.installation import Fate, Installation, Plan, make_installation
from src.database import Role
from src.embedded import EmbeddedServer
from src.tools.rag_tools.migration.faiss_store import FaissStore, Owner, Owners
from src.tools.rag_tools.migration.stages import Stage
from src.tools.rag_tools.pgvector_store import open_pool
from src.utils.file_lock import holding
from tests.support.database import Database
from tests.support.routers import HashEmbeddings, set_stage

PLANS = (
    Plan("ada", "heaps.docx", ("heapq",)),
    Plan("ben", "wrapping.docx", ("textwrap",)),
    Plan("dan", "report.docx", ("queue",), Fate.SEVERAL_USERS),
    Plan("ada", "names.docx", ("keyword",)),
    Plan("cleo", "report.docx", ("shelve",), Fate.SEVERAL_USERS),
)


@dataclass(frozen=True, slots=True)
class Small:
    """A copy of the installation in `folder`, and the database that it was brought to."""

    folder: Path
    database: Database
    installation: Installation

    @property
    def index(self) -> Path:
        return self.folder / "faiss_index"

    @property
    def quarantined(self) -> int:
        return sum(map(len, self.installation.quarantined.values()))

    def documents(self, name: str) -> list[int]:
        """The ids of the user's documents that chunks are assigned to."""
        user = self.installation.users[name]
        return [
            made.document_id
            for made in self.installation.uploads
            if made.user_id == user and made.fate is Fate.OWNED and made.document_id is not None
        ]

    def environment(self) -> dict[str, str]:
        """The settings with which a process works on it."""
        return {
            "DATABASE_URL": self.database.url(Role.APP),
            "DATABASE_ADMIN_URL": self.database.url(Role.OWNER),
            "DATABASE_ROLLOUT_URL": self.database.url(Role.ROLLOUT),
            "EMBEDDING_PROVIDER": "local",
            "FAISS_INDEX_PATH": "faiss_index",
            "UPLOAD_DIR": "uploads",
        }


def made_installation(postgres: EmbeddedServer, folder: Path) -> Installation:
    """A copy in `folder`, as the old release left it: nothing of the new one has seen it."""
    source = _once(postgres, "installation", _make)
    shutil.copytree(source / "files", folder, dirs_exist_ok=True)
    installation = _truth(source)
    return replace(installation, directory=folder)


@contextmanager
def installed(postgres: EmbeddedServer, template: str, folder: Path) -> Iterator[Small]:
    """In stage `off`: the tables are in PostgreSQL, no owner has been assigned."""
    source = _once(postgres, "installed", lambda path: _install(postgres, template, path))
    with _copied(postgres, source, "small_installed", folder) as small:
        yield small


@contextmanager
def filled(postgres: EmbeddedServer, template: str, folder: Path) -> Iterator[Small]:
    """In stage `dualwrite`: owners are assigned, and the backfill is done; nothing is verified yet."""
    source = _once(postgres, "filled", lambda path: _fill(postgres, template, path))
    with _copied(postgres, source, "small_filled", folder) as small:
        yield small


def _once(postgres: EmbeddedServer, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name, made by the first process of the run that asks."""
    place = postgres.home / f"small-{name}"
    with holding(postgres.home / f"small-{name}.lock"):
        if not place.exists():
            unfinished = place.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(place)
    return place


def _make(path: Path) -> None:
    installation = make_installation(path / "files", HashEmbeddings(), plans=PLANS)
    (path / "truth").write_bytes(pickle.dumps(installation))


def _truth(place: Path) -> Installation:
    truth: Installation = pickle.loads((place / "truth").read_bytes())
    return truth


def _install(postgres: EmbeddedServer, template: str, path: Path) -> None:
    from rollout.import_sql import import_sql

    source = _once(postgres, "installation", _make)
    shutil.copytree(source, path, dirs_exist_ok=True)
    postgres.drop_database("small_installed")
    postgres.create_database("small_installed", template)
    import_sql(
        f"sqlite:///{path / 'files' / 'victus.db'}", postgres.conninfo(Role.ROLLOUT, "small_installed"), execute=True
    )


def _fill(postgres: EmbeddedServer, template: str, path: Path) -> None:
    from rollout import owners
    from rollout.backfill import backfill

    source = _once(postgres, "installed", lambda place: _install(postgres, template, place))
    shutil.copytree(source, path, dirs_exist_ok=True)
    postgres.drop_database("small_filled")
    postgres.create_database("small_filled", "small_installed")
    store = FaissStore.open(path / "files" / "faiss_index")
    with open_pool(postgres.conninfo(Role.ROLLOUT, "small_filled"), 2, name="small") as pool:
        with pool.connection() as connection:
            owners.assign_owners(connection, owners.positions_of(store.base_positions()), actor="test", execute=True)
            set_stage(connection, Stage.DUALWRITE)
            rows = connection.execute(
                "SELECT docstore_id, user_id, document_id, ordinal FROM legacy_chunks WHERE status = 'assigned'"
            ).fetchall()
        store.set_owners(Owners(1, {name: Owner(*owner) for name, *owner in rows}))
        backfill(pool, store, execute=True, progress=lambda _: None)
    store.close()


@contextmanager
def _copied(postgres: EmbeddedServer, source: Path, template: str, folder: Path) -> Iterator[Small]:
    shutil.copytree(source / "files", folder, dirs_exist_ok=True, symlinks=True)
    database = Database(postgres, f"test_{uuid.uuid4().hex}")
    postgres.create_database(database.name, template)
    try:
        yield Small(folder, database, replace(_truth(source), directory=folder))
    finally:
        postgres.drop_database(database.name)
