"""Verify finds every way in which the stores can differ, and takes nothing under way for one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from rollout.backfill import backfill
from rollout.repair import RepairReport, repair
from rollout.verify import Progress, verify
from rollout.verify_merge import Kind
from rollout.verify_report import VerifyReport
from src.database import Role
from src.tools.rag_tools.migration.faiss_store import FaissStore, Owner, Owners
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.pgvector_store import Pool
from src.tools.rag_tools.store import Chunk, StoreError
from tests.support.legacy_index import (
    LegacyIndex,
    adopt,
    make_legacy_index,
    rollout_pool,
    unit_vectors,
)
from tests.support.routers import router_on, set_stage
from tests.support.sessions import wait_for_blocked

pytestmark = [
    pytest.mark.migration,
    pytest.mark.filterwarnings("ignore:.langchain-community. is being sunset:DeprecationWarning"),
]

ADA, BEN, CLEO = 1, 2, 3
PLAN = [(ADA, 5), (BEN, 3), (ADA, 9), (CLEO, 1), (BEN, 4)]


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


@pytest.fixture
def copied(pool: Pool, faiss: FaissStore) -> None:
    """Both stores hold everything."""
    assert backfill(pool, faiss, execute=True, progress=lambda _: None).documents == len(PLAN)


def run(pool: Pool, faiss: Any, progress: Callable[[Progress], None] = lambda _: None) -> VerifyReport:
    return verify(pool, faiss, progress=progress)


def execute(pool: Pool, statement: str, *values: Any) -> list[Any]:
    with pool.connection() as connection:
        cursor = connection.execute(statement, values)
        return cursor.fetchall() if cursor.description else [cursor.rowcount]


def found(report: VerifyReport) -> dict[tuple[int, Kind], int]:
    """How many chunks differ, by document and kind."""
    counted: dict[tuple[int, Kind], int] = {}
    for each in report.found:
        key = (each.document_id, each.kind)
        counted[key] = counted.get(key, 0) + each.chunks
    return counted


def examples(report: VerifyReport) -> set[UUID]:
    return {UUID(name) for each in report.found for name in each.examples}


class WithoutChunks:
    """A FaissStore that has lost some chunks."""

    def __init__(self, faiss: FaissStore, lost: set[UUID]) -> None:
        self.faiss, self.lost = faiss, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self.faiss, name)

    def inventory(self, user_id: int) -> Iterator[Any]:
        return (row for row in self.faiss.inventory(user_id) if row.chunk_id not in self.lost)

    def document(self, document_id: int) -> list[Chunk]:
        return [chunk for chunk in self.faiss.document(document_id) if chunk.id not in self.lost]

    def owner_of(self, chunk_id: UUID) -> int | None:
        return None if chunk_id in self.lost else self.faiss.owner_of(chunk_id)


# -- agreement


@pytest.mark.usefixtures("copied")
def test_stores_that_hold_the_same_do_not_differ_and_the_run_is_on_record(
    pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    told: list[Progress] = []
    report = run(pool, faiss, told.append)
    assert (report.found, report.owed) == ([], set())
    assert (report.users, report.documents, report.chunks) == (3, len(PLAN), legacy.chunks)
    assert told[-1] == Progress(3, 3, legacy.chunks)
    ((run_id, transition, chunks, differences, recorded, in_order),) = execute(
        pool,
        "SELECT id, transition_id, chunks, differences, report, started_at < finished_at FROM verify_runs",
    )
    assert (run_id, transition) == (report.run_id, report.transition_id) == (run_id, 2)
    assert (chunks, differences, in_order) == (legacy.chunks, 0, True)
    assert recorded == json.loads(json.dumps(report.to_json()))


def test_before_the_backfill_everything_is_owed_and_nothing_differs(
    pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    report = run(pool, faiss)
    assert report.found == []
    assert report.owed == {document.document_id for document in legacy.documents}


def test_two_empty_stores_agree(database: Any, pool: Pool, tmp_path: Path) -> None:
    faiss = FaissStore.open(tmp_path / "faiss_index")
    try:
        report = run(pool, faiss)
    finally:
        faiss.close()
    assert (report.users, report.chunks, report.found) == (0, 0, [])


# -- planted differences


@pytest.mark.usefixtures("copied")
def test_a_chunk_gone_from_pgvector_is_missing_there(pool: Pool, faiss: FaissStore, legacy: LegacyIndex) -> None:
    lost = legacy.documents[2].chunk_ids[4]
    execute(pool, "DELETE FROM document_chunks WHERE user_id = %s AND id = %s", ADA, lost)
    report = run(pool, faiss)
    assert found(report) == {(3, Kind.MISSING_IN_PGVECTOR): 1}
    assert examples(report) == {lost}
    assert report.found[0].held == {Store.FAISS: 9, Store.PGVECTOR: 8}


@pytest.mark.usefixtures("copied")
def test_a_chunk_gone_from_faiss_is_missing_there(pool: Pool, faiss: FaissStore, legacy: LegacyIndex) -> None:
    lost = legacy.documents[1].chunk_ids[0]
    report = run(pool, WithoutChunks(faiss, {lost}))
    assert found(report) == {(2, Kind.MISSING_IN_FAISS): 1}
    assert examples(report) == {lost}


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ("content = content || '.'", Kind.CONTENT_DRIFT),
        ("content = '.', content_sha256 = sha256('.')", Kind.CONTENT_DRIFT),
        ("content_sha256 = sha256('.')", Kind.CONTENT_DRIFT),
        ("embedding = l2_normalize(embedding + array_fill(1e-4, array[1536])::vector)", Kind.VECTOR_DRIFT),
        ("document_id = 1", Kind.DOCUMENT_MISMATCH),
    ],
)
def test_a_row_changed_behind_the_router_is_found(
    pool: Pool, faiss: FaissStore, legacy: LegacyIndex, change: str, kind: Kind
) -> None:
    changed = legacy.documents[2].chunk_ids[4]
    execute(pool, f"UPDATE document_chunks SET {change} WHERE user_id = %s AND id = %s", ADA, changed)
    report = run(pool, faiss)
    assert set(report.by_kind.items()) == {(kind, 1)}
    assert examples(report) == {changed}
    assert report.differences == 1


@pytest.mark.usefixtures("copied")
def test_a_chunk_under_another_user_is_one_owner_mismatch(pool: Pool, faiss: FaissStore, legacy: LegacyIndex) -> None:
    swapped = legacy.documents[2].chunk_ids[4]
    execute(pool, "UPDATE document_chunks SET user_id = %s WHERE user_id = %s AND id = %s", BEN, ADA, swapped)
    report = run(pool, faiss)
    assert found(report) == {(3, Kind.OWNER_MISMATCH): 1}
    assert (report.found[0].user_id, report.found[0].belongs_to) == (BEN, ADA)
    assert examples(report) == {swapped}


@pytest.mark.usefixtures("copied")
def test_a_chunk_slipped_into_another_users_document_is_one_owner_mismatch(
    pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    swapped = legacy.documents[2].chunk_ids[4]
    execute(
        pool,
        "UPDATE document_chunks SET user_id = %s, document_id = 2 WHERE user_id = %s AND id = %s",
        BEN, ADA, swapped,
    )  # fmt: skip
    report = run(pool, faiss)
    assert found(report) == {(2, Kind.OWNER_MISMATCH): 1}
    assert (report.found[0].user_id, report.found[0].belongs_to) == (BEN, ADA)
    assert report.displaced == {3}


@pytest.mark.usefixtures("copied")
def test_a_second_copy_under_another_user_is_an_owner_mismatch(
    pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    execute(
        pool,
        "INSERT INTO document_chunks"
        " SELECT %s, id, document_id, ordinal, content, content_sha256, metadata, embedding, created_at"
        " FROM document_chunks WHERE user_id = %s AND id = %s",
        CLEO, ADA, legacy.documents[0].chunk_ids[0],
    )  # fmt: skip
    report = run(pool, faiss)
    assert found(report) == {(1, Kind.OWNER_MISMATCH): 1}
    assert (report.found[0].user_id, report.found[0].belongs_to) == (CLEO, ADA)


@pytest.mark.usefixtures("copied")
def test_a_document_that_no_store_holds_any_more_is_missing_in_both(
    pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    execute(pool, "DELETE FROM document_chunks WHERE user_id = %s", CLEO)
    report = run(pool, WithoutChunks(faiss, set(legacy.documents[3].chunk_ids)))
    assert found(report) == {(4, Kind.MISSING_IN_FAISS): 1, (4, Kind.MISSING_IN_PGVECTOR): 1}


@pytest.mark.usefixtures("copied")
def test_a_deleted_document_that_both_stores_still_hold_is_extra(pool: Pool, faiss: FaissStore) -> None:
    execute(pool, "UPDATE vector_ledger SET wanted = 'absent' WHERE document_id = 2")
    assert found(run(pool, faiss)) == {(2, Kind.EXTRA): 6}


@pytest.mark.usefixtures("copied")
def test_a_document_that_the_ledger_does_not_know_is_extra(pool: Pool, faiss: FaissStore) -> None:
    execute(pool, "DELETE FROM vector_ledger WHERE document_id = 2")
    assert found(run(pool, faiss)) == {(2, Kind.EXTRA): 6}


@pytest.mark.usefixtures("copied")
def test_a_document_that_faiss_gives_to_another_user_is_an_owner_mismatch(pool: Pool, legacy: LegacyIndex) -> None:
    owners = dict(legacy.owners.chunks)
    for name in legacy.documents[1].docstore_ids:
        owners[name] = Owner(CLEO, 2, owners[name].ordinal)
    faiss = FaissStore.open(legacy.directory, owners=Owners(2, owners))
    try:
        report = run(pool, faiss)
    finally:
        faiss.close()
    assert found(report) == {(2, Kind.OWNER_MISMATCH): 3}
    assert {(each.store, each.user_id, each.belongs_to) for each in report.found} == {(Store.FAISS, CLEO, BEN)}


@pytest.mark.usefixtures("copied")
def test_every_difference_is_counted_and_the_record_has_them(
    pool: Pool, faiss: FaissStore, legacy: LegacyIndex
) -> None:
    execute(pool, "DELETE FROM document_chunks WHERE user_id = %s", BEN)
    execute(pool, "UPDATE document_chunks SET content = '.' WHERE user_id = %s", CLEO)
    report = run(pool, faiss)
    assert report.by_kind == {Kind.MISSING_IN_PGVECTOR: 7, Kind.CONTENT_DRIFT: 1}
    ((differences, recorded),) = execute(pool, "SELECT differences, report FROM verify_runs")
    assert differences == 8
    assert [each["document_id"] for each in recorded["found"]] == [2, 4, 5]


# -- writes meanwhile


@pytest.mark.usefixtures("copied")
def test_documents_written_and_deleted_while_it_runs_are_no_difference(
    database: Any, pool: Pool, legacy: LegacyIndex, tmp_path: Path
) -> None:
    """Uploads and deletions fall between the two streams of a user, where they show as differences."""
    with router_on(database, tmp_path) as router:
        stores = router.stores
        number = iter(range(100, 200))

        class Meddled(WithoutChunks):
            def inventory(self, user_id: int) -> Iterator[Any]:
                rows = list(self.faiss.inventory(user_id))
                upload(database, router, user_id, next(number))
                mine = [each.document_id for each in legacy.documents if each.user_id == user_id]
                router.delete(user_id, mine[0])
                return iter(rows)

        report = run(pool, Meddled(stores.faiss, set()))
    assert report.found == []
    assert report.users == 3


def upload(database: Any, router: Any, user_id: int, document_id: int) -> None:
    """A document in both stores, as the router leaves it."""
    with database.connect(autocommit=True) as connection:
        connection.execute(
            "INSERT INTO documents (id, user_id, filename, path) VALUES (%s, %s, 'new', '')",
            (document_id, user_id),
        )
        connection.execute(
            "INSERT INTO vector_ledger (document_id, store, user_id, wanted, state, next_attempt_at)"
            " SELECT %s, unnest(%s::text[]), %s, 'present', 'owed', now()",
            (document_id, list(Store), user_id),
        )
    vectors = unit_vectors(2, np.random.default_rng(document_id))
    chunks = [
        Chunk(UUID(int=100 * document_id + ordinal), document_id, ordinal, "new", {}, vector)
        for ordinal, vector in enumerate(vectors)
    ]
    for store in Store:
        router.stores.present(store, user_id, document_id, chunks)


@pytest.mark.usefixtures("copied")
def test_a_document_that_is_written_at_every_look_is_owed(pool: Pool, faiss: FaissStore) -> None:
    class Meddled(WithoutChunks):
        def document(self, document_id: int) -> list[Chunk]:
            execute(pool, "UPDATE vector_ledger SET changed_at = clock_timestamp()")
            return self.faiss.document(document_id)

    execute(pool, "DELETE FROM document_chunks WHERE user_id = %s", CLEO)
    report = run(pool, Meddled(faiss, set()))
    assert (report.found, report.owed) == ([], {4})


@pytest.mark.usefixtures("copied")
def test_a_run_that_cannot_read_a_store_leaves_no_evidence(pool: Pool, faiss: FaissStore) -> None:
    class Lost(WithoutChunks):
        def inventory(self, user_id: int) -> Iterator[Any]:
            yield next(self.faiss.inventory(user_id))
            raise StoreError("the directory is gone")

    with pytest.raises(StoreError, match="the directory is gone"):
        run(pool, Lost(faiss, set()))
    assert execute(pool, "SELECT count(*) FROM verify_runs") == [(0,)]
    assert run(pool, faiss).found == []


# -- mending


def mend(database: Any, pool: Pool, faiss: Any, tmp_path: Path) -> RepairReport:
    """Repair what verify finds, and settle; then nothing differs."""
    made = repair(pool, run(pool, faiss), execute=True)
    with router_on(database, tmp_path) as router:
        assert router.settler.run(at_once=True).failed == {}
    again = run(pool, faiss)
    assert (again.found, again.owed) == ([], set())
    return made


PLANTED = {
    "missing": "DELETE FROM document_chunks WHERE user_id = 1 AND ordinal = 2",
    "missing documents": "DELETE FROM document_chunks WHERE user_id = 2",
    "content": "UPDATE document_chunks SET content = '.' WHERE user_id = 1 AND ordinal < 3",
    "vector": (
        "UPDATE document_chunks SET embedding = embedding * array_fill(-1, array[1536])::vector WHERE user_id = 3"
    ),
    "owner": "UPDATE document_chunks SET user_id = 2 WHERE user_id = 1 AND ordinal = 1",
    "owner and document": ("UPDATE document_chunks SET user_id = 2, document_id = 2 WHERE user_id = 1 AND ordinal = 1"),
    "document": "UPDATE document_chunks SET document_id = 1 WHERE user_id = 1 AND ordinal = 7",
}


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
def test_what_is_wrong_in_pgvector_is_mended_from_faiss(
    database: Any, pool: Pool, faiss: FaissStore, tmp_path: Path, planted: str
) -> None:
    assert execute(pool, planted)[0] > 0
    made = mend(database, pool, faiss, tmp_path)
    assert made.acts
    assert made.left == {}


@pytest.mark.usefixtures("copied")
def test_what_faiss_lost_is_mended_from_pgvector(
    database: Any, pool: Pool, legacy: LegacyIndex, tmp_path: Path
) -> None:
    """Owners that name two chunks of one document and none of another: FAISS no longer gives them out."""
    lost = {*legacy.documents[2].docstore_ids[:2], *legacy.documents[4].docstore_ids}
    execute(pool, "UPDATE legacy_chunks SET status = 'quarantined', user_id = NULL, document_id = NULL"
            " WHERE docstore_id = ANY (%s)", list(lost))  # fmt: skip
    owners = {name: owner for name, owner in legacy.owners.chunks.items() if name not in lost}
    faiss = FaissStore.open(legacy.directory, owners=Owners(1, owners))
    try:
        assert found(run(pool, faiss)) == {(3, Kind.MISSING_IN_FAISS): 2, (5, Kind.MISSING_IN_FAISS): 4}
        mend(database, pool, faiss, tmp_path)
    finally:
        faiss.close()


@pytest.mark.usefixtures("copied")
def test_a_deletion_that_a_store_forgot_is_done_again(
    database: Any, pool: Pool, faiss: FaissStore, tmp_path: Path
) -> None:
    execute(pool, "UPDATE documents SET status = 'deleted' WHERE id = 2")
    execute(pool, "UPDATE vector_ledger SET wanted = 'absent' WHERE document_id = 2")
    mend(database, pool, faiss, tmp_path)
    assert execute(pool, "SELECT count(*) FROM document_chunks WHERE user_id = 2 AND document_id = 2") == [(0,)]
    assert faiss.document(2) == []


@pytest.mark.usefixtures("copied")
def test_a_dry_repair_names_what_it_would_do_and_does_nothing(pool: Pool, faiss: FaissStore) -> None:
    execute(pool, PLANTED["content"])
    report = run(pool, faiss)
    dry = repair(pool, report, execute=False)
    assert found(run(pool, faiss)) == found(report)
    wet = repair(pool, report, execute=True)
    assert dry.acts == wet.acts
    assert run(pool, faiss).found == []


@pytest.mark.usefixtures("copied")
def test_wrong_rows_of_a_user_who_is_read_from_pgvector_are_left_alone(
    database: Any, pool: Pool, faiss: FaissStore
) -> None:
    execute(pool, PLANTED["content"])
    report = run(pool, faiss)
    with database.connect(autocommit=True) as connection:
        set_stage(connection, Stage.LIVE, 100)
    made = repair(pool, report, execute=True)
    assert made.acts == []
    assert all("is read from pgvector" in reason for reason in made.left.values())
    assert set(made.left) == {1, 3}
    assert found(run(pool, faiss)) == found(report)


@pytest.mark.usefixtures("copied")
def test_what_no_store_holds_is_left_with_the_reason(pool: Pool, faiss: FaissStore, legacy: LegacyIndex) -> None:
    execute(pool, "DELETE FROM document_chunks WHERE user_id = %s", CLEO)
    report = run(pool, WithoutChunks(faiss, set(legacy.documents[3].chunk_ids)))
    made = repair(pool, report, execute=True)
    assert made.acts == []
    assert "no store holds a chunk of it" in made.left[4]
    assert execute(pool, "SELECT count(*) FROM vector_ledger WHERE state <> 'done'") == [(0,)]


@pytest.mark.usefixtures("copied")
def test_a_document_deleted_since_the_report_is_not_owed_again(
    database: Any, pool: Pool, faiss: FaissStore, tmp_path: Path
) -> None:
    execute(pool, PLANTED["missing documents"])
    report = run(pool, faiss)
    with router_on(database, tmp_path) as router:
        router.delete(BEN, 2)
    made = repair(pool, report, execute=True)
    assert set(made.left) == {2}
    assert [act.document_id for act in made.acts] == [5]
    assert execute(pool, "SELECT count(*) FROM vector_ledger WHERE document_id = 2 AND state <> 'done'") == [(0,)]


@pytest.mark.usefixtures("copied")
def test_a_repair_that_meets_a_step_decides_by_the_stage_after_it(database: Any, pool: Pool, faiss: FaissStore) -> None:
    execute(pool, PLANTED["content"])
    report = run(pool, faiss)
    with ThreadPoolExecutor(1) as threads, database.connect(Role.ROLLOUT) as stepping:
        stepping.execute("LOCK TABLE documents IN SHARE ROW EXCLUSIVE MODE")
        repairing = threads.submit(repair, pool, report, execute=True)
        wait_for_blocked(database, 1)
        set_stage(stepping, Stage.LIVE, 100)
        stepping.commit()
        made = repairing.result()
    assert made.acts == []
    assert set(made.left) == {1, 3}
