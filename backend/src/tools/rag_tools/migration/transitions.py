"""A step of the rollout: the row of the append-only record that makes it so, and the rules that forbid it.

The row is inserted in the transaction that has checked the rules, with the id after the one that was read, so of two
who step at once, people or guards, the primary key refuses the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from src.tools.rag_tools.migration.flags import DEAD_SECONDS, View
from src.tools.rag_tools.migration.stages import ORDER, ROUTING, Stage, Store
from src.tools.rag_tools.migration.targeting import bucket
from src.tools.rag_tools.pgvector_store import Connection
from src.tools.rag_tools.store import StoreError

FLEET = """
SELECT instance, host, pid, transition_id, halted,
       extract(epoch FROM clock_timestamp() - seen_at)::float8 AS silent
FROM rollout_instances ORDER BY started_at, instance
"""
OWED_READY = """
SELECT count(*) FROM vector_ledger l JOIN documents d ON d.id = l.document_id AND d.status = 'ready'
WHERE l.store = %s AND l.wanted = 'present' AND l.state <> 'done'
"""
OWED_ALL = """
SELECT count(*) FROM vector_ledger l LEFT JOIN documents d ON d.id = l.document_id
WHERE l.store = %s AND l.state <> 'done' AND coalesce(d.status, '') NOT IN ('received', 'indexing')
"""
USERS = "SELECT DISTINCT user_id FROM documents WHERE status = 'ready'"
INSERT = """
INSERT INTO rollout_transitions
    (id, stage, read_percent, read_threshold, shadow_sample_rate, actor, reason, evidence)
VALUES (%(id)s, %(stage)s, %(percent)s, %(threshold)s, %(rate)s, %(actor)s, %(reason)s, %(evidence)s)
"""
HIGHEST = "SELECT max(id) FROM rollout_transitions"
NEWEST = """
SELECT id, stage, read_percent, actor, reason, created_at FROM rollout_transitions ORDER BY id DESC LIMIT 1
"""


class StepRefusedError(StoreError):
    """A rule of safety, or somebody who was first, forbids the step."""


class StillOwedError(StepRefusedError):
    """A store that the step needs whole is owed something; settling it and stepping again may do."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a step goes; `percent` of users read from pgvector."""

    stage: Stage
    percent: int

    def __str__(self) -> str:
        return f"{self.stage} at {self.percent} percent" if ramps(self.stage) else str(self.stage)


@dataclass(frozen=True, slots=True)
class Instance:
    """A backend process: the transition it acts on, and for how many seconds it has not been heard."""

    instance: str
    host: str
    pid: int
    transition_id: int
    halted: str | None
    silent: float

    def __str__(self) -> str:
        return f"{self.host}:{self.pid} (acts on transition {self.transition_id}, heard {self.silent:.0f} s ago)"


def goes_back(view: View, target: Target) -> bool:
    """Whether the step leads to an earlier stage, or to fewer users within the ramp."""
    here, there = ORDER.index(view.stage), ORDER.index(target.stage)
    return there < here or (there == here and target.percent < view.read_percent)


def fleet(connection: Connection) -> list[Instance]:
    return [Instance(str(row[0]), *row[1:]) for row in connection.execute(FLEET)]


def laggards(instances: Sequence[Instance], transition_id: int, dead_seconds: float = DEAD_SECONDS) -> list[Instance]:
    """The live processes that do not act on `transition_id` yet."""
    return [each for each in instances if each.silent < dead_seconds and each.transition_id != transition_id]


def require_fleet(connection: Connection, view: View, target: Target, dead_seconds: float = DEAD_SECONDS) -> None:
    """StepRefusedError while a live process has not arrived at `view`; no override lifts it."""
    late = laggards(fleet(connection), view.transition_id, dead_seconds)
    if late:
        raise StepRefusedError(
            f"no step to {target}: transition {view.transition_id} is not acted on yet by process"
            f" {', '.join(map(str, late))}; wait, or stop it and `rollout instances forget` it"
        )


