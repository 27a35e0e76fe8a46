"""Both stores of one process: one document applied to one of them, or one question asked of some.

A write and its mark in the ledger agree: pgvector's are one transaction; FAISS' journal refuses a document
whose deletion it has recorded, and the mark is made only where `wanted` still is what was applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from src.tools.rag_tools import faults
from src.tools.rag_tools.migration import ledger
from src.tools.rag_tools.migration.faiss_store import FaissStore
from src.tools.rag_tools.migration.ledger import Wanted
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.pgvector_store import DELETE, PgvectorStore, insert_chunks, unavailable
from src.tools.rag_tools.store import Chunk, DocumentGoneError, Hit, Vector, VectorStore


@dataclass(frozen=True, slots=True)
class Stores:
    """Both stores of one process."""

    faiss: FaissStore
    pgvector: PgvectorStore

    def __getitem__(self, store: Store) -> VectorStore:
        match store:
            case Store.FAISS:
                return self.faiss
            case Store.PGVECTOR:
                return self.pgvector

    def present(self, store: Store, user_id: int, document_id: int, chunks: Sequence[Chunk]) -> None:
        """Write the document and mark it done. DocumentGoneError where it is no longer wanted."""
        match store:
            case Store.PGVECTOR:
                with self.pgvector.transaction(user_id, point="pgvector.present") as connection:
                    _require(ledger.mark(connection, document_id, store, Wanted.PRESENT), document_id)
                    insert_chunks(connection, user_id, chunks)
            case Store.FAISS:
                self.faiss.upsert(user_id, document_id, chunks)
                _require(self._mark(document_id, store, Wanted.PRESENT), document_id)

    def absent(self, store: Store, user_id: int, document_id: int) -> None:
        """Take the document out and mark it done."""
        match store:
            case Store.PGVECTOR:
                with self.pgvector.transaction(user_id, point="pgvector.absent") as connection:
                    connection.execute(DELETE, (user_id, document_id))
                    ledger.mark(connection, document_id, store, Wanted.ABSENT)
            case Store.FAISS:
                self.faiss.delete(user_id, document_id)
                self._mark(document_id, store, Wanted.ABSENT)

    def copy_of(self, store: Store, user_id: int, document_id: int) -> list[Chunk]:
        """The user's document as `store` holds it, vectors and all; nothing where it is somebody else's there."""
        match store:
            case Store.PGVECTOR:
                return self.pgvector.document(user_id, document_id)
            case Store.FAISS:
                return self.faiss.document(document_id, user_id)

    def search(self, names: Sequence[Store], user_id: int, vector: Vector, k: int, hidden: frozenset[int]) -> list[Hit]:
        """The k best of these stores' answers by chunk id, without the `hidden` documents."""
        asked = k
        while True:
            answers = [self[name].search(user_id, vector, asked) for name in names]
            hits = [hit for hit in _merge(answers) if hit.document_id not in hidden]
            if len(hits) >= k or all(len(answer) < asked for answer in answers):
                return hits[:k]
            asked *= 4

    def _mark(self, document_id: int, store: Store, wanted: Wanted) -> bool:
        with unavailable("mark"), faults.point("ledger.mark"), self.pgvector.pool.connection() as connection:
            return ledger.mark(connection, document_id, store, wanted)


def _merge(answers: Sequence[Sequence[Hit]]) -> list[Hit]:
    """Best first, ties by chunk id, each chunk once."""
    best: dict[UUID, Hit] = {}
    for hit in (hit for answer in answers for hit in answer):
        if hit.chunk_id not in best or hit.similarity > best[hit.chunk_id].similarity:
            best[hit.chunk_id] = hit
    return sorted(best.values(), key=lambda hit: (-hit.similarity, hit.chunk_id))


def _require(marked: bool, document_id: int) -> None:
    if not marked:
        raise DocumentGoneError(f"document {document_id} was deleted or given up; nothing more is written for it")
