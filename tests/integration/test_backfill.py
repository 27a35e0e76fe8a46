"""The backfill: copies exactly what FAISS has, whoever dies, deletes or settles meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout.backfill import BackfillReport, Progress, backfill
from rollout.copy_format import COPY, HEADER, TRAILER, blocks
from rollout.errors import RefusedError
from rollout.repair import repair
from rollout.verify import verify
from src.database import Role
from src.tools.rag_tools.giants import make_giant
from src.tools.rag_tools.migration import ledger
from src.tools.rag_tools.migration.faiss_store import FaissStore
from src.tools.rag_tools.migration.ledger import State
from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from src.tools.rag_tools.pgvector_store import PgvectorStore, Pool, insert_chunks
from src.tools.rag_tools.store import Chunk, StoreError
from tests.support.legacy_index import (
    LegacyIndex,
    adopt,
    make_legacy_index,
    rollout_pool,
    unit_vectors,
)
from tests.support.routers import add_users, router_on, set_stage, write_note
from tests.support.sessions import OTHERS, wait_for_blocked, wait_until

pytestmark = [
    pytest.mark.migration,
    pytest.mark.filterwarnings("ignore:.langchain-community. is being sunset:DeprecationWarning"),
]

ADA, BEN, CLEO = 1, 2, 3
PLAN = [(ADA, 5), (BEN, 3), (ADA, 12), (CLEO, 1), (BEN, 8), (ADA, 4), (CLEO, 7), (BEN, 2)]
BATCH = 10


@pytest.fixture
def legacy(database: Any, tmp_path: Path) -> LegacyIndex:
    made = make_legacy_index(tmp_path / "faiss_index", PLAN)
    adopt(database, made)
    return made


@pytest.fixture
def faiss(legacy: LegacyIndex) -> Iterator[FaissStore]:
    with legacy.opened() as store:
        yield store


@pytest.fixture
def pool(database: Any) -> Iterator[Pool]:
    with rollout_pool(database) as opened:
        yield opened


def run(pool: Pool, faiss: Any, **options: Any) -> BackfillReport:
    options = {"execute": True, "progress": lambda _: None, "batch_chunks": BATCH, "streams": 1, **options}
    return backfill(pool, faiss, **options)


def stored(pool: Pool) -> dict[int, int]:
    """How many chunks pgvector has of each document."""
    with pool.connection() as connection:
        found = connection.execute(
            "SELECT document_id, count(*) FROM document_chunks WHERE user_id > 0 GROUP BY document_id"
        )
        return {int(document_id): int(chunks) for document_id, chunks in found}


def states(pool: Pool, store: Store = Store.PGVECTOR) -> dict[int, tuple[str, str]]:
    with pool.connection() as connection:
        found = connection.execute("SELECT document_id, wanted, state FROM vector_ledger WHERE store = %s", (store,))
        return {int(document_id): (wanted, state) for document_id, wanted, state in found}


def assert_copied(pool: Pool, faiss: FaissStore, legacy: LegacyIndex, *, but: int = 0) -> None:
    """Every document but one is in pgvector as it is in FAISS, to the bit, and nothing else is."""
    copied = [document for document in legacy.documents if document.document_id != but]
    pgvector = PgvectorStore(pool)
    for document in copied:
        mine = faiss.document(document.document_id)
        theirs = pgvector.document(document.user_id, document.document_id)
        assert [plain(chunk) for chunk in theirs] == [plain(chunk) for chunk in mine]
    assert stored(pool) == {each.document_id: len(each.docstore_ids) for each in copied}


def plain(chunk: Chunk) -> tuple[Any, ...]:
    return (
        chunk.id, chunk.document_id, chunk.ordinal, chunk.content, chunk.metadata,
        chunk.vector.tobytes(),
    )  # fmt: skip


def done(pool: Pool) -> set[int]:
    return {document for document, state in states(pool).items() if state == ("present", "done")}


def obstruct(database: Any, legacy: LegacyIndex, document_id: int) -> Any:
    """A connection with a row of the document, not committed: a COPY of it waits there."""
    document = legacy.documents[document_id - 1]
    connection = database.connect(Role.ROLLOUT)
    connection.execute(
        "INSERT INTO document_chunks"
        " (user_id, id, document_id, ordinal, content, content_sha256, metadata, embedding)"
        " VALUES (%s, %s, %s, 0, '', '', '{}', %s::vector)",
        (document.user_id, document.chunk_ids[-1], document_id, json.dumps([0.0] * 1536)),
    )
    return connection


class Altered:
    """A FaissStore that gives one document's chunks otherwise."""

    def __init__(self, faiss: FaissStore, document_id: int, change: Callable[[list[Chunk]], list[Chunk]]) -> None:
        self.faiss, self.document_id, self.change = faiss, document_id, change

    def document(self, document_id: int, user_id: int | None = None) -> list[Chunk]:
        chunks = self.faiss.document(document_id, user_id)
        return self.change(chunks) if document_id == self.document_id else chunks


