"""The installation that is attacked: a database, a FAISS directory, uploads; and what must hold of it afterwards.

It remembers what was promised: which uploads and deletions were acknowledged. `settled_and_whole` lets fresh
processes settle what is owed and then looks past every router at what the two stores, the ledger and the upload
folder hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from rollout.verify import verify
from src.database import Role
from src.tools.rag_tools.documents import Document
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.settings import MigrationSettings
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from src.tools.rag_tools.pgvector_store import open_pool
from tests.acceptance.faults.victim import Accident
from tests.acceptance.faults.victims import Ended, Victims
from tests.support.routers import HashEmbeddings, set_stage

CHUNKS = 2
ROUNDS = 8
USERS = 3
MAKE_USERS = """
INSERT INTO users (email, username, is_active, is_verified, provider, created_at)
SELECT 'user' || number || '@example.org', 'user' || number, true, true, 'local', now()
FROM generate_series(1, %s) AS number RETURNING id
"""

# Instead of waiting: leases and backoff are over, and what was left half done is old.
TIME_PASSES = (
    "UPDATE vector_ledger SET next_attempt_at = clock_timestamp() - interval '1 second' WHERE state = 'owed'",
    "UPDATE documents SET updated_at = now() - interval '10 minutes' WHERE updated_at > now() - interval '2 minutes'",
)
OPEN = """
SELECT (SELECT count(*) FROM vector_ledger WHERE state <> 'done' AND store = ANY (%s))
     + (SELECT count(*) FROM documents WHERE status = 'deleted' AND path <> '')
     + (SELECT count(*) FROM documents WHERE status IN ('received', 'indexing'))
