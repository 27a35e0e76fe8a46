"""A document of a reserved user that goes through both stores and out again, to show that they work now.

What a crash leaves of it is settled and deleted like any document; the next probe deletes it first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.tools.rag_tools.migration import ledger
from src.tools.rag_tools.migration.router import Router
from src.tools.rag_tools.migration.stages import Store
from src.tools.rag_tools.pgvector_store import Connection
from src.tools.rag_tools.store import DIMENSION, Chunk, chunk_id

NAME = "victus-sentinel"
TEXT = "The sentinel stands in both stores."
USER = """
INSERT INTO users (email, username, is_active, is_verified, provider, created_at)
VALUES (%(name)s || '@localhost', %(name)s, false, false, 'sentinel', now())
ON CONFLICT (username) DO UPDATE SET is_active = false RETURNING id
"""
DOCUMENT = """
INSERT INTO documents (user_id, filename, path, status, created_at, updated_at)
VALUES (%s, 'sentinel', '', 'received', now(), now()) RETURNING id
"""
READY = "UPDATE documents SET status = 'ready' WHERE id = %s AND status = 'received'"
LEFT = "SELECT id FROM documents WHERE user_id = %s AND status <> 'deleted'"


def probe(router: Router) -> str:
    """Empty where the sentinel was found in both stores and then in neither; else what went wrong."""
    with router.pool.connection() as connection:
        user_id = _one(connection, USER, {"name": NAME})
        left = [int(row[0]) for row in connection.execute(LEFT, (user_id,))]
    for document_id in left:
        _remove(router, user_id, document_id)
    document_id = _write(router, user_id)
    found = {store: _finds(router, store, user_id, document_id) for store in Store}
    _remove(router, user_id, document_id)
    gone = {store: not _finds(router, store, user_id, document_id) for store in Store}
    wrong = [f"not found in {store} after the write" for store, there in found.items() if not there]
    wrong += [f"still in {store} after the deletion" for store, away in gone.items() if not away]
    return "; ".join(wrong)


def _write(router: Router, user_id: int) -> int:
    with router.pool.connection() as connection, connection.transaction():
        document_id = _one(connection, DOCUMENT, (user_id,))
        ledger.intend(connection, document_id, user_id)
    chunk = Chunk(chunk_id(document_id, 0, TEXT), document_id, 0, TEXT, {"file_name": "sentinel"}, _vector())
    for store in Store:
        router.stores.present(store, user_id, document_id, [chunk])
    with router.pool.connection() as connection:
        connection.execute(READY, (document_id,))
    return document_id


def _finds(router: Router, store: Store, user_id: int, document_id: int) -> bool:
    hits = router.stores[store].search(user_id, _vector(), 1)
    return [hit.document_id for hit in hits] == [document_id]


def _remove(router: Router, user_id: int, document_id: int) -> None:
    with router.pool.connection() as connection, connection.transaction():
        connection.execute(
            "UPDATE documents SET status = 'deleted', filename = '', deleted_at = now() WHERE id = %s",
            (document_id,),
        )
        ledger.withdraw(connection, document_id, user_id)
    for store in Store:
        router.stores.absent(store, user_id, document_id)


def _vector() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    vector = np.zeros(DIMENSION, dtype=np.float32)
    vector[0] = 1.0
    return vector


def _one(connection: Connection, statement: str, parameters: Mapping[str, Any] | Sequence[Any]) -> int:
    row = connection.execute(statement, parameters).fetchone()
    if row is None:
        raise LookupError("INSERT ... RETURNING gave no row")
    return int(row[0])
