"""Every statement on `document_chunks` names the user: what the suite ran is recorded, and judged at its end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from src.database import Role
from src.tools.rag_tools.pgvector_store import DELETE, INSERT, SEARCH, PgvectorStore, insert_chunks, open_pool
from src.tools.rag_tools.store import Chunk, chunk_id
from tests.support import statements


def test_what_the_store_runs_is_recorded(database: Any) -> None:
    vector = np.zeros(1536, np.float32)
    vector[0] = 1
    chunk = Chunk(chunk_id(1, 0, "text"), 1, 0, "text", {}, vector)
    with open_pool(database.conninfo(Role.APP), 1, name="statements") as pool:
        store = PgvectorStore(pool)
        with store.transaction(1) as connection:
            insert_chunks(connection, 1, [chunk])
        assert len(store.search(1, vector, 3)) == 1
        assert len(list(store.inventory(1))) == 1
        store.delete(1, 1)
    assert {SEARCH, INSERT, DELETE} <= statements.ran.keys()
    assert statements.ran[SEARCH].startswith("backend/src/tools/rag_tools/pgvector_store.py:")


def test_what_a_test_runs_is_not(database: Any) -> None:
    with database.connect() as connection:
        connection.execute("SELECT count(*) FROM document_chunks")
    assert "SELECT count(*) FROM document_chunks" not in statements.ran


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("SELECT content FROM document_chunks WHERE id = %s", True),
        ("DELETE FROM document_chunks WHERE document_id = %s AND 'user_id' <> ''", True),
        ("SELECT content FROM document_chunks WHERE user_id = %s", False),
        ("SELECT to_regclass('public.document_chunks')", False),
        ("LOCK TABLE document_chunks IN SHARE MODE", False),
        ("SELECT id FROM documents", False),
    ],
)
def test_a_statement_that_names_no_user_is_told_from_others(statement: str, found: bool) -> None:
    assert statements.names_no_user(statement) is found