"""
WHY = (
    "SELECT document_id, store, wanted, state, last_error FROM vector_ledger WHERE state <> 'done' AND store = ANY (%s)"
)
ROWS = "SELECT filename, id, user_id, status FROM documents WHERE status <> 'deleted'"
DELETED = "SELECT id, path FROM documents WHERE status = 'deleted'"
HELD = "SELECT document_id, count(*) FROM document_chunks GROUP BY document_id"


@dataclass
class Promised:
    """One upload, and what was said about it. `id` is known where somebody was told."""

    name: str
    user: int
    id: int | None = None
    acknowledged: bool = False
    deleting: bool = False
    deleted: bool = False


class HalfRouter(Router):
    """Its deletions end once they are intended, as if the process had died then."""

    def _erase(self, document: Document) -> None:
        pass


@dataclass
class Site:
    """`database`: a test's own. `uploads` and `faiss` may lie on disks of their own."""

    database: Any
    victims: Victims
    uploads: Path
    faiss: Path
    users: list[int] = field(default_factory=list)
    promised: dict[str, Promised] = field(default_factory=dict)
    stage: Stage = Stage.OFF
    conninfo: str | None = None
    """Where victims find PostgreSQL, if not where it is."""

    def __post_init__(self) -> None:
        self.uploads.mkdir(parents=True, exist_ok=True)
        with self.connected() as connection:
            self.users = [row[0] for row in connection.execute(MAKE_USERS, (USERS,))]

    # -- doing

    @contextmanager
    def connected(self) -> Iterator[psycopg.Connection[Any]]:
        """As the superuser, whom row-level security does not bind."""
        with psycopg.connect(self.database.superuser_conninfo(), autocommit=True) as connection:
            yield connection

    def go_to(self, stage: Stage) -> int:
        with self.connected() as connection:
            self.stage = stage
            return set_stage(connection, stage, 100 if stage is Stage.LIVE else 0)

    def new(self, kind: str = "note") -> Promised:
        """A file of two chunks."""
        number = len(self.promised)
        made = Promised(f"{self.stage}-{kind}-{number}.md", self.users[number % USERS])
        self.promised[made.name] = made
        self.path(made).write_text(_text(made.name), encoding="utf-8")
        return made

    def path(self, document: Promised) -> Path:
        return self.uploads / document.name

    def request(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return {
            "operation": operation,
            "conninfo": self.conninfo or self.database.conninfo(Role.APP),
            "faiss": str(self.faiss),
            "arguments": arguments,
        }

    def upload(
        self, accident: Accident | None = None, *, kind: str = "upload", kill_after: float | None = None
    ) -> tuple[Promised, Ended]:
        """`kind`: upload, or post."""
        document = self.new(kind)
        request = self.request(kind, path=str(self.path(document)), user=document.user)
        ended = self.victims.run(request, accident, kill_after)
        self.heard(document, ended)
        return document, ended

    def heard(self, document: Promised, ended: Ended) -> None:
        """The acknowledgement of an upload, if there was one."""
        document.acknowledged = ended.acknowledged is not None
        document.id = ended.acknowledged

    def delete(self, document: Promised, accident: Accident | None = None, kill_after: float | None = None) -> Ended:
        request = self.request("delete", document=document.id, user=document.user)
        document.deleting = True
        ended = self.victims.run(request, accident, kill_after)
        document.deleted = ended.acknowledged is not None
        return ended

    @contextmanager
    def router(self, kind: type[Router] = Router) -> Iterator[Router]:
        """In this process; for what is not attacked."""
        with open_pool(self.database.conninfo(Role.APP), 4, name="site") as pool:
            router = kind(pool, HashEmbeddings(), settings=MigrationSettings(FAISS_INDEX_PATH=self.faiss))
            router.start(loops=False)
            try:
                yield router
            finally:
                router.close()

    def uploaded(self, router: Router) -> Promised:
        """A document that is simply there."""
        document = self.received(router)
        router.index(document.id or 0)
        return document

    def received(self, router: Router) -> Promised:
        """One that is owed to all."""
        document = self.new("received")
        document.id = router.receive(document.user, self.path(document), document.name)
        document.acknowledged = True
        return document

    def time_passes(self) -> None:
        with self.connected() as connection:
            for statement in TIME_PASSES:
                connection.execute(statement)

    def settle(self, accident: Accident | None = None, kill_after: float | None = None) -> Ended:
        self.time_passes()
        return self.victims.run(self.request("settle"), accident, kill_after)

    # -- what must hold

    def settled_and_whole(self) -> None:
        """Settles, as the backend's loops would in time, and looks whether every promise was kept."""
        self._settle_all()
        self._look()

    def _settle_all(self) -> None:
        for _ in range(ROUNDS):
            ended = self.settle()
            assert not ended.killed
            assert ended.error is None, ended.error
            with self.connected() as connection:
                writes = list(ROUTING[self.stage].writes)
                if connection.execute(OPEN, (writes,)).fetchone() == (0,):
                    return
        with self.connected() as connection:
            raise AssertionError(f"still owed after settling: {connection.execute(WHY, (writes,)).fetchall()}")

    def _look(self) -> None:
        with self.connected() as connection:
            rows = {name: (number, user, status) for name, number, user, status in connection.execute(ROWS)}
            gone = dict(connection.execute(DELETED).fetchall())
            held = {Store.PGVECTOR: dict(connection.execute(HELD).fetchall())}
        with self.router() as router:
            faiss = router.stores.faiss
            numbers = [number for number, _, _ in rows.values()] + list(gone)
            held[Store.FAISS] = {number: len(faiss.document(number)) for number in numbers}
            for document in self.promised.values():
                self._kept(document, rows.get(document.name), held)
            for store in ROUTING[self.stage].writes:
                assert not [number for number in gone if held[store].get(number)], f"{store} holds deleted documents"
                self._found(router, store)
            with open_pool(self.database.conninfo(Role.ROLLOUT), 2, name="verify") as pool:
                report = verify(pool, faiss, progress=lambda _: None)
        assert report.found == [], "verify finds differences"
        self._files(rows)

    def _kept(self, document: Promised, row: tuple[int, int, str] | None, held: dict[Store, dict[int, int]]) -> None:
        """Acknowledged: there and whole, or deleted. Not acknowledged: whole or absent."""
        if row is None:
            assert document.deleting or not document.acknowledged, f"{document.name} was acknowledged and is lost"
            return
        number, user, status = row
        assert user == document.user
        assert not document.deleted, f"{document.name} was deleted and is {status}"
        assert status == "ready" or (status == "failed" and not document.acknowledged), f"{document.name} is {status}"
        for store in ROUTING[self.stage].writes:
            chunks = held[store].get(number, 0)
            assert chunks == (CHUNKS if status == "ready" else 0), (
                f"{store} holds {chunks} of {document.name}, {status}"
            )

    def _found(self, router: Router, store: Store) -> None:
        """By searching it for their text, as their users would."""
        for document in self.promised.values():
            if document.acknowledged and not document.deleting:
                vector = router.embeddings.embed_query(_text(document.name)[:_FIRST].strip())
                hits = router.stores.search((store,), document.user, _array(vector), 1, frozenset())
                assert hits, f"{document.name} is not found in {store}"
                assert hits[0].document_id == document.id, f"{document.name} is not found in {store}"

    def _files(self, rows: dict[str, tuple[int, int, str]]) -> None:
        """Of what was deleted there is no upload, no kept result and no half of one."""
        names = [path.name for path in self.uploads.iterdir()]
        for document in self.promised.values():
            if document.deleting and document.name not in rows:
                left = [name for name in names if name.startswith(document.name)]
                assert left == [], f"left of a deleted document: {left}"


_FIRST = 900


def _text(name: str) -> str:
    """Two chunks: a paragraph each, nearly as long as a chunk may be."""
    first = f"{name} begins. " + "a" * (_FIRST - len(name) - 9)
    return f"{first}\n\n{name} ends. " + "b" * 600


def _array(vector: Any) -> Any:
    import numpy as np

    return np.array(vector, np.float32)


__all__ = ["CHUNKS", "HalfRouter", "HashEmbeddings", "Promised", "Site"]
