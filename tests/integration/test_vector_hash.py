"""The hashes that verify compares are the same whether Python or PostgreSQL computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from src.tools.rag_tools import store
from tests.support.openai_server import hashed_vectors

if TYPE_CHECKING:
    from tests.support.database import Database


@pytest.fixture
def vectors() -> list[store.Vector]:
    """Ordinary ones, and one with the values whose bits are easily lost."""
    odd = np.zeros(store.DIMENSION, dtype=np.float32)
    odd[:5] = [-0.0, 1e-45, 3.4028235e38, -1.1754944e-38, 0.1]
    return [*hashed_vectors(["a", "b"]), odd]


def test_postgresql_computes_the_same_vector_hash(database: Database, vectors: list[store.Vector]) -> None:
    statement = "SELECT sha256(vector_send(%s::real[]::vector))"
    with database.connect() as connection:
        for vector in vectors:
            row = connection.execute(statement, ([float(value) for value in vector],)).fetchone()
            assert row is not None
            assert bytes(row[0]) == store.vector_hash(vector)


def test_postgresql_computes_the_same_content_hash(database: Database) -> None:
    content = "Grüße, 東京 😀\n\t"
    with database.connect() as connection:
        row = connection.execute("SELECT sha256(convert_to(%s, 'UTF8'))", (content,), binary=True).fetchone()
        assert row is not None
        assert bytes(row[0]) == store.content_hash(content)
