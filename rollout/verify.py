"""Do the stores agree? Compares every chunk of every user by id, owner, document and hashes.

Each user's chunks stream from both stores in order of id, so memory does not grow with them. What
differs is looked at a second time, document by document, within one state of the ledger: what is
being written counts as owed and is no difference. The result becomes a row of `verify_runs` at the
end: a run that dies leaves none, so no evidence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import UUID

import structlog
from psycopg.types.json import Jsonb

from rollout.verify_judge import Look, judge
from rollout.verify_merge import Entries, LedgerEntry, PgvectorRow, Survey, merge
from rollout.verify_report import VerifyReport, by_document
from src.tools.rag_tools.migration.faiss_store import FaissStore
from src.tools.rag_tools.migration.flags import FlagsUnknownError
from src.tools.rag_tools.migration.ledger import State, Wanted
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.pgvector_store import Connection, Pool, unavailable
from src.tools.rag_tools.store import InventoryRow, vector_hash

log = structlog.get_logger(__name__)

RECORDED_DOCUMENTS = 200
FETCH_ROWS = 500
STREAMS = 2
LOOKS = 3

BEGIN = "SELECT id, clock_timestamp() FROM rollout_transitions ORDER BY id DESC LIMIT 1"
USERS = "SELECT user_id FROM document_chunks UNION SELECT user_id FROM vector_ledger"
# Hashed where the rows are: some 130 bytes a chunk cross the wire instead of 7 kB.
HASHED = """
SELECT user_id, id, document_id, sha256(convert_to(content, 'UTF8')),
       sha256(vector_send(embedding)), content_sha256
FROM document_chunks
"""
OF_USER = f"{HASHED} WHERE user_id = %s ORDER BY id"
OF_DOCUMENT = f"{HASHED} WHERE user_id = ANY (%s) AND document_id = %s ORDER BY user_id, id"
OWNED = "SELECT id FROM unnest(%s::uuid[]) AS id WHERE chunk_owner(id) IS NOT NULL"
LEDGER_OF_USER = """
SELECT document_id, store, user_id, wanted, state FROM vector_ledger WHERE user_id = %s
"""
LEDGER_OF_DOCUMENT = """
SELECT document_id, store, user_id, wanted, state, changed_at FROM vector_ledger
WHERE document_id = %s
"""
RECORD = """
INSERT INTO verify_runs (transition_id, started_at, chunks, differences, report)
VALUES (%s, %s, %s, %s, %s) RETURNING id
"""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the first look is."""

    users: int
    of_users: int
    chunks: int


def verify(pool: Pool, faiss: FaissStore, *, progress: Callable[[Progress], None]) -> VerifyReport:
    """Compare both stores and record the result. `pool` connects as victus_rollout.

    The owners must be set in `faiss`. Raises StoreError where a store is away; nothing is recorded
    then.
    """
    with unavailable("verify"), pool.connection() as connection:
        work = _Verify(pool, connection, faiss, progress, _begun(connection))
        return work.run()


