"""Waiting for what other sessions of a test's database do, as PostgreSQL itself reports it."""

from __future__ import annotations

from typing import Any

import psycopg

OTHERS = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database()"


def wait_until(database: Any, condition: str) -> None:
    """Until the SQL `condition` holds; asks as the superuser, who sees every session's state."""
    with psycopg.connect(database.superuser_conninfo(), autocommit=True) as connection:
        while connection.execute(f"SELECT 1 WHERE {condition}").fetchone() is None:
            pass


def wait_for_blocked(database: Any, sessions: int) -> None:
    """Until so many sessions wait for a lock."""
    waiting = f"{OTHERS} AND wait_event_type = 'Lock'"
    wait_until(database, f"(SELECT count(*) FROM ({waiting})) = {sessions}")
