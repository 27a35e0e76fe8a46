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
