"""A legacy index on disk, as LangChain saves it, and the rows that owner assignment makes of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from src.database import Role
from src.tools.rag_tools.migration.faiss_store import FaissStore, Owner, Owners
from src.tools.rag_tools.migration.stages import Stage
from src.tools.rag_tools.pgvector_store import Pool, open_pool
from tests.support.routers import HashEmbeddings, set_stage

COPY_ASSIGNED = """
COPY legacy_chunks
    (docstore_id, position, source, document_id, user_id, ordinal, status, reason)
FROM STDIN
"""
LEDGER = """
INSERT INTO vector_ledger (document_id, store, user_id, wanted, state, next_attempt_at)
VALUES (%s, 'faiss', %s, 'present', 'done', now()), (%s, 'pgvector', %s, 'present', 'owed', now())
"""
WORDS = ["harbour", "tide", "lantern", "granite", "meadow", "copper", "violet", "thunder", "orchard", "ember"]


@dataclass(frozen=True, slots=True)
class LegacyDocument:
    """A document of the index, its chunks' docstore ids by ordinal."""

    document_id: int
    user_id: int
    docstore_ids: tuple[str, ...]

    @property
    def chunk_ids(self) -> list[uuid.UUID]:
        return [uuid.UUID(name) for name in self.docstore_ids]


@dataclass(frozen=True, slots=True)
class LegacyIndex:
    """`documents` in order of id, which starts at 1."""

    directory: Path
    documents: tuple[LegacyDocument, ...]

    @property
    def chunks(self) -> int:
        return sum(len(document.docstore_ids) for document in self.documents)

    @property
    def owners(self) -> Owners:
        return Owners(
            1,
            {
                name: Owner(document.user_id, document.document_id, ordinal)
                for document in self.documents
                for ordinal, name in enumerate(document.docstore_ids)
            },
        )

    @contextmanager
    def opened(self) -> Iterator[FaissStore]:
        store = FaissStore.open(self.directory)
        try:
            store.set_owners(self.owners)
            yield store
        finally:
            store.close()


def make_legacy_index(directory: Path, plan: Sequence[tuple[int, int]], *, seed: int = 0) -> LegacyIndex:
    """An index of one document for each (user id, number of chunks) of `plan`, saved by LangChain."""
    chance = np.random.default_rng(seed)
    documents = tuple(
        LegacyDocument(
            document_id,
            user_id,
            tuple(str(uuid.UUID(bytes=chance.bytes(16), version=4)) for _ in range(chunks)),
        )
        for document_id, (user_id, chunks) in enumerate(plan, 1)
    )
    vectors = unit_vectors(sum(chunks for _, chunks in plan), chance)
    _save(directory, documents, vectors, chance)
    return LegacyIndex(directory, documents)


def unit_vectors(number: int, chance: np.random.Generator) -> NDArray[np.float32]:
    """Random unit vectors, shape (number, 1536)."""
    vectors = chance.standard_normal((number, 1536), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def adopt(database: Any, legacy: LegacyIndex, stage: Stage = Stage.DUALWRITE) -> None:
    """Give the chunks their owners: FAISS has every document, pgvector is owed it. Then set the stage."""
    with database.connect(autocommit=True) as connection:
        _add_rows(connection, legacy)
        set_stage(connection, stage)


@contextmanager
def rollout_pool(database: Any) -> Iterator[Pool]:
    with open_pool(database.conninfo(Role.ROLLOUT), 4, name="test") as pool:
        yield pool


def _save(
    directory: Path,
    documents: Sequence[LegacyDocument],
    vectors: NDArray[np.float32],
    chance: np.random.Generator,
) -> None:
    from langchain_community.docstore.in_memory import InMemoryDocstore
    from langchain_community.vectorstores import FAISS
    from langchain_core.documents import Document

    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    names = [name for document in documents for name in document.docstore_ids]
    held = {
        name: Document(
            page_content=_text(name, chance),
            metadata={
                "source": _source(document),
                "file_name": f"{document.document_id}.pdf",
                "page": page,
            },
        )
        for document in documents
        for page, name in enumerate(document.docstore_ids)
    }
    store = FAISS(HashEmbeddings(), index, InMemoryDocstore(held), dict(enumerate(names)))
    store.save_local(str(directory))


def _text(name: str, chance: np.random.Generator) -> str:
    return f"{name} — {' '.join(WORDS[number] for number in chance.integers(0, len(WORDS), 120))}"


def _add_rows(connection: Any, legacy: LegacyIndex) -> None:
    cursor = connection.cursor()
    users = sorted({document.user_id for document in legacy.documents})
    cursor.executemany(
        "INSERT INTO users (id, email, username) VALUES (%s, %s, %s)",
        [(user, f"user{user}@example.org", f"user{user}") for user in users],
    )
    cursor.executemany(
        "INSERT INTO documents (id, user_id, filename, path) VALUES (%s, %s, %s, %s)",
        [(each.document_id, each.user_id, f"{each.document_id}.pdf", _source(each)) for each in legacy.documents],
    )
    cursor.execute("SELECT setval('documents_id_seq', %s)", (len(legacy.documents),))
    cursor.execute("INSERT INTO owner_assignments (actor, counts) VALUES ('test', '{}')")
    with cursor.copy(COPY_ASSIGNED) as copy:
        for row in _assigned(legacy):
            copy.write_row(row)
    cursor.executemany(LEDGER, [(each.document_id, each.user_id) * 2 for each in legacy.documents])


def _assigned(legacy: LegacyIndex) -> Iterator[tuple[Any, ...]]:
    position = count()
    for each in legacy.documents:
        for ordinal, name in enumerate(each.docstore_ids):
            yield (
                name, next(position), _source(each), each.document_id, each.user_id, ordinal,
                "assigned", "test",
            )  # fmt: skip


def _source(document: LegacyDocument) -> str:
    return f"uploads/{document.document_id}.pdf"
