"""A user with very many chunks is searched by a copy of the vectors, and nobody else notices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import psycopg
import pytest

from src.database import Role
from src.tools.rag_tools import giants
from src.tools.rag_tools.giants import Giants, make_giant
from src.tools.rag_tools.pgvector_store import (
    DELETE,
    INSERT,
    KEEP_HALVES,
    SEARCH,
    SEARCH_GIANT,
    PgvectorStore,
    Pool,
    insert_chunks,
    open_pool,
)
from src.tools.rag_tools.store import DIMENSION, Chunk, chunk_id

GIANT, SMALL = 1, 2
MANY = 600


def unit(rows: Any) -> Any:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def around(user_id: int, count: int, seed: int) -> Any:
    """Vectors around a centre of the user's own: to a question from elsewhere all of them are about equally far."""
    centre = unit(np.random.default_rng(user_id).standard_normal(DIMENSION))
    noise = unit(np.random.default_rng(seed).standard_normal((count, DIMENSION)))
    return unit(centre + 0.7 * noise)


def document(document_id: int, rows: Any) -> list[Chunk]:
    return [
        Chunk(chunk_id(document_id, at, f"{document_id}.{at}"), document_id, at, f"{document_id}.{at}", {}, row)
        for at, row in enumerate(rows)
    ]


def write(store: PgvectorStore, user_id: int, document_id: int, rows: Any) -> list[Chunk]:
    made = document(document_id, rows)
    with store.transaction(user_id) as connection:
        insert_chunks(connection, user_id, made)
    return made


@pytest.fixture
def pool(database: Any) -> Iterator[Pool]:
    with open_pool(database.conninfo(Role.APP), 4, name="giants") as made:
        yield made


