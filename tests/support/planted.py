"""Users with chunks in both stores, faults planted in one of them, and which answers must then differ.

What each store holds is kept a second time, as plain arrays, so that a test knows the two right answers to a
question without asking either store.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

import numpy as np
import psycopg

from src.tools.rag_tools.migration import ledger
from src.tools.rag_tools.migration.causes import Cause
from src.tools.rag_tools.migration.evidence import Read
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.migration.targeting import bucket
from src.tools.rag_tools.store import DIMENSION, Chunk, Vector, chunk_id
from tests.support.routers import set_stage

K = 3
DOCUMENT = """
INSERT INTO documents (user_id, filename, path, status, created_at, updated_at)
VALUES (%s, 'planted.md', '', 'ready', now(), now()) RETURNING id
"""
# A comparison takes what changed within its last second for `stale`.
LONG_AGO = "UPDATE vector_ledger SET changed_at = changed_at - interval '1 hour'"

Content = dict[UUID, Chunk]


@dataclass
class Planted:
    """The users' chunks as each store holds them now, and the reads that were shadowed."""

    database: Any
    router: Router
    superuser: psycopg.Connection[Any]
    """Row-level security holds even the table's owner."""
    held: dict[Store, dict[int, Content]] = field(default_factory=lambda: {store: {} for store in Store})
    reads: list[Read] = field(default_factory=list)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    def __post_init__(self) -> None:
        self.router.shadow.offer = self.reads.append  # type: ignore[assignment, method-assign]

    # -- what is there

    def add(self, user_id: int, vectors: Sequence[Vector], *, per_document: int = 3) -> list[Chunk]:
        """The user's chunks with these vectors, in new documents, in both stores."""
        made: list[Chunk] = []
        for start in range(0, len(vectors), per_document):
            made += self._document(user_id, vectors[start : start + per_document])
        for store in Store:
            self.held[store].setdefault(user_id, {}).update({chunk.id: chunk for chunk in made})
        return made

    def _document(self, user_id: int, vectors: Sequence[Vector]) -> list[Chunk]:
        with self.router.pool.connection() as connection, connection.transaction():
            row = connection.execute(DOCUMENT, (user_id,)).fetchone()
            assert row is not None
            document_id = int(row[0])
            ledger.intend(connection, document_id, user_id)
        contents = [f"Chunk {ordinal} of document {document_id}." for ordinal in range(len(vectors))]
        chunks = [
            Chunk(chunk_id(document_id, ordinal, text), document_id, ordinal, text, {"file_name": "planted.md"}, vector)
            for ordinal, (text, vector) in enumerate(zip(contents, vectors, strict=True))
        ]
        for store in Store:
            self.router.stores.present(store, user_id, document_id, chunks)
        return chunks

    def settle_down(self) -> None:
        """As if everything had been written an hour ago."""
        self.as_owner(LONG_AGO)
        self.router.refresh()

    def to(self, stage: Stage, percent: int = 0) -> None:
        """The next transition, on which the router acts and of which the fleet knows that it does."""
        with self.database.connect(autocommit=True) as connection:
            set_stage(connection, stage, percent)
        self.router.refresh()
        self.router.refresh()

    def pass_by(self, seconds: float) -> None:
        """All evidence is so much older. Twice, for no two rows may be of one time on the way."""
        for step in (f"+ interval '1 year' - interval '{seconds} seconds'", "- interval '1 year'"):
            self.as_owner(f"UPDATE shadow_diffs SET at = at {step}")
            self.as_owner(f"UPDATE rollout_counts SET since = since {step}")

    # -- faults

    def gone(self, store: Store, user_id: int, documents: Iterable[int]) -> None:
        """These documents' chunks are no longer in the store, and nobody was told."""
        for document_id in documents:
            match store:
                case Store.FAISS:
                    self.router.stores.faiss.delete(user_id, document_id)
                case Store.PGVECTOR:
                    self.superuser.execute("DELETE FROM document_chunks WHERE document_id = %s", (document_id,))
            chunks = self.held[store][user_id]
            self.held[store][user_id] = {
                chunk.id: chunk for chunk in chunks.values() if chunk.document_id != document_id
            }

    def owe(self, store: Store, user_id: int, documents: Iterable[int]) -> None:
        """The store has not got these documents yet."""
        documents = list(documents)
        self.gone(store, user_id, documents)
        self.as_owner(
            "UPDATE vector_ledger SET state = 'owed', next_attempt_at = 'infinity'"
            " WHERE store = %s AND document_id = ANY (%s)", store, documents,
        )  # fmt: skip

    def give_away(self, chunk: Chunk, user_id: int, to: int) -> None:
        self.superuser.execute("UPDATE document_chunks SET user_id = %s WHERE id = %s", (to, chunk.id))
        del self.held[Store.PGVECTOR][user_id][chunk.id]
        self.held[Store.PGVECTOR][to][chunk.id] = chunk

    def rewrite(self, chunk: Chunk, user_id: int) -> None:
        text = f"{chunk.content} Somebody was here."
        self.superuser.execute("UPDATE document_chunks SET content = %s WHERE id = %s", (text, chunk.id))
        self.held[Store.PGVECTOR][user_id][chunk.id] = replace(chunk, content=text)

    def turn(self, chunk: Chunk, user_id: int, vector: Vector) -> None:
        """The chunk's vector in pgvector is now another."""
        text = "[" + ",".join(map(repr, vector.astype(float).tolist())) + "]"
        self.superuser.execute("UPDATE document_chunks SET embedding = %s::vector WHERE id = %s", (text, chunk.id))
        self.held[Store.PGVECTOR][user_id][chunk.id] = replace(chunk, vector=vector)

    def as_owner(self, statement: str, *parameters: object) -> None:
        with self.database.connect(autocommit=True) as connection:
            connection.execute(statement, parameters)

    # -- questions

    def near(self, chunk: Chunk, distance: float = 0.5) -> Vector:
        """A question whose nearest chunk is this one, of any that are not made to be alike."""
        return unit(chunk.vector + distance * self.unit())

    def unit(self) -> Vector:
        return unit(self.random.standard_normal(DIMENSION))

    def ask(self, user_id: int, question: Vector) -> Read:
        """A request as users make it; what it hands over to be compared."""
        self.reads.clear()
        self.router.search(user_id, question, K)
        (read,) = self.reads
        return read

    def compare(self, user_id: int, question: Vector) -> Cause:
        return self.router.shadow.compare(self.ask(user_id, question))

    def differs(self, user_id: int, question: Vector) -> bool:
        """Whether the two stores, as they are now, must answer differently."""
        one, other = (self._answer(store, user_id, question) for store in Store)
        return [(each.id, each.content) for each, _ in one] != [(each.id, each.content) for each, _ in other] or any(
            abs(a - b) > 1e-4 for (_, a), (_, b) in zip(one, other, strict=True)
        )

    def _answer(self, store: Store, user_id: int, question: Vector) -> list[tuple[Chunk, float]]:
        chunks = list(self.held[store][user_id].values())
        similarities = np.array([chunk.vector for chunk in chunks], np.float64) @ question.astype(np.float64)
        best = np.argsort(-similarities)[:K]
        return [(chunks[position], float(similarities[position])) for position in best]


