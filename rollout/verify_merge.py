"""The first look of verify: two streams of one user's chunks merged, and which documents differ.

Decides on data alone. What it names is only to be looked at again: writes go on while it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple
from uuid import UUID

from src.tools.rag_tools.migration.ledger import State, Wanted
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.store import InventoryRow


class Kind(StrEnum):
    """What is wrong with a chunk. `extra`: held by a store where the ledger does not want it."""

    OWNER_MISMATCH = "owner_mismatch"
    DOCUMENT_MISMATCH = "document_mismatch"
    CONTENT_DRIFT = "content_drift"
    VECTOR_DRIFT = "vector_drift"
    MISSING_IN_PGVECTOR = "missing_in_pgvector"
    MISSING_IN_FAISS = "missing_in_faiss"
    EXTRA = "extra"


class PgvectorRow(NamedTuple):
    """A chunk in PostgreSQL: hashes computed from what is stored, and the hash stored beside it."""

    user_id: int
    chunk_id: UUID
    document_id: int
    content_sha256: bytes
    vector_sha256: bytes
    stored_sha256: bytes


class LedgerEntry(NamedTuple):
    """One document in one store. `changed_at` only serves to see that nothing has changed."""

    user_id: int
    wanted: Wanted
    state: State
    changed_at: object = None


Pair = tuple[InventoryRow | None, PgvectorRow | None]
Entries = Mapping[Store, LedgerEntry]


def merge(faiss: Iterable[InventoryRow], pgvector: Iterable[PgvectorRow]) -> Iterator[Pair]:
    """Pairs by chunk id, None where a store has none; both come in order of chunk id."""
    left, right = iter(faiss), iter(pgvector)
    mine, theirs = next(left, None), next(right, None)
    while mine is not None or theirs is not None:
        if theirs is None or (mine is not None and mine.chunk_id < theirs.chunk_id):
            yield mine, None
            mine = next(left, None)
        elif mine is None or theirs.chunk_id < mine.chunk_id:
            yield None, theirs
            theirs = next(right, None)
        else:
            yield mine, theirs
            mine, theirs = next(left, None), next(right, None)


def compared(mine: InventoryRow, theirs: PgvectorRow) -> Kind | None:
    """How one user's chunk differs between the stores: the gravest kind, None where it does not."""
    if mine.document_id != theirs.document_id:
        return Kind.DOCUMENT_MISMATCH
    if not mine.content_sha256 == theirs.content_sha256 == theirs.stored_sha256:
        return Kind.CONTENT_DRIFT
    if mine.vector_sha256 != theirs.vector_sha256:
        return Kind.VECTOR_DRIFT
    return None


@dataclass(slots=True)
class Survey:
    """What the streams of one user show, by document: it grows with documents, not with chunks."""

    chunks: int = 0
    seen: dict[Store, set[int]] = field(default_factory=lambda: {store: set() for store in Store})
    lacking: dict[Store, set[int]] = field(default_factory=lambda: {store: set() for store in Store})
    wrong: set[int] = field(default_factory=set)

    @property
    def documents(self) -> set[int]:
        return self.seen[Store.FAISS] | self.seen[Store.PGVECTOR]

    def add(self, pair: Pair) -> None:
        mine, theirs = pair
        self.chunks += 1
        if mine is not None:
            self.seen[Store.FAISS].add(mine.document_id)
        if theirs is not None:
            self.seen[Store.PGVECTOR].add(theirs.document_id)
        if mine is None and theirs is not None:
            self.lacking[Store.FAISS].add(theirs.document_id)
        elif mine is not None and theirs is None:
            self.lacking[Store.PGVECTOR].add(mine.document_id)
        elif mine is not None and theirs is not None and compared(mine, theirs) is not None:
            self.wrong |= {mine.document_id, theirs.document_id}

    def suspects(self, ledger: Mapping[int, Entries]) -> set[int]:
        """The documents to look at again, by the user's entries as they were after the streams."""
        everything = self.documents | ledger.keys()
        return {each for each in everything if self._is_suspect(each, ledger.get(each, {}))}

    def owed(self, ledger: Mapping[int, Entries]) -> set[int]:
        """The documents of which a store has less, or more, than the ledger wants in the end."""
        return {
            document_id
            for document_id, entries in ledger.items()
            for store, entry in entries.items()
            if entry.state is not State.DONE and self._differs(document_id, store, entry.wanted)
        }

    def _is_suspect(self, document_id: int, entries: Entries) -> bool:
        return (
            document_id in self.wrong
            or len(entries) < len(Store)
            or any(
                entry.state is State.DONE and self._differs(document_id, store, entry.wanted)
                for store, entry in entries.items()
            )
        )

    def _differs(self, document_id: int, store: Store, wanted: Wanted) -> bool:
        held = document_id in self.seen[store]
        match wanted:
            case Wanted.PRESENT:
                return not held or document_id in self.lacking[store]
            case Wanted.ABSENT:
                return held
