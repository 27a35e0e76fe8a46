"""What a database and a folder hold, so that a test can show that nothing has changed."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

import psycopg

from tests.support.database import Database

TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
SEQUENCES = "SELECT coalesce(sum(coalesce(last_value, 0)), 0) FROM pg_sequences"


def contents(database: Database) -> dict[str, str]:
    """A hash of the rows of each table, as the superuser sees them."""
    with psycopg.connect(database.superuser_conninfo()) as connection:
        tables = [row[0] for row in connection.execute(TABLES)]
        return {
            table: connection.execute(
                f"SELECT md5(coalesce(string_agg(t::text, E'\\n' ORDER BY t::text), '')) FROM {table} t"
            ).fetchone()[0]
            for table in tables
        }  # type: ignore[index]


def files(folder: Path) -> dict[str, str]:
    """A hash of each file below `folder`; of a journal, its entries: opening one may touch the file."""
    return {
        str(path.relative_to(folder)): _journal(path) if path.name == "journal.sqlite" else _hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("journal.sqlite-")
    }


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _journal(path: Path) -> str:
    with closing(sqlite3.connect(path)) as journal:
        return str(journal.execute("SELECT count(*), max(seq) FROM entries").fetchone())
