"""Shadow reads on both real stores: what they find out is recorded without a word of text, and no answer waits."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import structlog

from src.tools.rag_tools.migration.evidence import Read
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.shadow import DROPS_SECONDS, fingerprint
from src.tools.rag_tools.migration.stages import Stage, Store
from src.tools.rag_tools.store import Hit, StoreError, Vector
from tests.support.embeddings import HashEmbeddings
from tests.support.routers import router_on, set_stage
from tests.support.seeds import add_users, write_note

pytestmark = pytest.mark.migration

SECRET = "The treasure lies under the third oak."
TEXTS = (SECRET, "The tide turns at four.", "Trains leave at noon.", "Bread is baked at dawn.")
LONG_AGO = "UPDATE vector_ledger SET changed_at = changed_at - interval '1 hour'"


@dataclass
class World:
    """One process, one user, a few documents in both stores."""

    database: Any
    folder: Path
    router: Router
    owner: int
    stranger: int
    documents: list[int]

    def stage(self, stage: Stage, percent: int = 0) -> None:
        with self.database.connect(autocommit=True) as connection:
            set_stage(connection, stage, percent)
        self.router.refresh()

    def superuser(self, statement: str, *values: object) -> None:
        with psycopg.connect(self.database.superuser_conninfo(), autocommit=True) as connection:
            connection.execute(statement, values)

    def ask(self, text: str = SECRET, k: int = 3) -> list[Hit]:
        return self.router.query(self.owner, text, k)

    def read(self, *, served_by: Store = Store.FAISS, k: int = 3, text: str = SECRET) -> Read:
        """As it comes from `search`."""
        begun = self.router.clock()
        question = vector(text)
        hits = self.router.stores[served_by].search(self.owner, question, k)
        return Read(self.router.flags.view(), self.owner, question, k, served_by, hits, begun, self.router.clock())

    def compared(self) -> list[dict[str, Any]]:
        """The events of what is queued, each as its row has it."""
        self.router.shadow.start()
        self.router.shadow.close()
        return self.rows()

    def rows(self) -> list[dict[str, Any]]:
        with self.database.connect() as connection:
            return [row[0] for row in connection.execute("SELECT event FROM shadow_diffs ORDER BY id")]


def vector(text: str) -> Vector:
    return np.array(HashEmbeddings().embed_query(text), np.float32)


@pytest.fixture
def world(database: Any, tmp_path: Path) -> Iterator[World]:
    owner, stranger = add_users(database, 2)
    with router_on(database, tmp_path, SHADOW_TIMEOUT_SECONDS=0.2, SHADOW_QUEUE=4) as router:
        made = World(database, tmp_path, router, owner, stranger, [])
        made.stage(Stage.SHADOW)
        for number, text in enumerate(TEXTS):
            path = write_note(tmp_path, f"{number}.md", text)
            made.documents.append(router.receive(owner, path, path.name))
            router.index(made.documents[-1])
        made.superuser(LONG_AGO)
        yield made


# -- causes, each made for real


def test_equal_answers_match_and_the_row_says_what_was_compared(world: World) -> None:
    hits = world.ask()
    (event,) = world.compared()
    ids = [[str(hit.chunk_id), pytest.approx(hit.similarity, abs=1e-5)] for hit in hits]
    assert event["cause"] == "match"
    assert event["served"] == ids
    assert event["shadow"] == ids
    assert (event["served_by"], event["stage"], event["transition_id"], event["k"]) == ("faiss", "shadow", 2, 3)
    assert (event["overlap_at_k"], event["top1_match"], event["cohort"]) == (1.0, True, "small")
    assert event["rbo"] == pytest.approx(1.0)
    assert event["largest_similarity_difference"] < 1e-5
    assert event["served_ms"] > 0
    assert event["shadow_ms"] > 0
    assert event["fingerprint"] == fingerprint(3)
    with world.database.connect() as connection:
        columns = connection.execute(
            "SELECT transition_id, stage, user_id, cohort, cause, served_by, fingerprint FROM shadow_diffs"
        ).fetchone()
    assert columns == (2, "shadow", world.owner, "small", "match", "faiss", fingerprint(3))


def test_a_comparison_is_found_by_the_id_of_its_request(world: World) -> None:
    with structlog.contextvars.bound_contextvars(request_id="of-the-request"):
        world.ask()
    world.ask()
    ids = {event["request_id"] for event in world.compared()}  # two workers compare at once, in either order
    assert len(ids - {""}) == 2
    assert "of-the-request" in ids


def test_tied_chunks_in_another_order_are_a_tie(world: World) -> None:
    for number in (8, 9):
        path = write_note(world.folder, f"{number}.md", SECRET)
        world.router.index(world.router.receive(world.owner, path, path.name))
    world.superuser(LONG_AGO)
    read = world.read()
    swapped = [read.hits[1], read.hits[0], read.hits[2]]
    assert world.router.shadow.compare(replace(read, hits=swapped)) == "tie"


def test_a_chunk_that_pgvector_has_not_is_missing_there(world: World) -> None:
    world.superuser("DELETE FROM document_chunks WHERE document_id = %s", world.documents[0])
    world.ask()
    assert [event["cause"] for event in world.compared()] == ["missing_in_pgvector"]


def test_a_chunk_that_faiss_has_not_is_missing_there(world: World) -> None:
    world.router.stores.faiss.delete(world.owner, world.documents[0])
    world.stage(Stage.LIVE, 100)
    world.ask()
    (event,) = world.compared()
    assert (event["cause"], event["served_by"]) == ("missing_in_faiss", "pgvector")


def test_what_was_owed_meanwhile_is_stale(world: World) -> None:
    world.superuser("DELETE FROM document_chunks WHERE document_id = %s", world.documents[0])
    world.superuser(
        "UPDATE vector_ledger SET state = 'owed' WHERE document_id = %s AND store = 'pgvector'", world.documents[0]
    )
    assert world.router.shadow.compare(world.read()) == "stale"


def test_what_was_settled_between_the_reads_is_stale(world: World) -> None:
    read = world.read()
    world.superuser("DELETE FROM document_chunks WHERE document_id = %s", world.documents[0])
    world.superuser(
        "UPDATE vector_ledger SET changed_at = clock_timestamp() WHERE document_id = %s", world.documents[0]
    )
    assert world.router.shadow.compare(read) == "stale"


def test_what_another_user_was_owed_explains_nothing(world: World) -> None:
    world.superuser("DELETE FROM document_chunks WHERE document_id = %s", world.documents[0])
    world.superuser(
        "INSERT INTO vector_ledger (document_id, store, user_id, wanted, state, next_attempt_at)"
        " VALUES (999, 'pgvector', %s, 'present', 'owed', now())",
        world.stranger,
    )
    assert world.router.shadow.compare(world.read()) == "missing_in_pgvector"


def test_another_text_under_the_same_id_is_content_drift(world: World) -> None:
    world.superuser("UPDATE document_chunks SET content = 'x' WHERE document_id = %s", world.documents[0])
    assert world.router.shadow.compare(world.read()) == "content_drift"


def test_another_vector_under_the_same_id_is_vector_drift(world: World) -> None:
    near = vector(SECRET) + vector("noise") / 5
    moved = str((near / np.linalg.norm(near)).tolist())
    world.superuser("UPDATE document_chunks SET embedding = %s WHERE document_id = %s", moved, world.documents[0])
    assert world.router.shadow.compare(world.read()) == "vector_drift"


@pytest.mark.parametrize("owed", [False, True])
def test_a_chunk_that_the_other_store_gives_to_somebody_else_is_a_mismatch_whatever_was_owed(
    world: World, owed: bool
) -> None:
    world.superuser(
        "UPDATE document_chunks SET user_id = %s WHERE document_id = %s", world.stranger, world.documents[0]
    )
    if owed:
        world.superuser("UPDATE vector_ledger SET state = 'owed' WHERE store = 'pgvector'")
    assert world.router.shadow.compare(world.read()) == "owner_mismatch"


def test_a_shadow_read_that_fails_is_an_error_and_is_recorded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.tools.rag_tools.pgvector_store.PgvectorStore.search", _away)
    world.ask()
    (event,) = world.compared()
    assert (event["cause"], event["shadow"], event["overlap_at_k"]) == ("error", [], None)


def test_faiss_failing_in_the_shadow_is_recorded_although_it_cannot_be_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.stage(Stage.LIVE, 100)
    monkeypatch.setattr(world.router.stores.faiss, "tail", _away)
    world.ask()
    assert [(event["cause"], event["served_by"]) for event in world.compared()] == [("error", "pgvector")]


def test_a_comparison_that_breaks_in_an_unforeseen_way_counts_as_dropped_and_the_next_one_is_made(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare = world.router.shadow.compare
    broken = threading.Event()

    def once(read: Read) -> Any:
        if broken.is_set():
            return compare(read)
        broken.set()
        raise ZeroDivisionError

    monkeypatch.setattr(world.router.shadow, "compare", once)
    for _ in range(2):
        world.ask()
    assert len(world.compared()) == 1
    assert world.router.shadow.drops == 1


def test_a_shadow_read_that_waits_for_a_lock_is_given_up_in_time(world: World) -> None:
    with psycopg.connect(world.database.superuser_conninfo()) as locking:
        locking.execute("LOCK TABLE document_chunks IN ACCESS EXCLUSIVE MODE")
        assert world.router.shadow.compare(world.read()) == "timeout"
    (event,) = world.rows()
    assert event["shadow_ms"] >= 200


def test_one_that_was_answered_too_late_is_a_timeout_too(world: World) -> None:
    shadow, now = world.router.shadow, [1_000.0]

    def clock() -> float:
        now[0] += 0.3
        return now[0]

    shadow.clock = clock
    assert shadow.compare(world.read()) == "timeout"


# -- the caller


def test_a_shadow_read_that_hangs_keeps_nobody_waiting(world: World) -> None:
    """Every question is answered while nothing at all can be read from pgvector."""
    world.router.shadow.start()
    expected = [hit.chunk_id for hit in world.ask()]
    with psycopg.connect(world.database.superuser_conninfo()) as locking:
        locking.execute("LOCK TABLE document_chunks IN ACCESS EXCLUSIVE MODE")
        for _ in range(20):
            assert [hit.chunk_id for hit in world.ask()] == expected
    world.router.shadow.close()
    assert {event["cause"] for event in world.rows()} <= {"match", "timeout"}
    assert len(world.rows()) + world.router.shadow.drops == 21


def test_what_does_not_fit_the_queue_is_dropped_and_the_fleet_counts_it(world: World) -> None:
    answers = [[hit.chunk_id for hit in world.ask()] for _ in range(7)]
    assert answers == [answers[0]] * 7
    assert world.router.shadow.drops == 3
    for _ in range(2):
        world.router.refresh()
    with world.database.connect() as connection:
        counted = dict(connection.execute("SELECT name, sum(count) FROM rollout_counts GROUP BY name").fetchall())
    assert counted["shadow.dropped"] == 3
    assert counted["reads.faiss"] == 7
    assert len(world.compared()) == 4


def test_drops_are_told_of_once_in_a_while_not_once_each(world: World) -> None:
    shadow, now = world.router.shadow, [1_000.0]
    shadow.clock = lambda: now[0]
    with structlog.testing.capture_logs() as lines:
        for _ in range(7):
            world.ask()
        now[0] += DROPS_SECONDS
        for _ in range(2):
            world.ask()
    assert [line["drops"] for line in lines if line["event"] == "shadow.read.dropped"] == [1, 4]


def test_a_failing_shadow_changes_no_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = world.ask()
    monkeypatch.setattr("src.tools.rag_tools.pgvector_store.PgvectorStore.search", _away)
    world.router.shadow.start()
    assert [world.ask() for _ in range(3)] == [expected] * 3


@pytest.mark.parametrize("stage", [Stage.OFF, Stage.DUALWRITE, Stage.RAMPDOWN, Stage.COMPLETE])
def test_a_stage_without_shadow_reads_makes_none(world: World, stage: Stage) -> None:
    world.stage(stage)
    world.ask()
    assert world.compared() == []


def test_the_sample_rate_of_nought_makes_none(world: World) -> None:
    world.superuser(
        "INSERT INTO rollout_transitions (id, stage, read_percent, shadow_sample_rate, actor, reason)"
        " VALUES (3, 'shadow', 0, 0, 'test', 'test')"
    )
    world.router.refresh()
    for _ in range(5):
        world.ask()
    assert world.compared() == []


def test_an_answer_merged_from_both_stores_is_compared_with_neither(world: World) -> None:
    world.superuser("UPDATE vector_ledger SET state = 'owed' WHERE document_id = %s", world.documents[0])
    world.router.refresh()
    assert len(world.ask()) == 3
    assert world.compared() == []


# -- what it says


def test_no_word_of_a_question_or_a_document_is_in_row_or_event(world: World) -> None:
    with structlog.testing.capture_logs() as events:
        for text in (SECRET, "Where is the treasure?"):
            world.ask(text)
        world.superuser("DELETE FROM document_chunks WHERE document_id = %s", world.documents[0])
        world.ask()
        rows = world.compared()
    diffs = [event for event in events if event["event"] == "rag.shadow_diff"]
    assert len(diffs) == len(rows) == 3
    with world.database.connect() as connection:
        stored = connection.execute("SELECT string_agg(d::text, ' ') FROM shadow_diffs d").fetchone()
    for said in (json.dumps(events, default=str), str(stored)):
        for word in ("treasure", "third oak", "Where is", "0.md"):
            assert word not in said


def test_the_event_is_what_the_row_holds(world: World) -> None:
    with structlog.testing.capture_logs() as events:
        world.ask()
        (row,) = world.compared()
    (event,) = [event for event in events if event["event"] == "rag.shadow_diff"]
    assert {name: event[name] for name in row} == row
    assert row["version"] == 1


def test_a_question_is_known_again_by_its_hash_only_to_who_has_the_key(database: Any, tmp_path: Path) -> None:
    (owner,) = add_users(database, 1)
    hashes = []
    for key in ("one", "one", "another"):
        with router_on(database, tmp_path, SHADOW_HMAC_KEY=key) as router:
            with database.connect(autocommit=True) as connection:
                set_stage(connection, Stage.SHADOW)
            router.refresh()
            for text in (SECRET, "Another question."):
                router.query(owner, text, 3)
            router.shadow.start()
            router.shadow.close()
        with database.connect() as connection:
            found = connection.execute("SELECT event ->> 'query_hmac' FROM shadow_diffs ORDER BY id DESC LIMIT 2")
            hashes.append({row[0] for row in found})  # two workers compare at once, in either order
    assert hashes[0] == hashes[1]
    assert len(hashes[0] | hashes[2]) == 4


def test_evidence_of_another_k_is_of_another_body() -> None:
    assert fingerprint(3) == fingerprint(3)
    assert fingerprint(3) != fingerprint(4)


def _away(*_: object) -> Any:
    raise StoreError("the store is away")
