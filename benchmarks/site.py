"""A place to measure at: a durable embedded PostgreSQL of its own, and an installation of the old release.

Everything lies in one temporary folder, which goes at the end; a run that was killed leaves folder and server,
named `victus-bench-*`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
from langchain_core.embeddings import Embeddings

from benchmarks.data import Dataset
from src import embedded, embedded_cluster
from src.database import Role, url_of
from src.embedded import EmbeddedServer
from src.tools.rag_tools.pgvector_store import Pool, open_pool

ROOT = Path(__file__).resolve().parent.parent
# Durable as PostgreSQL ships it; sized as somebody would who has read its manual, on this machine.
SERVER_SETTINGS = {
    "shared_buffers": "4GB",
    "maintenance_work_mem": "1GB",
    "max_wal_size": "8GB",
}
TRANSITION = """
INSERT INTO rollout_transitions (id, stage, read_percent, read_threshold, shadow_sample_rate, actor, reason)
SELECT max(id) + 1, %s, %s, %s, %s, 'bench', 'bench' FROM rollout_transitions
"""


class Given(Embeddings):
    """Embeds nothing: each text gets the next of the vectors given, so that only the project is measured."""

    def __init__(self, vectors: Any) -> None:
        self.vectors = vectors
        self.calls = count()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.vectors[next(self.calls) % len(self.vectors)] for _ in texts]

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


@dataclass
class Site:
    """The server and the folder; `data` is what the present database and directory hold."""

    folder: Path
    server: EmbeddedServer
    numbers: Iterator[int] = field(default_factory=count)

    def database(self) -> str:
        """A new database at Alembic's head."""
        from alembic.config import Config

        from alembic import command

        name = f"bench_{next(self.numbers)}"
        self.server.create_database(name)
        config = Config(ROOT / "alembic.ini")
        config.attributes["url"] = url_of(self.server.conninfo(Role.OWNER, name))
        command.upgrade(config, "head")
        return name

    def conninfo(self, database: str, role: Role = Role.ROLLOUT) -> str:
        return self.server.conninfo(role, database)

    @contextmanager
    def connect(self, database: str, role: Role = Role.ROLLOUT) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(self.conninfo(database, role), autocommit=True) as connection:
            yield connection

    @contextmanager
    def pool(self, database: str, role: Role = Role.APP, size: int = 12) -> Iterator[Pool]:
        with open_pool(self.conninfo(database, role), size, name="bench") as pool:
            yield pool

    def superuser(self, database: str) -> psycopg.Connection[Any]:
        return psycopg.connect(self.server.superuser_conninfo(database), autocommit=True)

    def step(self, database: str, stage: str, percent: int = 0, sample_rate: float = 0.0) -> None:
        """The next transition, without gates."""
        with self.connect(database, Role.OWNER) as connection:
            connection.execute(TRANSITION, (stage, percent, percent, sample_rate))


@contextmanager
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="victus-bench-"))
    try:
        yield Site(folder, _server(folder / "server"))
    finally:
        embedded.leave(folder / "server")
        shutil.rmtree(folder, ignore_errors=True)


def _server(home: Path) -> EmbeddedServer:
    embedded_cluster.SETTINGS.update(SERVER_SETTINGS)
    return embedded.start(home)


# -- an installation of the old release

DOCUMENTS = "COPY documents (id, user_id, filename, path) FROM STDIN"
USERS = "INSERT INTO users (id, email, username) SELECT n, n || '@example.org', n::text FROM generate_series(1, %s) n"
ASSIGNED = """
COPY legacy_chunks (docstore_id, position, source, document_id, user_id, ordinal, status, reason) FROM STDIN
"""
OWED = """
INSERT INTO vector_ledger (document_id, store, user_id, wanted, state, next_attempt_at)
SELECT d.id, s.store, d.user_id, 'present', s.state, 'infinity'
FROM documents d CROSS JOIN (VALUES ('faiss', 'done'), ('pgvector', 'owed')) AS s (store, state)
"""


def save_legacy(directory: Path, data: Dataset) -> None:
    """The directory as LangChain's own FAISS.save_local writes it."""
    import faiss
    from langchain_community.docstore.in_memory import InMemoryDocstore
    from langchain_community.vectorstores import FAISS
    from langchain_core.documents import Document

    names = [str(id_) for id_ in data.ids]
    held = {
        names[at]: Document(page_content=data.content(at), metadata=data.metadata(document, at))
        for document in data.documents
        for at in document.positions
    }
    index = faiss.IndexFlatL2(data.vectors.shape[1])
    index.add(data.vectors)
    FAISS(Given(data.vectors), index, InMemoryDocstore(held), dict(enumerate(names))).save_local(str(directory))


def adopt(connection: psycopg.Connection[Any], data: Dataset) -> None:
    """Users, documents and owners as `import-sql` and `assign-owners` leave them; pgvector is owed everything."""
    cursor = connection.cursor()
    cursor.execute(USERS, (len(data.sizes),))
    with cursor.copy(DOCUMENTS) as copy:
        for document in data.documents:
            copy.write_row((document.id, document.user_id, f"{document.id}.pdf", document.source))
    cursor.execute("SELECT setval('documents_id_seq', %s)", (len(data.documents),))
    cursor.execute("INSERT INTO owner_assignments (actor, counts) VALUES ('bench', '{}')")
    with cursor.copy(ASSIGNED) as copy:
        for document in data.documents:
            for ordinal, at in enumerate(document.positions):
                owner = (document.id, document.user_id, ordinal, "assigned", "path")
                copy.write_row((str(data.ids[at]), at, document.source, *owner))
    cursor.execute(OWED)
    cursor.execute("ANALYZE")