# -- what it copies


def test_pgvector_holds_what_faiss_holds_to_the_bit(pool: Pool, faiss: FaissStore, legacy: LegacyIndex) -> None:
    report = run(pool, faiss)
    assert_copied(pool, faiss, legacy)
    assert set(states(pool).values()) == {("present", "done")}
    assert (report.documents, report.chunks) == (len(PLAN), legacy.chunks)
    assert report.owners == {ADA, BEN, CLEO}
    assert (report.failed, report.remaining, report.stopped) == ({}, 0, False)


def test_several_streams_copy_each_document_once(pool: Pool, faiss: FaissStore, legacy: LegacyIndex) -> None:
    report = run(pool, faiss, streams=3, batch_chunks=4)
    assert_copied(pool, faiss, legacy)
    assert (report.documents, report.chunks, report.remaining) == (len(PLAN), legacy.chunks, 0)


def test_a_stream_that_fails_ends_the_others_and_is_told(
    pool: Pool, faiss: FaissStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=60)

    def fail(*_: Any, **__: Any) -> None:
        both.wait()
        raise StoreError("the disk is full")

    monkeypatch.setattr("rollout.backfill.copy_batch", fail)
    with pytest.raises(StoreError, match="the disk is full"):
        run(pool, faiss, streams=2)


def test_a_copied_row_is_the_row_that_an_insert_makes(database: Any, pool: Pool) -> None:
    texts = ["", "plain", "“naïve” — \u2028 \U0001f600", "tab\tand\nline", "x" * 20_000]
    metadatas: list[dict[str, Any]] = [
        {}, {"page": 1, "nested": {"a": [1, 2.5, None, True]}}, {"ключ": "значение"},
        {"empty": "", "quote": '"\\'}, {"large": 2**60},
    ]  # fmt: skip
    vectors = unit_vectors(len(texts), np.random.default_rng(5))
    chunks = [
        Chunk(uuid.UUID(int=ordinal), 7, ordinal, text, metadata, vector)
        for ordinal, (text, metadata, vector) in enumerate(zip(texts, metadatas, vectors, strict=True))
    ]
    with pool.connection() as connection, connection.cursor().copy(COPY) as copy:
        for block in (HEADER, *blocks(ADA, chunks), TRAILER):
            copy.write(block)
    with pool.connection() as connection:
        insert_chunks(connection, BEN, chunks)
        rows = {
            user_id: connection.execute(
                "SELECT id, document_id, ordinal, content, content_sha256, metadata, vector_send(embedding)"
                " FROM document_chunks WHERE user_id = %s ORDER BY ordinal",
                (user_id,),
            ).fetchall()
            for user_id in (ADA, BEN)
        }
    assert rows[ADA] == rows[BEN]
    assert [row[3] for row in rows[ADA]] == texts


def test_a_dry_run_says_what_would_be_copied_and_copies_nothing(pool: Pool, faiss: FaissStore) -> None:
    told: list[Progress] = []
    dry = run(pool, faiss, execute=False, progress=told.append)
    assert stored(pool) == {}
    assert set(states(pool).values()) == {("present", "owed")}
    assert told[-1] == Progress(len(PLAN), len(PLAN), dry.chunks, 0)
    assert dry.remaining == len(PLAN)
    assert dry.estimated_seconds > 0
    wet = run(pool, faiss)
    assert (dry.documents, dry.chunks, dry.bytes, dry.owners) == (
        wet.documents, wet.chunks, wet.bytes, wet.owners,
    )  # fmt: skip


def test_who_is_a_giant_already_gets_the_copied_chunks_into_the_half_wide_copy_too(
    database: Any, pool: Pool, faiss: FaissStore
) -> None:
    with database.connect(Role.APP, autocommit=True) as connection:
        make_giant(connection, ADA)
    run(pool, faiss)
    with pool.connection() as connection:
        copied = connection.execute("SELECT user_id, count(*) FROM chunk_halves GROUP BY user_id").fetchall()
    assert copied == [(ADA, 21)]


def test_running_again_changes_nothing(pool: Pool, faiss: FaissStore, legacy: LegacyIndex) -> None:
    run(pool, faiss)
    again = run(pool, faiss)
    assert (again.documents, again.chunks, again.bytes) == (0, 0, 0)
    assert_copied(pool, faiss, legacy)


