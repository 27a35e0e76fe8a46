"""What PostgreSQL and the journal really hold, read past every router."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.tools.rag_tools.migration.stages import Stage, Store

Entry = tuple[int, Store]

LOOK = """
SELECT json_build_object(
    'stages', (SELECT json_agg(json_build_array(id, stage) ORDER BY id) FROM rollout_transitions),
    'documents', (SELECT json_agg(json_build_array(id, filename, status)) FROM documents),
    'ledger', (SELECT json_agg(json_build_array(document_id, store, wanted, state)) FROM vector_ledger),
    'chunks', (SELECT json_agg(json_build_array(document_id, chunks))
               FROM (SELECT document_id, count(*) AS chunks FROM document_chunks GROUP BY document_id)))::text
"""
# Counted by payload: of a document whose deletion is recorded none may be left.
JOURNAL = "SELECT document_id, count(*) FROM chunks WHERE vector IS NOT NULL GROUP BY document_id"
PGVECTOR_BYTES = """
SELECT document_id, id::text, content, encode(vector_send(embedding), 'hex') FROM document_chunks ORDER BY id
"""
JOURNAL_BYTES = "SELECT document_id, chunk_id, content, vector FROM chunks WHERE vector IS NOT NULL ORDER BY chunk_id"


@dataclass(frozen=True)
class Truth:
    """One moment. `held` has, by store, how many chunks of each document there are."""

    stages: dict[int, Stage]
    documents: dict[int, tuple[str, str]]
    ledger: dict[Entry, tuple[str, str]]
    held: dict[Store, dict[int, int]] = field(hash=False)

    @property
    def transition(self) -> int:
        return max(self.stages)

    @property
    def stage(self) -> Stage:
        return self.stages[self.transition]

    def status(self, document_id: int) -> str:
        return self.documents[document_id][1]

    def wanted(self, document_id: int) -> str | None:
        """`present` or `absent`, which both stores agree on; None where nothing was ever intended."""
        found = self.ledger.get((document_id, Store.FAISS))
        return None if found is None else found[0]

    def state(self, document_id: int, store: Store) -> str:
        return self.ledger[document_id, store][1]

    def chunks(self, document_id: int, store: Store) -> int:
        return self.held[store].get(document_id, 0)

    def ready(self) -> frozenset[int]:
        """Documents that everybody is to find once he has polled."""
        return frozenset(
            number for number, (_, status) in self.documents.items()
            if status == "ready" and self.wanted(number) == "present"
        )  # fmt: skip


def look(connection: Any, journal: sqlite3.Connection) -> Truth:
    found = json.loads(connection.execute(LOOK).fetchone()[0])
    return Truth(
        stages={number: Stage(stage) for number, stage in found["stages"]},
        documents={number: (name, status) for number, name, status in found["documents"] or ()},
        ledger={(number, Store(store)): (wanted, state) for number, store, wanted, state in found["ledger"] or ()},
        held={
            Store.FAISS: dict(journal.execute(JOURNAL).fetchall()),
            Store.PGVECTOR: dict(found["chunks"] or ()),
        },
    )


def bytes_of(connection: Any, journal: sqlite3.Connection) -> dict[Store, dict[int, list[tuple[str, str, str]]]]:
    """By store and document: id, content and vector of every chunk, in a form that both have in common."""
    found: dict[Store, dict[int, list[tuple[str, str, str]]]] = {store: {} for store in Store}
    for number, chunk, content, vector in connection.execute(PGVECTOR_BYTES):
        found[Store.PGVECTOR].setdefault(number, []).append((chunk.replace("-", ""), content, vector[8:]))
    for number, chunk, content, vector in journal.execute(JOURNAL_BYTES):
        found[Store.FAISS].setdefault(number, []).append((chunk.hex(), content, _big_endian(vector)))
    return found


def documents_of(journal: sqlite3.Connection) -> dict[str, int]:
    """The document of every chunk id that the journal ever took, in hexadecimal."""
    return {chunk.hex(): number for chunk, number in journal.execute("SELECT chunk_id, document_id FROM chunks")}


def open_journal(directory: Path) -> sqlite3.Connection:
    return sqlite3.connect(directory / "journal.sqlite", check_same_thread=False)


def _big_endian(vector: bytes) -> str:
    return "".join(vector[at : at + 4][::-1].hex() for at in range(0, len(vector), 4))
