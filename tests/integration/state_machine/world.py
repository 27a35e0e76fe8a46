"""One example's world: a database and a directory, and processes that each have a router on both.

The database and its pools serve all examples of a test, emptied in between; the directory is new for each. A killed
process loses its router and every request in it, nothing else; a power cut takes what is not on the disk as well.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from langchain_core.embeddings import Embeddings

from rollout.errors import RefusedError
from rollout.profiles import PRODUCTION
from rollout.transitions import Target, step
from src.database import Role
from src.tools.rag_tools import faults
from src.tools.rag_tools.migration import faiss_files, flags, ledger
from src.tools.rag_tools.migration.faiss_sqlite import JOURNAL_FILE
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.settings import MigrationSettings
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.migration.stores import Stores
from src.tools.rag_tools.migration.targeting import bucket
from src.tools.rag_tools.pgvector_store import Pool, open_pool
from src.tools.rag_tools.store import Chunk, Hit, StoreError, Vector
from tests.integration.state_machine import truth
from tests.integration.state_machine.actors import Actor, Secondaries, current, hook
from tests.integration.state_machine.power import Disk
from tests.integration.state_machine.properties import CHUNKS, Answers, Violation
from tests.support.routers import add_users, set_stage

PROFILE = replace(PRODUCTION, ramp=(50, 100))
MOST_PROCESSES = 3
MOST_HITS = 50
ROUNDS = 3
"""What fails in one round of settling, because another entry came first, is done in the next."""
EMPTY = """
SET session_replication_role = replica;
DELETE FROM document_chunks; DELETE FROM vector_ledger; DELETE FROM documents; DELETE FROM rollout_instances;
DELETE FROM rollout_counts; DELETE FROM rollout_transitions WHERE id > 1;
"""
SILENT = "UPDATE rollout_instances SET seen_at = seen_at - interval '5 minutes' WHERE instance = %s"
LEASES_OVER = "UPDATE vector_ledger SET next_attempt_at = clock_timestamp() WHERE state = 'owed'"
MANY_ATTEMPTS = "UPDATE vector_ledger SET attempts = 9 WHERE state = 'owed'"
LONG_AGO = "UPDATE documents SET updated_at = updated_at - interval '5 minutes'"


class NoisyEmbeddings(Embeddings):
    """As a real service: the text decides the vector, but asked twice it answers with slightly different ones."""

    def __init__(self) -> None:
        self.asked = 0

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        self.asked += 1
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        made = np.random.default_rng(seed).standard_normal(1536)
        made += np.random.default_rng(self.asked).standard_normal(1536) / 1000
        values: list[float] = (made / np.linalg.norm(made)).tolist()
        return values


class WatchedStores(Stores):
    """Stores of which one can be made to fail for reads; knows what a write that is abandoned still does later."""

    __slots__ = ("failing", "world")

    def search(self, names: Sequence[Store], user_id: int, vector: Vector, k: int, hidden: frozenset[int]) -> list[Hit]:
        if self.failing in names:
            raise StoreError(f"{self.failing} is away")
        return Stores.search(self, names, user_id, vector, k, hidden)

    def present(self, store: Store, user_id: int, document_id: int, chunks: Sequence[Chunk]) -> None:
        write = partial(Stores.present, self, store, user_id, document_id, chunks)
        self._remember(store, document_id, write)
        write()

    def absent(self, store: Store, user_id: int, document_id: int) -> None:
        write = partial(Stores.absent, self, store, user_id, document_id)
        self._remember(store, document_id, write)
        write()

    def copy_of(self, store: Store, user_id: int, document_id: int) -> list[Chunk]:
        chunks = Stores.copy_of(self, store, user_id, document_id)
        now = self.world.look()
        if len(chunks) != CHUNKS and now.ledger[document_id, store] == ("present", "done"):
            # Settling takes any exception for a failure to be tried again.
            self.world.noticed.append(("PAYLOAD", f"{store} is done with document {document_id}, gave {len(chunks)}"))
        return chunks

    def _remember(self, store: Store, document_id: int, write: Any) -> None:
        actor = current()
        if actor is not None:
            # A commit that PostgreSQL has begun may end after its client gave it up; a journal entry may not.
            abandoned = Actor(f"abandoned write of document {document_id} to {store}", write, process=None)
            actor.landing = partial(self.world.begin, abandoned) if store is Store.PGVECTOR else None


@dataclass
class Document:
    """An upload as its user sees it. `durable`: POST has answered. `returned`: the call that indexes it has."""

    name: str
    user_id: int
    post: bool
    id: int | None = None
    durable: bool = False
    returned: bool = False
    deleting: bool = False
    deleted: bool = False
    gone: bool = False


@dataclass
class Fetched:
    """A poll between its two halves. `counts`: the fleet has not declared the process dead since."""

    row: Any
    ready: frozenset[int]
    deleted: frozenset[int]
    counts: bool = True


@dataclass
class Process:
    """`counts`: as a live one for the fleet. `given_up`: at some time since it began it did not.

    `found`, `lost`: documents it must, must never answer with.
    """

    name: str
    pool: Pool
    router: Router | None = None
    counts: bool = True
    given_up: bool = False
    found: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    lost_here: set[int] = field(default_factory=set)
    fetched: Fetched | None = None

    @property
    def up(self) -> Router:
        assert self.router is not None, f"{self.name} is down"
        return self.router


class World:
    """`hurt`: something has failed, crashed or was abandoned in this example. `noticed`: in the middle of a move."""

    def __init__(self, database: Any, root: Path) -> None:
        self.root = root
        self.users = _users(database)
        self.bulk = psycopg.connect(database.superuser_conninfo(), autocommit=True)
        self.bulk.execute(f"ALTER DATABASE {database.name} SET synchronous_commit = off")
        self.control = psycopg.connect(database.conninfo(Role.ROLLOUT), autocommit=True)
        self.pools = [open_pool(database.conninfo(Role.APP), 4, name=f"process {at}") for at in range(MOST_PROCESSES)]
        self.embeddings = NoisyEmbeddings()
        self.vector = np.array(self.embeddings.embed_query("anything"), np.float32)
        self.examples = 0
        self.processes: list[Process] = []
        self.actors: list[Actor] = []
        self.documents: list[Document] = []
        self.journal: sqlite3.Connection | None = None
        self.disk = Disk()
        self.settings = MigrationSettings()
        self.noticed: list[Violation] = []
        self.hurt = False

    # -- the life of an example

    def reset(self, stage: Stage, percent: int, processes: int) -> None:
        self.clear()
        self.examples += 1
        self.embeddings.asked = 0
        self.hurt = False
        self.noticed.clear()
        self.bulk.execute(EMPTY)
        if stage is not Stage.OFF:
            set_stage(self.bulk, stage, percent)
        self.directory.mkdir(parents=True)
        names = "ABC"[:processes]
        self.processes = [Process(name, pool) for name, pool in zip(names, self.pools, strict=False)]
        for process in self.processes:
            self.start(process)
        self.journal = truth.open_journal(self.directory / "faiss_index")
        faults.hook = hook

    def clear(self) -> None:
        """End whatever the example before left."""
        for actor in self.actors:
            actor.kill()
        faults.hook = None
        for process in self.processes:
            self._drop(process)
        self.disk.forget()
        if self.journal is not None:
            self.journal.close()
            shutil.rmtree(self.directory)
        self.journal, self.processes, self.actors, self.documents = None, [], [], []

    def close(self) -> None:
        self.clear()
        self.disk.close()
        for pool in self.pools:
            pool.close()
        self.bulk.close()
        self.control.close()

    @property
    def directory(self) -> Path:
        return self.root / str(self.examples)

    def look(self) -> truth.Truth:
        assert self.journal is not None
        return truth.look(self.bulk, self.journal)

    def bytes_held(self) -> dict[Store, dict[int, list[tuple[str, str, str]]]]:
        assert self.journal is not None
        return truth.bytes_of(self.bulk, self.journal)

    def recognise(self, now: truth.Truth) -> None:
        """Learn the ids of uploads whose caller never got one, and which documents will never be wanted again."""
        numbers = {name: number for number, (name, _) in now.documents.items()}
        for document in self.documents:
            document.id = document.id or numbers.get(document.name)
            document.gone |= document.id is not None and now.wanted(document.id) == "absent"

    # -- processes

    def start(self, process: Process) -> None:
        settings = self.settings.model_copy(update={"FAISS_INDEX_PATH": self.directory / "faiss_index"})
        router = Router(process.pool, self.embeddings, settings=settings, clock=lambda: 0.0)
        router._secondary.shutdown()
        router._secondary = Secondaries(self.begin)  # type: ignore[assignment]
        watched = WatchedStores(router.stores.faiss, router.stores.pgvector)
        object.__setattr__(watched, "failing", None)
        object.__setattr__(watched, "world", self)
        router.stores = router.settler.stores = watched
        self.disk.watch(router.stores.faiss.journal)
        process.router, process.counts, process.given_up = router, True, False
        before = self.look() if self.journal is not None else None
        router.start(loops=False)
        if before is not None:
            self._learn(process, before.ready(), self._deleted())

    def kill(self, process: Process) -> None:
        """As kill -9 would, and long enough ago for the fleet to go on without it."""
        self.hurt = True
        for actor in [each for each in self.actors if each.process is process]:
            actor.kill()
        self.bulk.execute(SILENT, (process.up.flags.instance,))
        self._drop(process)

    def stall(self, process: Process) -> None:
        """It has not been heard of for a minute, and knows nothing of that."""
        process.counts, process.given_up = False, True
        if process.fetched is not None:
            process.fetched.counts = False
        self.bulk.execute(SILENT, (process.up.flags.instance,))

    def power_cut(self) -> None:
        """Every process dies, and with them what nobody had waited for until it was on the disk."""
        assert self.journal is not None
        for process in self.processes:
            if process.router is not None:
                self.kill(process)
        self.journal.close()
        self.disk.lose_power(self.directory, self.directory / "faiss_index" / JOURNAL_FILE)
        self.journal = truth.open_journal(self.directory / "faiss_index")

    def fetch(self, process: Process) -> None:
        ready, deleted = self.look().ready(), self._deleted()
        process.fetched = Fetched(process.up.flags.fetch(), ready, deleted)

    def adopt(self, process: Process) -> None:
        got, process.fetched = process.fetched, None
        assert got is not None
        process.up._watch_failover(process.up.flags.adopt(*got.row))
        process.counts |= got.counts
        self._learn(process, got.ready, got.deleted)

    def poll(self, process: Process) -> None:
        if process.fetched is None:
            self.fetch(process)
        self.adopt(process)

    def _learn(self, process: Process, ready: frozenset[int], deleted: frozenset[int]) -> None:
        process.found |= ready
        process.lost |= deleted

    def _deleted(self) -> frozenset[int]:
        return frozenset(each.id for each in self.documents if each.deleted and each.id is not None)

    def _drop(self, process: Process) -> None:
        if process.router is not None:
            process.router.stores.faiss.close()
        process.router, process.fetched = None, None
        process.lost_here.clear()

    # -- requests

    def begin(self, actor: Actor) -> Actor:
        self.actors.append(actor)
        return actor

    def upload(self, process: Process, user_id: int, *, post: bool) -> Actor:
        name = f"{self.examples}-{len(self.documents)}.md"
        document = Document(name, user_id, post)
        self.documents.append(document)
        path = self.directory / name
        path.write_text(f"{name}: " + "the tide turns at four, " * 60)
        kind = "POST" if post else "upload"
        return self.begin(
            Actor(f"{kind} of {name} at {process.name}", partial(_upload, process, document, path), process=process)
        )

    def delete(self, process: Process, document: Document) -> Actor:
        document.deleting = True
        label = f"deletion of {document.name} at {process.name}"
        return self.begin(Actor(label, partial(_delete, process, document), process=process))

    def settle(self, process: Process, *, leases_over: bool = True) -> Actor:
        if leases_over:
            self.bulk.execute(LEASES_OVER)
        return self.begin(Actor(f"settling at {process.name}", process.up.resume, process=process))

    def settle_the_way_back(self, process: Process) -> Actor:
        body = partial(process.up.settler.run, stores=[Store.FAISS], at_once=True)
        return self.begin(Actor(f"settling faiss at {process.name}", body, process=process))

    def rest(self) -> None:
        """Every request ends, every process is up and has polled, and all that is owed is settled, without failures."""
        while any(not actor.done for actor in self.actors):
            for actor in self.actors:
                actor.finish()
        for process in self.processes:
            if process.router is None:
                self.start(process)
            self.poll(process)
        settler = self.processes[0]
        ledger.retry_aside(self.control)
        self.bulk.execute(LONG_AGO)
        for _ in range(ROUNDS):
            self.settle(settler).finish()
        settler.up.sweep(self.directory)
        for process in self.processes:
            self.poll(process)

    def saved(self) -> Counter[int]:
        """How many chunks of each document the files hold that the old release would open."""
        folder = self.directory / "faiss_index"
        self.processes[0].up.stores.faiss.save()
        content = faiss_files.open_files(folder).content
        documents = truth.documents_of(self.journal)
        return Counter(documents[name.replace("-", "")] for name in content.chunks.docstore_ids)

    def files(self) -> set[str]:
        """What lies beside the uploads."""
        return {path.name for path in self.directory.iterdir() if path.is_file()}

    # -- stages

    def step(self, forward: bool) -> bool:
        """One transition, if there is one and the rules of safety allow it; True where it was made."""
        from rollout.transitions import next_target, previous_target

        view = flags.latest(self.control)
        target: Target | None = next_target(view, PROFILE) if forward else previous_target(view)
        if target is None:
            return False
        try:
            step(self.control, view, target, PROFILE, actor="test", reason="test", evidence={})
        except RefusedError:
            return False
        return True

    # -- reads

    def answers(self, process: Process) -> Answers:
        """What every user would be answered now, also where the store that serves them fails."""
        answers = [self._answer(process, user, None) for user in self.users]
        view = process.up.flags.view()
        for user in self.users:
            if view.fallback(user) is not None:
                answers.append(self._answer(process, user, view.serving(user)))
        mine = {each.id: each.user_id for each in self.documents}
        whole = [{number for number in answer if answer[number] == CHUNKS} for _, _, answer in answers]
        return Answers(
            regular=frozenset().union(*whole[: len(self.users)]),
            every=frozenset(
                number for number in set().union(*whole)
                if all(number in found for (user, _, _), found in zip(answers, whole, strict=True)
                       if mine[number] == user)
            ),
            some=frozenset().union(*(answer for _, _, answer in answers)),
            foreign=frozenset(number for user, _, answer in answers for number in answer if mine[number] != user),
        )  # fmt: skip

    def _answer(self, process: Process, user_id: int, failing: Store | None) -> tuple[int, Store | None, Counter[int]]:
        stores = process.up.stores
        object.__setattr__(stores, "failing", failing)
        try:
            hits = process.up.search(user_id, self.vector, MOST_HITS)
        finally:
            object.__setattr__(stores, "failing", None)
            process.up.breaker.succeeded()
        return user_id, failing, Counter(hit.document_id for hit in hits)


def _upload(process: Process, document: Document, path: Path) -> None:
    router = process.up
    document.id = router.receive(document.user_id, path, document.name)
    document.durable = document.post
    router.index(document.id, answered=document.post)
    document.returned = True
    process.found.add(document.id)


def _delete(process: Process, document: Document) -> None:
    assert document.id is not None
    process.up.delete(document.user_id, document.id)
    document.deleted = True
    process.lost_here.add(document.id)


def _users(database: Any) -> list[int]:
    """One user who moves with the first half of the ramp and one who does not."""
    numbers = add_users(database, 20)
    return [next(each for each in numbers if (bucket(each) < 50) is first) for first in (True, False)]