@contextmanager
def planting(database: Any, router: Router) -> Iterator[Planted]:
    with psycopg.connect(database.superuser_conninfo(), autocommit=True) as superuser:
        yield Planted(database, router, superuser)


@contextmanager
def approximate_index(planted: Planted) -> Iterator[None]:
    """An index over all users that gives one candidate, and no other way to the chunks."""
    name = planted.database.name
    for statement in (
        "ALTER TABLE document_chunks DROP CONSTRAINT document_chunks_pkey CASCADE",
        "DROP INDEX document_chunks_by_document, document_chunks_by_id",
        "CREATE INDEX approximate ON document_chunks USING hnsw (embedding vector_ip_ops)",
        f"ALTER DATABASE {name} SET hnsw.ef_search = 1",
        f"ALTER DATABASE {name} SET enable_seqscan = off",
    ):
        planted.superuser.execute(statement)
    planted.router.pool.drain()
    try:
        yield
    finally:
        planted.superuser.execute("DROP INDEX approximate")


def unit(vector: Any) -> Vector:
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def at_cosine(question: Vector, cosine: float, aside: Vector) -> Vector:
    """A unit vector at this cosine from the question, leaning towards `aside`."""
    towards = aside - (aside @ question) * question
    towards = towards / np.linalg.norm(towards)
    return unit(cosine * question.astype(np.float64) + np.sqrt(1 - cosine**2) * towards)


def one_of_each_side(users: Sequence[int], percent: float = 50.0) -> list[tuple[int, int]]:
    """Pairs of users: at `percent`, the first is served by FAISS and the second by pgvector."""
    by_faiss = [user for user in users if bucket(user) >= percent]
    by_pgvector = [user for user in users if bucket(user) < percent]
    return list(zip(by_faiss, by_pgvector, strict=False))
