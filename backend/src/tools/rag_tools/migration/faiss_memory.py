"""What one process holds of FAISS: the vectors, who owns which, and the search among a user's own.

Changes only by what the journal says, in its order, and by the owners of the legacy chunks; the
order of these two does not matter. It is lost with the process, and made again from the files and
the journal. Not safe for threads: FaissStore calls it behind one lock.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from src.tools.rag_tools.migration.faiss_format import Content
from src.tools.rag_tools.migration.faiss_pickle import MismatchedPairError, PickledChunks
from src.tools.rag_tools.migration.faiss_records import Owner, Owners
from src.tools.rag_tools.store import (
    Chunk,
    Hit,
    InventoryRow,
    Vector,
    content_hash,
    legacy_chunk_id,
    normalise_metadata,
    normalise_text,
    vector_hashes,
)

if TYPE_CHECKING:
    from src.tools.rag_tools.migration.faiss_index import Vectors

# Equal vectors may come out of faiss with distances that differ in the last bits; a few more than
# asked for are fetched, and ranked by exact cosine.
SPARE = 4
TIE = 1e-5
NONE = np.empty(0, np.int64)
_CANONICAL = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(slots=True)
class Memory:
    """Positions go up from 0 and are never used again: first what the files held, then the journal's."""

    saved: InitVar[Content]
    chunks: PickledChunks = field(init=False)
    vectors: Vectors = field(init=False)
    base: int = 0
    """So many positions came from the files."""
    owners: Owners | None = None
    deleted: set[int] = field(default_factory=set)
    _owner: list[Owner | None] = field(default_factory=list)
    _position: dict[str, int] = field(default_factory=dict)
    _journalled: dict[int, Owner] = field(default_factory=dict)
    _by_user: dict[int, dict[int, None]] = field(default_factory=dict)
    _by_document: dict[int, list[int]] = field(default_factory=dict)
    _own: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def __post_init__(self, saved: Content) -> None:
        from src.tools.rag_tools.migration.faiss_index import Vectors

        self.chunks, self.vectors = saved.chunks, Vectors(saved.index)
        docstore_ids = self.chunks.docstore_ids
        self.base = len(docstore_ids)
        self._owner = [None] * self.base
        self._position = {_key(name): position for position, name in enumerate(docstore_ids)}
        if len(self._position) != self.base:
            raise MismatchedPairError(
                f"the {self.base} docstore ids of the index name only {len(self._position)} chunks: some are the same"
                " UUID in another spelling; remove the doubled ones with LangChain"
            )

    def __len__(self) -> int:
        """Chunks held, those of deleted documents included."""
        return len(self._owner)

    # -- changes

    def add(self, owners: Mapping[uuid.UUID, Owner], payload: Sequence[Chunk]) -> None:
        """A document of the journal. `payload`: those of its chunks that `lacks` named."""
        self._append([chunk for chunk in payload if str(chunk.id) not in self._position])
        for chunk_id, owner in owners.items():
            position = self._position.get(str(chunk_id))
            if position is not None:
                self._journalled[position] = owner
                self._give(position, owner)

    def lacks(self, chunk_ids: Sequence[uuid.UUID]) -> bool:
        """Whether some of them are not held; a saved index holds what the journal added before."""
        return any(str(chunk_id) not in self._position for chunk_id in chunk_ids)

    def delete(self, document_id: int) -> None:
        """Hide the document; `live` leaves it out when it comes to saving."""
        self.deleted.add(document_id)
        for position in self._by_document.pop(document_id, ()):
            owner = self._owner[position]
            if owner is not None:
                self._by_user[owner.user_id].pop(position, None)
                self._own.pop(owner.user_id, None)

    def assign(self, owners: Owners) -> None:
        """Take over an assignment. What the journal says of a chunk goes before it."""
        self.owners = owners
        for position in range(self.base):
            if position not in self._journalled:
                name = self.chunks.docstore_ids[position]
                self._owner[position] = owners.chunks.get(name)
        self._regroup()

    # -- questions

    def own(self, user_id: int) -> NDArray[np.int64]:
        """The positions of the user's chunks."""
        if user_id not in self._own:
            mine = self._by_user.get(user_id)
            if not mine:
                return NONE
            self._own[user_id] = np.fromiter(mine, np.int64, len(mine))
        return self._own[user_id]

    def still(self, user_id: int, positions: Sequence[int]) -> list[int]:
        """Those of `positions` that are the user's now."""
        mine = self._by_user.get(user_id, {})
        return [position for position in positions if position in mine]

    def users(self) -> dict[int, int]:
        """How many chunks each user has who has any."""
        return {user_id: len(mine) for user_id, mine in self._by_user.items() if mine}

    def documents(self) -> int:
        return sum(1 for positions in self._by_document.values() if positions)

    def of_document(self, document_id: int) -> list[int]:
        """Its positions, by ordinal."""
        positions = self._by_document.get(document_id, [])
        return sorted(positions, key=lambda position: self._owned(position).ordinal)

    def owner_of(self, chunk_id: uuid.UUID) -> Owner | None:
        position = self._position.get(str(chunk_id))
        owner = None if position is None else self._owner[position]
        return None if owner is None or owner.document_id in self.deleted else owner

    def unowned(self) -> list[int]:
        """Positions of legacy chunks that are nobody's."""
        return [position for position in range(self.base) if self._owner[position] is None]

    def legacy(self) -> Iterator[int]:
        """Positions from the files that no document of the journal has."""
        return (position for position in range(self.base) if position not in self._journalled)

    def live(self) -> NDArray[np.int64]:
        """Every position but those of deleted documents; what is nobody's is kept."""
        owners = enumerate(self._owner)
        kept = [at for at, owner in owners if owner is None or owner.document_id not in self.deleted]
        return np.array(kept, np.int64)

    def chunk_id(self, position: int) -> uuid.UUID:
        return legacy_chunk_id(self.chunks.docstore_ids[position])

    def in_order(self, positions: NDArray[np.int64]) -> list[int]:
        """These positions by chunk id; UUIDs are in the same order as their texts."""
        names = self.chunks.docstore_ids
        return sorted(positions.tolist(), key=lambda position: _key(names[position]))

    def inventory(self, positions: Sequence[int]) -> list[InventoryRow]:
        """What verify compares of these positions: less than whole chunks, and several times as fast."""
        rows = self.vectors.at(np.array(positions, np.int64))
        return [
            InventoryRow(
                self.chunk_id(position),
                self._owned(position).document_id,
                content_hash(normalise_text(self.chunks.contents[position])),
                digest,
            )
            for position, digest in zip(positions, vector_hashes(rows), strict=True)
        ]

    def whole(self, positions: Sequence[int]) -> list[Chunk]:
        """Whole chunks, normalised as the other store has them."""
        rows = self.vectors.at(np.array(positions, np.int64))
        return [self._chunk(position, row) for position, row in zip(positions, rows, strict=True)]

    def nearest(self, user_id: int, vector: Vector, k: int) -> list[Hit]:
        """The k nearest of the user's own, exactly; best first, ties by chunk id."""
        own = self.own(user_id)
        wanted = min(k, len(own))
        if wanted <= 0:
            return []
        similarities = self._similarities(vector, self._candidates(vector, own, wanted))
        names = self.chunks.docstore_ids
        # UUIDs are in the same order as their texts.
        ranked = sorted((-similarity, _key(names[at]), at) for at, similarity in similarities)
        return [self._hit(position, -negative) for negative, _, position in ranked[:wanted]]

    # -- parts

    def _candidates(self, vector: Vector, own: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
        """Every position that could be among the `wanted` nearest, all of a tie at the end included."""
        fetched = min(len(own), wanted + SPARE)
        while True:
            distances, positions = self.vectors.nearest(vector, own, fetched)
            if fetched == len(own) or distances[-1] - distances[wanted - 1] > TIE:
                return positions
            fetched = min(len(own), 4 * fetched)

    def _similarities(self, vector: Vector, positions: NDArray[np.int64]) -> list[tuple[int, float]]:
        """Cosines in double precision, the same for equal vectors wherever they lie."""
        query = vector.astype(np.float64)
        rows = self.vectors.at(positions).astype(np.float64)
        lengths = np.sqrt((rows * rows).sum(axis=1) * (query * query).sum())
        cosines = (rows * query).sum(axis=1) / lengths
        return list(zip(positions.tolist(), cosines.tolist(), strict=True))

    def _hit(self, position: int, similarity: float) -> Hit:
        content, metadata = self._text(position)
        document_id = self._owned(position).document_id
        return Hit(self.chunk_id(position), document_id, content, metadata, similarity)

    def _chunk(self, position: int, vector: Vector) -> Chunk:
        owner = self._owned(position)
        content, metadata = self._text(position)
        return Chunk(self.chunk_id(position), owner.document_id, owner.ordinal, content, metadata, vector)

    def _text(self, position: int) -> tuple[str, dict[str, Any]]:
        chunks = self.chunks
        return normalise_text(chunks.contents[position]), normalise_metadata(chunks.metadatas[position])

    def _owned(self, position: int) -> Owner:
        owner = self._owner[position]
        if owner is None:
            raise AssertionError(f"position {position} is nobody's")
        return owner

    def _append(self, chunks: Sequence[Chunk]) -> None:
        if not chunks:
            return
        start = len(self._owner)
        self.vectors.add(np.stack([chunk.vector for chunk in chunks]))
        for position, chunk in enumerate(chunks, start):
            self.chunks.docstore_ids.append(str(chunk.id))
            self.chunks.contents.append(chunk.content)
            self.chunks.metadatas.append(dict(chunk.metadata))
            self._position[str(chunk.id)] = position
            self._owner.append(None)

    def _give(self, position: int, owner: Owner) -> None:
        before = self._owner[position]
        if before is not None:
            self._by_user.get(before.user_id, {}).pop(position, None)
            self._own.pop(before.user_id, None)
            if position in (positions := self._by_document.get(before.document_id, [])):
                positions.remove(position)
        self._owner[position] = owner
        self._group(position, owner)
        self._own.pop(owner.user_id, None)

    def _regroup(self) -> None:
        self._by_user, self._by_document, self._own = {}, {}, {}
        for position, owner in enumerate(self._owner):
            if owner is not None:
                self._group(position, owner)

    def _group(self, position: int, owner: Owner) -> None:
        if owner.document_id not in self.deleted:
            self._by_user.setdefault(owner.user_id, {})[position] = None
            self._by_document.setdefault(owner.document_id, []).append(position)


def _key(docstore_id: str) -> str:
    """The chunk id as text; most docstore ids are that already."""
    return docstore_id if _CANONICAL.fullmatch(docstore_id) else str(legacy_chunk_id(docstore_id))