@dataclass(slots=True)
class _Verify:
    pool: Pool
    connection: Connection
    faiss: FaissStore
    progress: Callable[[Progress], None]
    report: VerifyReport
    suspects: dict[int, set[int]] = field(default_factory=dict)
    """The documents to look at again, with the users under whom they were seen or are wanted."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> VerifyReport:
        users = self._users()
        self._survey_all(users)
        self.report.users = len(users)
        for document_id, seen_under in sorted(self.suspects.items()):
            self._look_again(document_id, seen_under)
        self._record()
        return self.report

    def _users(self) -> list[int]:
        stored = {int(row[0]) for row in self.connection.execute(USERS)}
        return sorted(stored.union(self.faiss.users()))

    # -- first look

    def _survey_all(self, users: list[int]) -> None:
        """Some users at a time: PostgreSQL hashes in processes of its own."""
        waiting = iter(users)
        done = count(1)
        with ThreadPoolExecutor(STREAMS, thread_name_prefix="verify") as threads:
            begun = [threads.submit(self._survey_next, waiting, done, len(users)) for _ in range(STREAMS)]
        for each in begun:
            each.result()

    def _survey_next(self, waiting: Iterator[int], done: Iterator[int], of_users: int) -> None:
        with self.pool.connection() as connection:
            while True:
                with self.lock:
                    user_id = next(waiting, None)
                if user_id is None:
                    return
                survey, ledger = self._survey(connection, user_id)
                with self.lock:
                    self._take_in(user_id, survey, ledger)
                    self.progress(Progress(next(done), of_users, self.report.chunks))

    def _survey(self, connection: Connection, user_id: int) -> tuple[Survey, Mapping[int, Entries]]:
        survey = Survey()
        # Closed here: left to the collector, the cursor would outlive the use of its connection.
        with closing(_stored(connection, user_id)) as stored:
            for pair in merge(self.faiss.inventory(user_id), stored):
                survey.add(pair)
        # Read after the streams: an entry that is done by now may have been owed while they ran.
        return survey, _ledger(connection, LEDGER_OF_USER, user_id)

    def _take_in(self, user_id: int, survey: Survey, ledger: Mapping[int, Entries]) -> None:
        self.report.chunks += survey.chunks
        self.report.documents += len(survey.documents)
        suspects = survey.suspects(ledger)
        self.report.owed |= survey.owed(ledger) - suspects
        for document_id in suspects:
            self.suspects.setdefault(document_id, set()).add(user_id)

    # -- second look

    def _look_again(self, document_id: int, seen_under: set[int]) -> None:
        for _ in range(LOOKS):
            before = self._entries(document_id)
            look = self._look(document_id, seen_under, before)
            if self._entries(document_id) == before:
                self._judge(look)
                return
        self.report.owed.add(document_id)

    def _look(self, document_id: int, seen_under: set[int], ledger: Entries) -> Look:
        faiss = {row.chunk_id: row for row in self._held_by_faiss(document_id)}
        owners = {entry.user_id for entry in ledger.values()}
        rows = self._held_by_pgvector(document_id, seen_under | owners)
        own = {row.chunk_id for row in rows if row.user_id in owners}
        return Look(
            document_id,
            ledger,
            faiss,
            self.faiss.owner_of(next(iter(faiss))) if faiss else None,
            rows,
            {each: self.faiss.owner_of(each) for each in own - faiss.keys()},
            self._stored_somewhere(list(faiss.keys() - own)),
        )

    def _held_by_faiss(self, document_id: int) -> Iterator[InventoryRow]:
        for chunk in self.faiss.document(document_id):
            yield InventoryRow(chunk.id, document_id, chunk.content_sha256, vector_hash(chunk.vector))

    def _held_by_pgvector(self, document_id: int, users: set[int]) -> list[PgvectorRow]:
        found = self.connection.execute(OF_DOCUMENT, (list(users), document_id), binary=True)
        return [PgvectorRow(*row) for row in found]

    def _stored_somewhere(self, chunk_ids: list[UUID]) -> frozenset[UUID]:
        if not chunk_ids:
            return frozenset()
        return frozenset(row[0] for row in self.connection.execute(OWNED, (chunk_ids,)))

    def _judge(self, look: Look) -> None:
        judgement = judge(look)
        self.report.found += by_document(look, judgement.differences)
        if judgement.owed:
            self.report.owed.add(look.document_id)
        if judgement.displaced:
            self.report.displaced.add(look.document_id)

    # -- ledger and record

    def _entries(self, document_id: int) -> Entries:
        return _ledger(self.connection, LEDGER_OF_DOCUMENT, document_id).get(document_id, {})

    def _record(self) -> None:
        report = self.report
        values: tuple[Any, ...] = (
            report.transition_id, report.started_at, report.chunks, report.differences,
            Jsonb(report.to_json(RECORDED_DOCUMENTS)),
        )  # fmt: skip
        row = self.connection.execute(RECORD, values).fetchone()
        report.run_id = None if row is None else int(row[0])
        log.info("verify.run.done", run_id=report.run_id, differences=report.differences)


def _stored(connection: Connection, user_id: int) -> Generator[PgvectorRow, None, None]:
    with connection.transaction(), connection.cursor("inventory", binary=True) as cursor:
        cursor.itersize = FETCH_ROWS
        for row in cursor.execute(OF_USER, (user_id,)):
            yield PgvectorRow(*row)


def _ledger(connection: Connection, statement: str, number: int) -> dict[int, dict[Store, LedgerEntry]]:
    entries: dict[int, dict[Store, LedgerEntry]] = {}
    for row in connection.execute(statement, (number,)):
        document_id, store, user_id, wanted, state, *rest = row
        entry = LedgerEntry(user_id, Wanted(wanted), State(state), *rest)
        entries.setdefault(document_id, {})[Store(store)] = entry
    return entries


def _begun(connection: Connection) -> VerifyReport:
    row = connection.execute(BEGIN).fetchone()
    if row is None:
        raise FlagsUnknownError("rollout_transitions is empty; restore its rows from a backup")
    return VerifyReport(*row)
