"""Uploads, deletions, assignments, saves, restarts and the old release in any order: always the same truth."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from src.tools.rag_tools.migration.faiss_store import FaissStore, Owner, Owners
from src.tools.rag_tools.store import DocumentGoneError, legacy_chunk_id
from tests.support.faiss_directory import (
    made_chunks,
    old_release_adds,
    opened_by_langchain,
    save_legacy,
    unit_vectors,
)

pytestmark = pytest.mark.migration

USERS = (1, 2, 3)
PROCESSES = (0, 1)
QUERY = unit_vectors(1, 99)[0]

processes = st.sampled_from(PROCESSES)
users = st.sampled_from(USERS)
# Few enough that a document is often written, deleted and written again.
documents = st.integers(1, 8)
LEGACY_DOCUMENT = 100


class TwoProcesses(RuleBasedStateMachine):
    """Two stores on one directory beside a plain account of what should be there."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="faiss-model-"))
        self.directory = self.folder / "faiss_index"
        self.owned: dict[str, Owner] = {}
        self.version = 0
        self.legacy: list[str] = []
        self.written: dict[int, int] = {}
        self.deleted: set[int] = set()
        self.stores: list[FaissStore] = []

    @initialize(chunks=st.integers(0, 4))
    def begin(self, chunks: int) -> None:
        self.legacy = [f"legacy{number}" for number in range(chunks)]
        if chunks:
            save_legacy(self.directory, self.legacy)
        self.stores = [self.open() for _ in PROCESSES]

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self.folder)

    def open(self) -> FaissStore:
        return FaissStore.open(self.directory, owners=Owners(self.version, dict(self.owned)))

    # -- what happens

    @rule(process=processes, document_id=documents)
    def upload(self, process: int, document_id: int) -> None:
        user_id = USERS[document_id % len(USERS)]
        chunks = made_chunks(document_id)
        if document_id in self.deleted:
            with pytest.raises(DocumentGoneError):
                self.stores[process].upsert(user_id, document_id, chunks)
        else:
            self.stores[process].upsert(user_id, document_id, chunks)
            self.written[document_id] = user_id

    @rule(process=processes, document_id=documents)
    def delete(self, process: int, document_id: int) -> None:
        self.stores[process].delete(USERS[document_id % len(USERS)], document_id)
        self.deleted.add(document_id)

    @rule(process=processes, number=st.integers(0, 9))
    def delete_legacy(self, process: int, number: int) -> None:
        document_id = LEGACY_DOCUMENT + number
        self.stores[process].delete(USERS[number % len(USERS)], document_id)
        self.deleted.add(document_id)

    @rule(number=st.integers(0, 9))
    def assign(self, number: int) -> None:
        """A legacy chunk gets its owner; the processes hear of it one after the other."""
        if number < len(self.legacy):
            owner = Owner(USERS[number % len(USERS)], LEGACY_DOCUMENT + number, 0)
            self.owned[self.legacy[number]] = owner
            self.version += 1
            for store in self.stores:
                store.set_owners(Owners(self.version, dict(self.owned)))

    @rule(process=processes)
    def save(self, process: int) -> None:
        self.stores[process].save()
        found = {legacy_chunk_id(name) for name in opened_by_langchain(self.directory)}
        kept = {legacy_chunk_id(name) for name in self.legacy if self.lives(name)}
        assert found == kept.union(*(self.of(user_id) for user_id in USERS))

    @rule(process=processes)
    def restart(self, process: int) -> None:
        self.stores[process].close()
        self.stores[process] = self.open()

    @rule(process=processes)
    def back_to_the_old_release_and_forth(self, process: int) -> None:
        """As the runbook has it: save, stop, and start the old release, where somebody uploads."""
        if len(self.legacy) > 9:
            return
        self.stores[process].save()
        for store in self.stores:
            store.close()
        self.legacy.append(f"legacy{len(self.legacy)}")
        if len(self.legacy) == 1 and not opened_by_langchain(self.directory):
            save_legacy(self.directory, self.legacy)
        else:
            old_release_adds(self.directory, self.legacy[-1:])
        self.stores = [self.open() for _ in PROCESSES]

    # -- what is always true

    def lives(self, name: str) -> bool:
        owner = self.owned.get(name)
        return owner is None or owner.document_id not in self.deleted

    def of(self, user_id: int) -> set[uuid.UUID]:
        legacy = {legacy_chunk_id(n) for n, o in self.owned.items() if o.user_id == user_id and self.lives(n)}
        written = [d for d, owner in self.written.items() if owner == user_id and d not in self.deleted]
        return legacy | {chunk.id for document_id in written for chunk in made_chunks(document_id)}

    @invariant()
    def everybody_finds_all_of_their_own_and_nothing_else(self) -> None:
        for store in self.stores:
            for user_id in USERS:
                expected = self.of(user_id)
                hits = store.search(user_id, QUERY, 1000)
                assert {hit.chunk_id for hit in hits} == expected
                assert len(hits) == len(expected) == store.count(user_id)
                assert [row.chunk_id for row in store.inventory(user_id)] == sorted(expected)

    @invariant()
    def every_document_is_whole_or_gone(self) -> None:
        for store in self.stores:
            for document_id in range(1, 9):
                there = document_id in self.written and document_id not in self.deleted
                expected = [chunk.id for chunk in made_chunks(document_id)] if there else []
                assert [chunk.id for chunk in store.document(document_id)] == expected

    @invariant()
    def what_is_nobodys_is_known(self) -> None:
        for store in self.stores:
            assert store.unowned() == [name for name in self.legacy if name not in self.owned]


TwoProcesses.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)

TestTwoProcesses = TwoProcesses.TestCase
