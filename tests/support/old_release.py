"""The old release at work on one folder and one database: LangChain's own index, rows as it wrote them."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.owner_report import AssignmentReport
from rollout.owners import Position, assign_owners, positions_of
from src.database import Role
from src.tools.rag_tools.migration.faiss_store import FaissStore
from tests.support.routers import HashEmbeddings


@dataclass(frozen=True, slots=True)
class OldRelease:
    """An installation without owners in `directory` and `database`."""

    directory: Path
    database: Any

    @property
    def index(self) -> Path:
        return self.directory / "faiss_index"

    @property
    def uploads(self) -> Path:
        return self.directory / "uploads"

    def upload(self, user_id: int, filename: str, texts: Sequence[str]) -> tuple[int, list[str]]:
        """A row and its chunks; (document id, docstore ids)."""
        return self.add_row(user_id, filename), self.add_chunks(f"uploads/{filename}", texts)

    def add_row(self, user_id: int, filename: str) -> int:
        with self.database.connect() as connection:
            row = connection.execute(
                "INSERT INTO documents (user_id, filename, path) VALUES (%s, %s, %s) RETURNING id",
                (user_id, filename, f"uploads/{filename}"),
            ).fetchone()
        return int(row[0])

    def add_chunks(self, source: str, texts: Sequence[str]) -> list[str]:
        """Chunks without a row, as of an upload whose row is gone."""
        langchain = _langchain()
        metadatas = [{"source": source, "file_name": Path(source).name} for _ in texts]
        ids = [str(uuid.uuid4()) for _ in texts]
        if self.index.exists():
            store = langchain.load_local(str(self.index), HashEmbeddings(), allow_dangerous_deserialization=True)
            store.add_texts(list(texts), metadatas, ids=ids)
        else:
            store = langchain.from_texts(list(texts), HashEmbeddings(), metadatas, ids=ids)
        store.save_local(str(self.index))
        return ids

    def positions(self) -> list[Position]:
        with self.opened() as store:
            return positions_of(store.base_positions())

    def contents(self) -> list[tuple[str, str]]:
        with self.opened() as store:
            return [(chunk.docstore_id, chunk.content) for chunk in store.base_positions()]

    def assign(self, *, execute: bool = True, **options: Any) -> AssignmentReport:
        with self.database.connect(Role.ROLLOUT, autocommit=True) as connection:
            return assign_owners(connection, self.positions(), actor="test", execute=execute, **options)

    @contextmanager
    def opened(self) -> Iterator[FaissStore]:
        store = FaissStore.open(self.index)
        try:
            yield store
        finally:
            store.close()


def _langchain() -> Any:
    """Imported where it is needed: it takes seconds, and announces that it is no longer maintained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from langchain_community.vectorstores import FAISS
    return FAISS
