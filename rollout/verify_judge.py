"""The second look of verify: one document, its chunks in both stores, and what the ledger says of it.

Decides on data alone what is wrong with each chunk. A chunk is counted once, in the store that is
wrong: one that pgvector gives to the wrong user is an owner mismatch there, and not also missing
under the right one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

from rollout.verify_merge import Entries, Kind, PgvectorRow, compared
from src.tools.rag_tools.migration.ledger import State, Wanted
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.store import InventoryRow

MISSING = {Store.FAISS: Kind.MISSING_IN_FAISS, Store.PGVECTOR: Kind.MISSING_IN_PGVECTOR}


class Difference(NamedTuple):
    """A chunk that differs; `chunk_id` is None where a store has nothing of a whole document.

    `store`: the one that is wrong; where only contents differ, pgvector. `user_id`: who has the
    chunk there, or should. `belongs_to`: whose it is, where that is somebody else.
    """

    kind: Kind
    store: Store
    user_id: int
    chunk_id: UUID | None
    belongs_to: int | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """A document as both stores have it, all read within one state of the ledger.

    `faiss_user`: to whom FAISS gives it. `given_by_faiss`: to whom FAISS gives those chunks of
    `pgvector` that it does not have in this document; None for nobody. `elsewhere`: the chunks of
    `faiss` that pgvector has, but not in this document under the ledger's user.
    """

    document_id: int
    ledger: Entries
    faiss: Mapping[UUID, InventoryRow] = field(default_factory=dict)
    faiss_user: int | None = None
    pgvector: Sequence[PgvectorRow] = ()
    given_by_faiss: Mapping[UUID, int | None] = field(default_factory=dict)
    elsewhere: frozenset[UUID] = frozenset()


@dataclass(slots=True)
class Judgement:
    """`owed`: something differs that the ledger knows to be under way. `displaced`: pgvector has
    chunks of the document in another place, where they are counted."""

    differences: list[Difference] = field(default_factory=list)
    owed: bool = False
    displaced: bool = False

    def lacks(self, look: Look, store: Store, user_id: int, chunk_id: UUID | None) -> None:
        entry = look.ledger.get(store)
        if entry is None or entry.state is State.DONE:
            self.differences.append(Difference(MISSING[store], store, user_id, chunk_id))
        else:
            self.owed = True


def judge(look: Look) -> Judgement:
    """What is wrong with the document."""
    wanted = {entry.wanted for entry in look.ledger.values()}
    if not wanted:
        return Judgement([difference for store in Store for difference in _extra(look, store)])
    return _judge_absent(look) if Wanted.ABSENT in wanted else _judge_present(look)


def _judge_absent(look: Look) -> Judgement:
    made = Judgement()
    for store, entry in look.ledger.items():
        if entry.state is State.DONE:
            made.differences += _extra(look, store)
        else:
            made.owed = True
    return made


def _judge_present(look: Look) -> Judgement:
    made = Judgement()
    owner = next(iter(look.ledger.values())).user_id
    if not look.faiss and not look.pgvector:
        for store in Store:
            made.lacks(look, store, owner, None)
    _judge_faiss(look, made, owner)
    _judge_pgvector(look, made, owner)
    return made


def _judge_faiss(look: Look, made: Judgement, owner: int) -> None:
    own = {row.chunk_id: row for row in look.pgvector if row.user_id == owner}
    for chunk_id, mine in look.faiss.items():
        if look.faiss_user is not None and look.faiss_user != owner:
            made.differences.append(Difference(Kind.OWNER_MISMATCH, Store.FAISS, look.faiss_user, chunk_id, owner))
        elif chunk_id in own:
            kind = compared(mine, own[chunk_id])
            if kind is not None:
                made.differences.append(Difference(kind, Store.PGVECTOR, owner, chunk_id))
        elif chunk_id in look.elsewhere:
            made.displaced = True
        else:
            made.lacks(look, Store.PGVECTOR, owner, chunk_id)


def _judge_pgvector(look: Look, made: Judgement, owner: int) -> None:
    for row in look.pgvector:
        belongs_to = owner if row.user_id != owner else look.given_by_faiss.get(row.chunk_id)
        if row.user_id == owner and row.chunk_id in look.faiss:
            continue  # judged as FAISS' chunk
        if belongs_to is None:
            made.lacks(look, Store.FAISS, owner, row.chunk_id)
        else:
            same = belongs_to == row.user_id
            kind = Kind.DOCUMENT_MISMATCH if same else Kind.OWNER_MISMATCH
            made.differences.append(Difference(kind, Store.PGVECTOR, row.user_id, row.chunk_id, belongs_to))


def _extra(look: Look, store: Store) -> Iterator[Difference]:
    match store:
        case Store.FAISS:
            held = [(look.faiss_user or 0, chunk_id) for chunk_id in look.faiss]
        case Store.PGVECTOR:
            held = [(row.user_id, row.chunk_id) for row in look.pgvector]
    for user_id, chunk_id in held:
        yield Difference(Kind.EXTRA, store, user_id, chunk_id)