def require_whole(connection: Connection, view: View, target: Target) -> None:
    """StillOwedError unless the stores that the step needs whole are; no override lifts it."""
    writes = ROUTING[target.stage].writes
    found = []
    if len(writes) == 1 and (count := _count(connection, OWED_READY, writes[0])):
        found.append((writes[0], f"would serve alone and is owed {count} ready documents"))
    joining = set(writes) - set(ROUTING[view.stage].writes)
    if Store.FAISS in joining and (count := owed_entries(connection, Store.FAISS)):
        found.append((Store.FAISS, f"would be written again and is owed {count} entries"))
    if found:
        store, why = found[0]
        raise StillOwedError(
            f"no step to {target}: {store} {why}; run `rollout settle --execute --store {store}`, then the same"
            " command again. `rollout status` shows why entries fail"
        )


def owed_entries(connection: Connection, store: Store) -> int:
    """How many entries the store is owed, set aside included; uploads not yet indexed do not count."""
    return _count(connection, OWED_ALL, store)


def step(
    connection: Connection,
    view: View,
    target: Target,
    *,
    actor: str,
    reason: str,
    evidence: Mapping[str, Any],
    sample_rate: float | None = None,
    dead_seconds: float = DEAD_SECONDS,
) -> int:
    """Insert the transition after `view`; returns its id. StepRefusedError where a rule or another forbids.

    No document can become ready between the check of the rules and the commit.
    """
    parameters = {
        "id": view.transition_id + 1,
        "stage": target.stage,
        "percent": target.percent,
        "threshold": threshold(connection, view, target),
        "rate": view.sample_rate if sample_rate is None else sample_rate,
        "actor": actor,
        "reason": reason,
        "evidence": Jsonb(dict(evidence)),
    }
    try:
        with connection.transaction():
            connection.execute("SET LOCAL lock_timeout = '5s'")
            connection.execute("LOCK TABLE documents IN SHARE ROW EXCLUSIVE MODE")
            # First: after a step taken meanwhile, the fleet's arrival there would look like its delay here.
            if _count(connection, HIGHEST) != view.transition_id:
                raise _somebody_else(connection)
            require_fleet(connection, view, target, dead_seconds)
            require_whole(connection, view, target)
            connection.execute(INSERT, parameters)
    except psycopg.errors.UniqueViolation as error:
        raise _somebody_else(connection) from error
    except psycopg.errors.LockNotAvailable as error:
        raise StepRefusedError("documents are locked by a long transaction; find it in pg_stat_activity") from error
    return view.transition_id + 1


def threshold(connection: Connection, view: View, target: Target) -> float:
    """The bucket below which users read from pgvector; above zero percent at least one user does.

    A step forward takes nobody back, whoever has joined since.
    """
    if not ramps(target.stage) or target.percent in (0, 100):
        return float(target.percent)
    buckets = [bucket(int(row[0])) for row in connection.execute(USERS)]
    first = min(buckets, default=0.0) + 1e-9
    reached = view.read_threshold if ramps(view.stage) and not goes_back(view, target) else 0.0
    return max(float(target.percent), first, reached)


def ramps(stage: Stage) -> bool:
    """Whether users differ in who serves them: the only stage with a percent."""
    return len(ROUTING[stage].reads) == 2


def _count(connection: Connection, statement: str, *parameters: object) -> int:
    row = connection.execute(statement, parameters).fetchone()
    return 0 if row is None else int(row[0])


def _somebody_else(connection: Connection) -> StepRefusedError:
    row = connection.execute(NEWEST).fetchone()
    if row is None:
        return StepRefusedError("rollout_transitions is empty, so the stage is unknown; restore its rows from a backup")
    number, stage, percent, actor, reason, at = row
    return StepRefusedError(
        f"{actor} was first: transition {number} to {Target(Stage(stage), percent)} at {at:%H:%M:%S}"
        f" ({reason}); run `rollout status` and decide again"
    )
