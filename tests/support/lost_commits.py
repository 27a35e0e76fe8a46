"""A PostgreSQL that was restored to an earlier moment."""

from __future__ import annotations

from tests.support.database import Database


def restore(database: Database, before: int) -> None:
    """As if the commits after document `before` had never been: rows, ledger, sequence, the last transition."""
    with database.connect(autocommit=True) as connection:
        connection.execute("ALTER TABLE documents DISABLE TRIGGER leave_a_debt")
        connection.execute("DELETE FROM documents WHERE id > %s", (before,))
        connection.execute("ALTER TABLE documents ENABLE TRIGGER leave_a_debt")
        connection.execute("DELETE FROM vector_ledger WHERE document_id > %s", (before,))
        connection.execute("ALTER TABLE document_chunks NO FORCE ROW LEVEL SECURITY")
        connection.execute("DELETE FROM document_chunks WHERE document_id > %s", (before,))
        connection.execute("ALTER TABLE document_chunks FORCE ROW LEVEL SECURITY")
        connection.execute("SELECT setval('documents_id_seq', %s)", (before,))
