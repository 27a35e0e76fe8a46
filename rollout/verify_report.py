"""What verify found: grouped by document, counted, and as JSON for `verify_runs` and `--json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from rollout.verify_judge import Difference, Look
from rollout.verify_merge import Kind
from src.tools.rag_tools.migration.stages import Store

EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class DocumentDifference:
    """One document and one thing that is wrong with it, in `store`.

    `chunks`: how many chunks it concerns, one for a document of which there is nothing.
    `examples`: ids of some of them. `user_id`: who has them there, or should; `belongs_to`: whose
    they are, where that is somebody else. `held`: how many chunks of the document each store has.
    """

    document_id: int
    kind: Kind
    store: Store
    user_id: int
    belongs_to: int | None
    chunks: int
    examples: tuple[str, ...]
    held: dict[Store, int]


@dataclass(slots=True)
class VerifyReport:
    """`owed`: documents that differ and that the ledger knows to be under way. `displaced`:
    documents whose chunks pgvector has in another place, where they are counted."""

    transition_id: int
    started_at: datetime
    users: int = 0
    documents: int = 0
    chunks: int = 0
    owed: set[int] = field(default_factory=set)
    displaced: set[int] = field(default_factory=set)
    found: list[DocumentDifference] = field(default_factory=list)
    run_id: int | None = None

    @property
    def differences(self) -> int:
        return sum(each.chunks for each in self.found)

    @property
    def by_kind(self) -> dict[Kind, int]:
        counted = Counter[Kind]()
        for each in self.found:
            counted[each.kind] += each.chunks
        return dict(counted)

    def to_json(self, documents: int | None = None) -> dict[str, Any]:
        """At most `documents` of what was found are listed; the counts are of everything."""
        return {
            "transition_id": self.transition_id,
            "started_at": self.started_at.isoformat(),
            "users": self.users,
            "documents": self.documents,
            "chunks": self.chunks,
            "owed_documents": len(self.owed),
            "differences": self.differences,
            "by_kind": self.by_kind,
            "found": [asdict(each) for each in self.found[:documents]],
        }


def by_document(look: Look, differences: Sequence[Difference]) -> list[DocumentDifference]:
    """The differences of one document, one item for each thing that is wrong."""
    groups: dict[tuple[Kind, Store, int, int | None], list[Difference]] = {}
    for each in differences:
        groups.setdefault((each.kind, each.store, each.user_id, each.belongs_to), []).append(each)
    held = {Store.FAISS: len(look.faiss), Store.PGVECTOR: len(look.pgvector)}
    return [
        DocumentDifference(look.document_id, *key, len(group), _examples(group), held) for key, group in groups.items()
    ]


def _examples(group: Sequence[Difference]) -> tuple[str, ...]:
    named = [str(each.chunk_id) for each in group if each.chunk_id is not None]
    return tuple(named[:EXAMPLES])
