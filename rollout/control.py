"""What every command works on: the database as the bulk role, the FAISS directory, the profile in force.

Opened by a command, closed at its end; it takes no part in the fleet.
"""

from __future__ import annotations

import getpass
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import psycopg
from langchain_core.embeddings import Embeddings

from rollout.errors import PreconditionError
from rollout.profiles import Profile, profile_in_force
from rollout.settings import RolloutSettings
from src.database import DatabaseError, Role, conninfo
from src.tools.rag_tools.embeddings import embedder
from src.tools.rag_tools.migration import flags
from src.tools.rag_tools.migration.faiss_files import open_files
from src.tools.rag_tools.migration.faiss_sqlite import JOURNAL_FILE
from src.tools.rag_tools.migration.faiss_store import FaissStore
from src.tools.rag_tools.migration.flags import View
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.settings import migration_settings
from src.tools.rag_tools.migration.stores import Stores
from src.tools.rag_tools.pgvector_store import Connection, Pool, check_extension, open_pool, unavailable
from src.tools.rag_tools.store import StoreError

POOL_SIZE = 4
CONNECT_SECONDS = 10
NO_TABLES = "the migration's tables are missing; run `alembic upgrade head` with DATABASE_ADMIN_URL set"

THERE = "SELECT to_regtype('vector')::text, to_regclass('public.rollout_transitions')::text"

# Documents that only an index can hold: of the old release, or written to FAISS by this one.
IN_FAISS = """
SELECT count(*) FROM documents d WHERE d.status = 'ready' AND (
    NOT EXISTS (SELECT FROM vector_ledger l WHERE l.document_id = d.id)
    OR EXISTS (SELECT FROM vector_ledger l WHERE l.document_id = d.id AND l.store = 'faiss'
               AND l.wanted = 'present' AND l.state = 'done'))
"""


class _WhenAsked(Embeddings):
    """The configured embedding provider, made at the first text: most commands embed nothing."""

    @cached_property
    def _made(self) -> Embeddings:
        return embedder()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._made.embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        return self._made.embed_query(text)


@dataclass
class Control:
    """Lazily opened parts; the FAISS directory is read only when a command needs it."""

    pool: Pool
    profile: Profile
    embeddings: Embeddings = field(default_factory=_WhenAsked)

    @cached_property
    def router(self) -> Router:
        """A router that was not started: it settles and reads, and the fleet does not know it."""
        self._read_before_writing()
        try:
            router = Router(self.pool, self.embeddings)
            with self.connection() as connection:
                row = connection.execute("SELECT coalesce(max(version), 0) FROM owner_assignments").fetchone()
            router.load_owners(0 if row is None else int(row[0]))
            router.stores.faiss.load()
        except StoreError as error:
            raise PreconditionError(str(error)) from error
        return router

    @property
    def stores(self) -> Stores:
        return self.router.stores

    @property
    def faiss(self) -> FaissStore:
        return self.router.stores.faiss

    def reload_owners(self) -> None:
        """Take over an assignment made since the directory was opened."""
        self.__dict__.pop("router", None)

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """One autocommit connection as the bulk role; the driver's errors become PreconditionError."""
        try:
            with unavailable("command"), self.pool.connection() as connection:
                yield connection
        except StoreError as error:
            if isinstance(error.__cause__, psycopg.errors.UndefinedTable):
                raise PreconditionError(NO_TABLES) from error
            raise PreconditionError(str(error)) from error

    def view(self) -> View:
        """The last transition."""
        with self.connection() as connection:
            return flags.latest(connection)

    def _read_before_writing(self) -> None:
        """Opening a directory puts a journal into it; one that is refused is left as it was."""
        directory = migration_settings.FAISS_INDEX_PATH
        if (directory / JOURNAL_FILE).exists():
            return
        try:
            chunks = open_files(directory).content.chunks.docstore_ids
        except StoreError as error:
            raise PreconditionError(str(error)) from error
        with self.connection() as connection:
            (documents,) = connection.execute(IN_FAISS).fetchone() or (0,)
        if documents and not chunks:
            raise PreconditionError(
                f"{directory.absolute()} holds no index, but {documents} documents have nothing else that holds them;"
                " set FAISS_INDEX_PATH to the directory with index.faiss and index.pkl, or restore it"
            )

    def close(self) -> None:
        if "router" in self.__dict__:
            self.router.close()
        self.pool.close()


@contextmanager
def control() -> Iterator[Control]:
    """Connect as the bulk role. Raises PreconditionError on SQLite, or where PostgreSQL is away."""
    try:
        info = conninfo(Role.ROLLOUT)
        # A pool tries for a while and forgets why it failed, also where pgvector's types are missing.
        with psycopg.connect(info, autocommit=True, connect_timeout=CONNECT_SECONDS) as connection:
            vector, tables = connection.execute(THERE).fetchone() or (None, None)
            if vector is None:
                check_extension(connection)
        if tables is None:
            raise PreconditionError(NO_TABLES)
    except (DatabaseError, StoreError) as error:
        raise PreconditionError(str(error)) from error
    except psycopg.OperationalError as error:
        raise PreconditionError(
            f"PostgreSQL cannot be reached as {Role.ROLLOUT}; see that it runs, and that DATABASE_ROLLOUT_URL (or"
            " DATABASE_URL=embedded:PATH) is right"
        ) from error
    profile = profile_in_force()
    made = Control(open_pool(info, POOL_SIZE, name="rollout"), profile)
    try:
        yield made
    finally:
        made.close()


def actor() -> str:
    """Who acts, for the record: ROLLOUT_ACTOR, else user@host."""
    return RolloutSettings().ROLLOUT_ACTOR or f"{getpass.getuser()}@{socket.gethostname()}"
