"""Plain records of the FAISS store: whose a chunk is, and what is told of chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.tools.rag_tools.store import Vector


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose chunk it is, of which document, and its place there."""

    user_id: int
    document_id: int
    ordinal: int


@dataclass(frozen=True, slots=True)
class Owners:
    """One version of the owner assignment, by docstore id. What it does not name is nobody's."""

    version: int
    chunks: Mapping[str, Owner]


@dataclass(frozen=True, slots=True)
class BaseChunk:
    """A legacy chunk as the old release saved it. `source`: as the upload was called, if it has one."""

    position: int
    docstore_id: str
    source: str | None
    content: str
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Counts:
    """Live chunks. `by_user`: of each user who has any; `unowned`: legacy chunks that are nobody's."""

    by_user: dict[int, int]
    documents: int
    unowned: int
    legacy: int
    journal_position: int

    @property
    def owned(self) -> int:
        return sum(self.by_user.values())


@dataclass(frozen=True, slots=True)
class Sample:
    """A stored text as it was embedded, and the vector that came of it."""

    docstore_id: str
    text: str
    vector: Vector
