"""Hold: nobody advances, the guard does not act, the backfill stops after its batch. An append-only record."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from rollout.errors import RefusedError
from src.tools.rag_tools.pgvector_store import Connection, Pool, unavailable

LAST = "SELECT held, actor, reason, created_at FROM rollout_holds ORDER BY id DESC LIMIT 1"
SET = "INSERT INTO rollout_holds (held, actor, reason) VALUES (%s, %s, %s)"


@dataclass(frozen=True, slots=True)
class Hold:
    """Who holds the rollout, and why."""

    actor: str
    reason: str
    since: datetime

    def __str__(self) -> str:
        return f"held by {self.actor} since {self.since:%Y-%m-%d %H:%M}: {self.reason}"


def current(connection: Connection) -> Hold | None:
    """The hold in force; None where there is none."""
    row = connection.execute(LAST).fetchone()
    return Hold(*row[1:]) if row is not None and row[0] else None


def is_held(pool: Pool) -> bool:
    """Whether a hold is in force now."""
    with unavailable("look for a hold"), pool.connection() as connection:
        return current(connection) is not None


def set_held(connection: Connection, held: bool, *, actor: str, reason: str) -> None:
    connection.execute(SET, (held, actor, reason))


def require_free(connection: Connection) -> None:
    """RefusedError where the rollout is held."""
    hold = current(connection)
    if hold is not None:
        raise RefusedError(f"the rollout is {hold}; talk to them, then `rollout resume --execute`")