@pytest.fixture
def store(pool: Pool) -> PgvectorStore:
    """One user with MANY chunks, one with ten; nobody is a giant yet."""
    made = PgvectorStore(pool, giants=Giants(pool, chunks=MANY))
    for number in range(6):
        write(made, GIANT, 10 + number, around(GIANT, MANY // 6, 10 + number))
    write(made, SMALL, 50, around(SMALL, 10, 50))
    return made


def become_giant(store: PgvectorStore) -> None:
    store.giants.suspect(GIANT)
    store.giants.suspect(SMALL)
    store.giants.look()
    assert store.giants.ready == {GIANT}


def halves(database: Any) -> dict[int, int]:
    with psycopg.connect(database.superuser_conninfo()) as connection:
        return dict(connection.execute("SELECT user_id, count(*) FROM chunk_halves GROUP BY user_id").fetchall())


def answers(store: PgvectorStore, user_id: int, questions: Any) -> list[list[tuple[Any, float]]]:
    found = [store.search(user_id, question, 3) for question in questions]
    return [[(hit.chunk_id, round(hit.similarity, 6)) for hit in hits] for hits in found]


def plan(pool: Pool, user_id: int, statement: str, parameters: dict[str, Any]) -> list[str]:
    """The lines of the plan, without costs."""
    with pool.connection() as connection, connection.transaction():
        connection.execute(giants.SCOPE, (str(user_id),))
        connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        rows = connection.execute(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF, BUFFERS OFF) {statement}",
                                  parameters).fetchall()  # fmt: skip
    return [row[0] for row in rows]


def question(user_id: int) -> dict[str, Any]:
    return {"user_id": user_id, "vector": around(SMALL, 1, 7)[0], "k": 3}


def test_a_giant_gets_the_answers_of_an_exact_scan_near_and_far(store: PgvectorStore, pool: Pool) -> None:
    beside_own = unit(around(GIANT, 40, 10) + 0.3 * unit(np.random.default_rng(5).standard_normal((40, DIMENSION))))
    from_elsewhere = around(SMALL, 40, 6)
    questions = [*beside_own, *from_elsewhere]
    exact = answers(store, GIANT, questions)
    become_giant(store)
    assert answers(store, GIANT, questions) == exact
    used = "\n".join(plan(pool, GIANT, SEARCH_GIANT, question(GIANT)))
    assert "chunk_halves" in used


def test_a_giants_search_goes_by_the_copy(store: PgvectorStore, database: Any) -> None:
    """Else the test above would say nothing."""
    become_giant(store)
    row = around(GIANT, MANY // 6, 10)[3]
    assert store.search(GIANT, row, 1)[0].similarity == pytest.approx(1, abs=1e-5)
    with psycopg.connect(database.superuser_conninfo()) as connection:
        connection.execute("DELETE FROM chunk_halves")
    assert store.search(GIANT, row, 1) == []


def test_who_has_few_chunks_is_read_and_written_by_the_same_plans_as_without_giants(
    store: PgvectorStore, pool: Pool, database: Any
) -> None:
    read = {"statement": SEARCH, "parameters": question(SMALL)}
    before = plan(pool, SMALL, **read)
    become_giant(store)
    assert plan(pool, SMALL, **read) == before
    with psycopg.connect(database.superuser_conninfo()) as connection:
        triggers = connection.execute(
            "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'document_chunks'::regclass AND tgtype & 4 > 0"
        ).fetchone()
    assert triggers == (0,)
    assert not [line for line in _inserting(pool) if "Trigger" in line or "chunk_halves" in line]
    kept = plan(pool, SMALL, KEEP_HALVES, {"user_id": SMALL, "ids": []})
    assert [line for line in kept if "document_chunks" in line and "never executed" in line]
    write(store, SMALL, 51, around(SMALL, 5, 51))
    assert halves(database) == {GIANT: MANY}


def _inserting(pool: Pool) -> list[str]:
    (chunk,) = document(60, around(SMALL, 1, 60))
    values = (SMALL, chunk.id, 60, 0, chunk.content, chunk.content_sha256, "{}", chunk.vector)
    with pool.connection() as connection, connection.transaction(force_rollback=True):
        connection.execute(giants.SCOPE, (str(SMALL),))
        return [row[0] for row in connection.execute(f"EXPLAIN (ANALYZE, COSTS OFF) {INSERT}", values)]


def test_what_a_giant_uploads_is_found_and_what_is_deleted_is_gone_from_the_copy(
    store: PgvectorStore, database: Any
) -> None:
    become_giant(store)
    added = write(store, GIANT, 20, around(GIANT, 5, 20))
    assert store.search(GIANT, added[2].vector, 1)[0].chunk_id == added[2].id
    assert halves(database) == {GIANT: MANY + 5}
    store.delete(GIANT, 20)
    store.delete(GIANT, 10)
    assert halves(database) == {GIANT: MANY - MANY // 6}
    assert store.search(GIANT, added[2].vector, 1)[0].document_id not in (10, 20)


def test_a_writer_that_began_before_the_giant_was_announced_is_not_missed(
    store: PgvectorStore, pool: Pool, monkeypatch: pytest.MonkeyPatch, database: Any
) -> None:
    waiting = threading.Event()
    look = giants._writers
    monkeypatch.setattr(giants, "_writers", lambda connection: waiting.set() or look(connection))
    begun = document(30, around(GIANT, 3, 30))
    with store.transaction(GIANT) as connection:
        insert_chunks(connection, GIANT, begun)
        copying = threading.Thread(target=_make_giant, args=(pool,))
        copying.start()
        assert waiting.wait(10)
        # Others come and go meanwhile, and are not held up.
        for number in range(31, 34):
            write(store, GIANT, number, around(GIANT, 1, number))
        assert copying.is_alive()
        assert halves(database) == {GIANT: 3}
    copying.join()
    store.giants.look()
    assert store.giants.ready == {GIANT}
    assert halves(database) == {GIANT: MANY + 6}


def test_a_writer_that_takes_long_is_waited_for_at_the_next_look(
    store: PgvectorStore, monkeypatch: pytest.MonkeyPatch, database: Any
) -> None:
    monkeypatch.setattr(giants, "WRITER_SECONDS", 0.0)
    begun = document(30, around(GIANT, 3, 30))
    with store.transaction(GIANT) as connection:
        insert_chunks(connection, GIANT, begun)
        store.giants.suspect(GIANT)
        store.giants.look()
        assert store.giants.ready == frozenset()
    store.giants.look()
    assert store.giants.ready == {GIANT}
    assert halves(database) == {GIANT: MANY + 3}


def test_a_vacuum_of_the_table_holds_nobody_up_who_becomes_a_giant(store: PgvectorStore, database: Any) -> None:
    with psycopg.connect(database.superuser_conninfo()) as vacuum:
        vacuum.execute("LOCK TABLE document_chunks IN SHARE UPDATE EXCLUSIVE MODE")
        become_giant(store)
    assert halves(database) == {GIANT: MANY}


def _make_giant(pool: Pool) -> None:
    with pool.connection() as connection:
        make_giant(connection, GIANT)


def test_a_copy_that_a_dead_process_left_half_done_is_finished_by_the_next_look(
    store: PgvectorStore, pool: Pool, monkeypatch: pytest.MonkeyPatch, database: Any
) -> None:
    with monkeypatch.context() as dying:
        dying.setattr(giants, "COPY_DOCUMENTS", 2)
        dying.setattr(giants, "DONE", "SELECT 1 / 0 WHERE %s > 0")
        store.giants.suspect(GIANT)
        with pytest.raises(psycopg.errors.DivisionByZero):
            store.giants.look()
    assert store.giants.ready == frozenset()
    other = PgvectorStore(pool, giants=Giants(pool, chunks=MANY))
    other.giants.look()
    assert other.giants.ready == {GIANT}
    assert halves(database) == {GIANT: MANY}


def test_a_slow_search_makes_the_user_a_suspect_and_a_fast_one_does_not(pool: Pool, store: PgvectorStore) -> None:
    store.giants.searched(GIANT, giants.SLOW_SECONDS / 2)
    store.giants.look()
    assert store.giants.ready == frozenset()
    store.giants.searched(GIANT, giants.SLOW_SECONDS * 2)
    store.giants.look()
    assert store.giants.ready == {GIANT}


def test_the_copy_is_scoped_by_row_level_security(store: PgvectorStore, pool: Pool) -> None:
    become_giant(store)
    with pool.connection() as connection, connection.transaction():
        connection.execute(giants.SCOPE, (str(SMALL),))
        assert connection.execute("SELECT count(*) FROM chunk_halves").fetchone() == (0,)
    refused = pytest.raises(psycopg.errors.InsufficientPrivilege)
    with pool.connection() as connection, refused, connection.transaction():
        connection.execute(giants.SCOPE, (str(SMALL),))
        connection.execute(
            "INSERT INTO chunk_halves SELECT %s, id, embedding::halfvec(1536) FROM document_chunks", (GIANT,)
        )


def test_deleting_under_row_level_security_reaches_the_copy_whoever_deletes(
    store: PgvectorStore, database: Any
) -> None:
    become_giant(store)
    with database.connect(Role.ROLLOUT) as connection:
        connection.execute(DELETE, (GIANT, 11))
    assert halves(database) == {GIANT: MANY - MANY // 6}
