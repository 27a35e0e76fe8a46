"""Users and uploaded files for tests to begin with."""

from __future__ import annotations

from pathlib import Path

from tests.support.database import Database

ADD_USER = """
INSERT INTO users (email, username, is_active, is_verified, provider, created_at)
VALUES (%s, %s, true, true, 'local', now()) RETURNING id
"""


def add_users(database: Database, count: int) -> list[int]:
    """The ids of new users."""
    with database.connect(autocommit=True) as connection:
        return [
            int(row[0])
            for number in range(count)
            for row in connection.execute(ADD_USER, (f"user{number}@example.org", f"user{number}"))
        ]


def write_note(directory: Path, name: str, text: str) -> Path:
    """A text file as an upload leaves it."""
    uploads = directory / "uploads"
    uploads.mkdir(parents=True, exist_ok=True)
    path = uploads / name
    path.write_text(text, encoding="utf-8")
    return path


# migration
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


# end of migration