def test_rows_left_of_an_owed_document_are_replaced(
    database: Any, pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    with obstruct(database, legacy, 1) as connection:
        connection.commit()
    run(pool, faiss)
    assert_copied(pool, faiss, legacy)


@pytest.mark.parametrize("stage", [stage for stage in Stage if len(ROUTING[stage].writes) == 1])
def test_a_stage_that_writes_one_store_is_refused(database: Any, pool: Pool, faiss: FaissStore, stage: Stage) -> None:
    with database.connect(autocommit=True) as connection:
        set_stage(connection, stage)
    with pytest.raises(RefusedError, match=f"stage {stage}"):
        run(pool, faiss)
    assert stored(pool) == {}


def test_a_stage_left_midway_is_refused_and_what_was_copied_stays_copied(
    database: Any, pool: Pool, faiss: FaissStore
) -> None:
    def step_back(_: Progress) -> None:
        with database.connect(autocommit=True) as connection:
            set_stage(connection, Stage.OFF)

    with pytest.raises(RefusedError, match="stage off"):
        run(pool, faiss, progress=step_back)
    assert set(stored(pool)) == done(pool) == {1, 2}


# -- batches


def test_a_batch_holds_no_more_chunks_than_asked_and_a_larger_document_is_alone(pool: Pool, faiss: FaissStore) -> None:
    told: list[Progress] = []
    run(pool, faiss, progress=told.append)
    assert [each.chunks for each in told] == [5 + 3, 8 + 12, 20 + 1 + 8, 29 + 4, 33 + 7 + 2]
    assert [each.documents for each in told] == [2, 3, 5, 6, 8]


def test_stopping_leaves_the_rest_owed_and_the_same_command_goes_on(
    pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    answers = iter([False, False, True])
    report = run(pool, faiss, should_stop=lambda: next(answers))
    assert (report.stopped, report.documents, report.remaining) == (True, 3, 5)
    assert set(stored(pool)) == {1, 2, 3}
    assert run(pool, faiss).documents == 5
    assert_copied(pool, faiss, legacy)


def test_an_interrupt_in_the_middle_leaves_whole_batches(pool: Pool, faiss: FaissStore, legacy: LegacyIndex) -> None:
    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pool, faiss, progress=interrupt)
    assert set(stored(pool)) == {1, 2}
    run(pool, faiss)
    assert_copied(pool, faiss, legacy)


# -- death

CHILD = """
import sys
from pathlib import Path

from rollout.backfill import backfill
from src.tools.rag_tools.migration.faiss_store import FaissStore, Owner, Owners
from src.tools.rag_tools.pgvector_store import open_pool

conninfo, directory = sys.argv[1:]

def told(progress):
    print(progress.documents, flush=True)
    sys.stdin.readline()

with open_pool(conninfo, 4, name="child") as pool:
    with pool.connection() as connection:
        rows = connection.execute("SELECT docstore_id, user_id, document_id, ordinal FROM legacy_chunks")
        owners = Owners(1, {name: Owner(*rest) for name, *rest in rows})
    faiss = FaissStore.open(Path(directory), owners=owners)
    backfill(pool, faiss, execute=True, progress=told, batch_chunks=10, streams=1)
"""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def child(database: Any, legacy: LegacyIndex) -> Iterator[subprocess.Popen[str]]:
    """A backfill in a process of its own that waits for a line after each batch."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, database.conninfo(Role.ROLLOUT), str(legacy.directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'backend'}:{ROOT}"},
    )
    with process:
        yield process
        process.kill()


def test_a_kill_in_the_middle_of_a_copy_loses_nothing_and_leaves_no_half_document(
    database: Any,
    pool: Pool,
    faiss: FaissStore,
    legacy: LegacyIndex,
    child: subprocess.Popen[str],
) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "2\n"
    with obstruct(database, legacy, 3) as obstacle:
        child.stdin.write("\n")
        child.stdin.flush()
        wait_for_blocked(database, 1)
        child.send_signal(signal.SIGKILL)
        child.wait()
        obstacle.rollback()
    wait_until(database, f"NOT EXISTS ({OTHERS} AND usename = 'victus_rollout' AND state = 'active')")
    assert stored(pool) == {1: 5, 2: 3}
    assert done(pool) == {1, 2}
    report = run(pool, faiss)
    assert report.documents == 6
    assert_copied(pool, faiss, legacy)


# -- after it


def test_after_deletions_a_repair_and_a_step_back_a_second_backfill_brings_nothing_back(
    database: Any, pool: Pool, faiss: FaissStore, legacy: LegacyIndex, tmp_path: Path
) -> None:
    run(pool, faiss)
    with router_on(database, tmp_path) as router, database.connect(autocommit=True) as connection:
        router.delete(ADA, 1)
        for stage, deleted in ((Stage.OFF, 2), (Stage.DUALWRITE, 4)):
            set_stage(connection, stage)
            router.refresh()
            router.delete(PLAN[deleted - 1][0], deleted)
        repaired = repair(pool, verify(pool, faiss, progress=lambda _: None), execute=True)
        router.settler.run(at_once=True)
    assert (repaired.acts, run(pool, faiss).documents) == ([], 0)
    assert {document for document, state in states(pool).items() if state == ("absent", "done")} == {1, 2, 4}
    assert set(stored(pool)) == {document.document_id for document in legacy.documents} - {1, 2, 4}
    assert all(faiss.document(deleted) == [] for deleted in (1, 2, 4))


# -- others at work


def test_a_delete_while_its_document_is_being_copied_wins(
    database: Any, pool: Pool, faiss: FaissStore, legacy: LegacyIndex, tmp_path: Path
) -> None:
    with (
        ThreadPoolExecutor(2) as threads,
        router_on(database, tmp_path) as router,
        obstruct(database, legacy, 3) as obstacle,
    ):
        backfilling = threads.submit(run, pool, faiss)
        wait_for_blocked(database, 1)
        deleting = threads.submit(router.delete, ADA, 3)
        wait_for_blocked(database, 2)
        obstacle.rollback()
        assert backfilling.result().documents == len(PLAN)
        deleting.result()
    assert states(pool)[3] == states(pool, Store.FAISS)[3] == ("absent", "done")
    assert_copied(pool, faiss, legacy, but=3)


def test_a_document_deleted_between_two_batches_is_not_copied(
    database: Any, pool: Pool, faiss: FaissStore, legacy: LegacyIndex, tmp_path: Path
) -> None:
    with router_on(database, tmp_path) as router:

        def delete(told: Progress) -> None:
            if told.documents == 2:
                router.delete(ADA, 3)

        report = run(pool, faiss, progress=delete)
    assert (report.documents, report.failed, report.remaining) == (len(PLAN) - 1, {}, 0)
    assert_copied(pool, faiss, legacy, but=3)


def test_a_deletion_committed_and_not_yet_applied_keeps_its_document_out(
    pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    def withdrawn(told: Progress) -> None:
        if told.documents == 2:
            with pool.connection() as connection:
                ledger.withdraw(connection, 3, ADA)

    report = run(pool, faiss, progress=withdrawn)
    assert (report.documents, report.failed) == (len(PLAN) - 1, {})
    assert states(pool)[3] == ("absent", "owed")
    assert_copied(pool, faiss, legacy, but=3)


def test_a_document_that_somebody_is_settling_is_passed_over_and_not_waited_for(
    database: Any, pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    with database.connect(Role.ROLLOUT) as settling:
        settling.execute("SELECT 1 FROM vector_ledger WHERE document_id = 3 FOR UPDATE")
        report = run(pool, faiss)
        assert (report.documents, report.remaining, report.failed) == (len(PLAN) - 1, 1, {})
        assert_copied(pool, faiss, legacy, but=3)
    assert run(pool, faiss).documents == 1
    assert_copied(pool, faiss, legacy)


def test_what_was_passed_over_is_copied_once_it_is_free_again(
    database: Any, pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    with database.connect(Role.ROLLOUT) as settling:
        settling.execute("SELECT 1 FROM vector_ledger WHERE document_id = 1 FOR UPDATE")
        report = run(pool, faiss, progress=lambda _: settling.rollback())
    assert (report.documents, report.remaining) == (len(PLAN), 0)
    assert_copied(pool, faiss, legacy)


def test_two_backfills_at_once_copy_every_document_once(pool: Pool, faiss: FaissStore, legacy: LegacyIndex) -> None:
    together = threading.Barrier(2)

    def one() -> BackfillReport:
        with legacy.opened() as mine:
            together.wait()
            return run(pool, mine, batch_chunks=3)

    with ThreadPoolExecutor(2) as threads:
        reports = [future.result() for future in [threads.submit(one), threads.submit(one)]]
    assert sum(report.documents for report in reports) == len(PLAN)
    assert sum(report.chunks for report in reports) == legacy.chunks
    assert_copied(pool, faiss, legacy)


def test_a_backfill_and_a_settling_backend_harm_nothing(
    database: Any, pool: Pool, faiss: FaissStore, legacy: LegacyIndex, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as threads, router_on(database, tmp_path) as router:
        settling = threads.submit(router.settler.run, at_once=True)
        report = run(pool, faiss, batch_chunks=3)
        settled = settling.result()
    assert (settled.failed, report.failed) == ({}, {})
    assert settled.done + report.documents >= len(PLAN)
    assert_copied(pool, faiss, legacy)


def test_an_upload_from_before_is_copied_and_what_was_kept_for_it_goes(
    database: Any, pool: Pool, tmp_path: Path
) -> None:
    (owner,) = add_users(database, 1)
    with router_on(database, tmp_path) as router:
        path = write_note(tmp_path, "note.md", "The tide turns at four.")
        document_id = router.receive(owner, path, path.name)
        router.index(document_id)
        assert len(list(path.parent.iterdir())) == 2
        with database.connect(autocommit=True) as connection:
            set_stage(connection, Stage.DUALWRITE)
        faiss = router.stores.faiss
        assert run(pool, faiss).documents == 1
        assert list(path.parent.iterdir()) == [path]
        assert [plain(chunk) for chunk in PgvectorStore(pool).document(owner, document_id)] == [
            plain(chunk) for chunk in faiss.document(document_id)
        ]


# -- what cannot be copied


def drifted(chunks: list[Chunk]) -> list[Chunk]:
    return [replace(chunk, vector=chunk.vector * np.float32(1.5)) for chunk in chunks]


def not_a_number(chunks: list[Chunk]) -> list[Chunk]:
    return [*chunks[1:], replace(chunks[0], vector=chunks[0].vector * np.float32("nan"))]


def cut_short(chunks: list[Chunk]) -> list[Chunk]:
    return [*chunks[1:], replace(chunks[0], vector=chunks[0].vector[:768])]


def with_nul(chunks: list[Chunk]) -> list[Chunk]:
    return [*chunks[1:], replace(chunks[0], content="a\0b")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drifted, "length 1.5"),
        (not_a_number, "length nan"),
        (cut_short, r"shape \(768,\)"),
        (with_nul, "document 5: PostgreSQL refuses a row .invalid byte sequence"),
    ],
)
def test_a_document_that_cannot_be_copied_is_set_aside_and_stops_no_other(
    pool: Pool,
    faiss: FaissStore,
    legacy: LegacyIndex,
    change: Callable[[list[Chunk]], list[Chunk]],
    reason: str,
) -> None:
    report = run(pool, Altered(faiss, 5, change))
    assert list(report.failed) == [5]
    assert re.search(reason, report.failed[5])
    assert (report.documents, report.remaining) == (len(PLAN) - 1, 1)
    assert_copied(pool, faiss, legacy, but=5)
    assert states(pool)[5] == ("present", State.ASIDE)
    with pool.connection() as connection:
        recorded = connection.execute(
            "SELECT last_error FROM vector_ledger WHERE document_id = 5 AND store = 'pgvector'"
        ).fetchone()
    assert recorded == (report.failed[5],)


def test_a_document_that_faiss_lost_stays_owed_for_when_it_is_back(
    pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    report = run(pool, Altered(faiss, 5, lambda _: []))
    assert "holds no chunk" in report.failed[5]
    assert states(pool)[5] == ("present", State.OWED)
    assert run(pool, faiss).documents == 1
    assert_copied(pool, faiss, legacy)


def test_a_chunk_id_that_the_user_has_already_keeps_only_its_own_document_out(
    database: Any, pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    run(pool, faiss)
    with pool.connection() as connection:
        connection.execute("UPDATE document_chunks SET document_id = 99 WHERE user_id = %s AND id = %s",
                           (BEN, legacy.documents[4].chunk_ids[0]))  # fmt: skip
        connection.execute("UPDATE vector_ledger SET state = 'owed' WHERE store = 'pgvector'")
    report = run(pool, faiss)
    assert list(report.failed) == [5]
    assert report.documents == len(PLAN) - 1


def test_a_dry_run_names_what_could_not_be_copied_and_records_nothing(pool: Pool, faiss: FaissStore) -> None:
    report = run(pool, Altered(faiss, 5, not_a_number), execute=False)
    assert list(report.failed) == [5]
    assert states(pool)[5] == ("present", State.OWED)


def test_a_faiss_directory_that_cannot_be_read_ends_the_run_and_blames_no_document(
    pool: Pool, faiss: FaissStore
) -> None:
    faiss.close()
    with pytest.raises(StoreError):
        run(pool, faiss)
    assert set(states(pool).values()) == {("present", "owed")}
