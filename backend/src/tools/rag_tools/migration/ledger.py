"""The ledger: for every document and each store, what should be there and whether it is.

`wanted` only ever goes from present to absent. `done` is written in the transaction that holds `wanted` as
it was applied, so it is never untrue; a process that dies leaves `owed`, which settling brings to an end.
A lease is a time of the database's clock after which others may try too; two who try harm nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from psycopg.rows import class_row

from src.tools.rag_tools.migration.stages import ROUTING, Stage, Store
from src.tools.rag_tools.pgvector_store import Connection
from src.tools.rag_tools.store import normalise_text

LEASE_SECONDS = 30.0
BACKOFF_SECONDS = 1.0
BACKOFF_LIMIT_SECONDS = 300.0
ATTEMPTS_BEFORE_ASIDE = 3

WRITES = json.dumps({stage: routing.writes for stage, routing in ROUTING.items()})

INTEND = """
INSERT INTO vector_ledger (document_id, store, user_id, wanted, state, next_attempt_at)
SELECT %(document_id)s, store, %(user_id)s, 'present', 'owed',
       clock_timestamp() + make_interval(secs => %(lease)s)
FROM unnest(%(stores)s::text[]) AS store
"""
# A legacy document in quarantine has no rows yet; its deletion is recorded all the same.
WITHDRAW = """
INSERT INTO vector_ledger (document_id, store, user_id, wanted, state, next_attempt_at)
SELECT %(document_id)s, store, %(user_id)s, 'absent', 'owed',
       clock_timestamp() + make_interval(secs => %(lease)s)
FROM unnest(%(stores)s::text[]) AS store
ON CONFLICT (document_id, store) DO UPDATE
SET wanted = 'absent', state = 'owed', attempts = 0, last_error = NULL,
    next_attempt_at = excluded.next_attempt_at, changed_at = clock_timestamp()
WHERE vector_ledger.wanted = 'present'
"""
MARK = """
UPDATE vector_ledger
SET state = 'done', last_error = NULL,
    changed_at = CASE WHEN state = 'done' THEN changed_at ELSE clock_timestamp() END
WHERE document_id = %s AND store = %s AND wanted = %s
RETURNING document_id
"""
CLAIM = """
WITH stage AS (SELECT id, stage FROM rollout_transitions ORDER BY id DESC LIMIT 1),
due AS (
    SELECT l.document_id, l.store
    FROM vector_ledger l, stage s
    WHERE l.state = 'owed'
      AND (%(at_once)s OR l.next_attempt_at <= clock_timestamp())
      AND l.store = ANY (coalesce(
          %(stores)s::text[],
          ARRAY(SELECT jsonb_array_elements_text(%(writes)s::jsonb -> s.stage))))
      AND NOT (l.document_id, l.store) IN (SELECT * FROM unnest(%(tried)s::int[], %(tried_in)s::text[]))
    ORDER BY l.next_attempt_at, l.document_id
    LIMIT %(limit)s
    FOR UPDATE OF l SKIP LOCKED
)
UPDATE vector_ledger l
SET attempts = l.attempts + 1, next_attempt_at = clock_timestamp() + make_interval(secs => %(lease)s)
FROM due, stage
WHERE l.document_id = due.document_id AND l.store = due.store
RETURNING l.document_id, l.store, l.user_id, l.wanted, l.attempts, stage.id AS transition_id, stage.stage
"""
POSTPONE = """
UPDATE vector_ledger
SET last_error = %(error)s,
    next_attempt_at = clock_timestamp() + make_interval(secs => %(seconds)s),
    state = CASE WHEN %(aside)s THEN 'aside' ELSE state END,
    changed_at = CASE WHEN %(aside)s THEN clock_timestamp() ELSE changed_at END
WHERE document_id = %(document_id)s AND store = %(store)s AND state = 'owed' AND wanted = %(wanted)s
RETURNING state
"""
RETRY_ASIDE = """
UPDATE vector_ledger SET state = 'owed', attempts = 0, next_attempt_at = clock_timestamp(),
       changed_at = clock_timestamp()
WHERE state = 'aside' RETURNING document_id
"""
STATES = "SELECT store, state FROM vector_ledger WHERE document_id = %s"
OWED_OF_USER = """
SELECT DISTINCT l.store
FROM vector_ledger l JOIN documents d ON d.id = l.document_id AND d.status = 'ready'
WHERE l.user_id = %s AND l.state <> 'done' AND l.wanted = 'present'
"""
OWED_AMONG = """
SELECT DISTINCT document_id FROM vector_ledger
WHERE document_id = ANY (%s) AND wanted = 'present' AND state <> 'done'
"""
# Some process finished the store and died before it could say so.
FINISH_READY = """
UPDATE documents d SET status = 'ready', error = NULL, updated_at = now()
FROM vector_ledger l
WHERE d.status IN ('received', 'indexing') AND l.document_id = d.id
  AND l.state = 'done' AND l.wanted = 'present' AND l.store = ANY (%(reads)s)
  AND (SELECT max(id) FROM rollout_transitions) <= %(transition_id)s + 1
RETURNING d.id
"""


class Wanted(StrEnum):
    PRESENT = "present"
    ABSENT = "absent"


class State(StrEnum):
    OWED = "owed"
    DONE = "done"
    ASIDE = "aside"


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry claimed for settling, with the transition in force when it was claimed."""

    document_id: int
    store: Store
    user_id: int
    wanted: Wanted
    attempts: int
    transition_id: int
    stage: Stage

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", Store(self.store))
        object.__setattr__(self, "wanted", Wanted(self.wanted))
        object.__setattr__(self, "stage", Stage(self.stage))


def intend(connection: Connection, document_id: int, user_id: int) -> None:
    """Both stores owe the document's presence; committed with its `received` row."""
    connection.execute(INTEND, _row(document_id, user_id))


def withdraw(connection: Connection, document_id: int, user_id: int) -> None:
    """Both stores owe the document's absence, for good; committed with its tombstone."""
    connection.execute(WITHDRAW, _row(document_id, user_id))


def mark(connection: Connection, document_id: int, store: Store, wanted: Wanted) -> bool:
    """Set `done` where `wanted` still is what was applied; False where it is not."""
    return connection.execute(MARK, (document_id, store, wanted)).fetchone() is not None


def claim(
    connection: Connection,
    *,
    limit: int,
    stores: Sequence[Store] | None = None,
    at_once: bool = False,
    tried: Sequence[Entry] = (),
    lease_seconds: float = LEASE_SECONDS,
) -> list[Entry]:
    """Take up to `limit` owed entries of `stores` (None: those that the stage writes) and lease them.

    `at_once` disregards leases and backoff; `tried` are left out, so a command ends.
    """
    with connection.cursor(row_factory=class_row(Entry)) as cursor:
        return cursor.execute(
            CLAIM,
            {
                "limit": limit,
                "stores": None if stores is None else list(stores),
                "writes": WRITES,
                "at_once": at_once,
                "tried": [entry.document_id for entry in tried],
                "tried_in": [entry.store for entry in tried],
                "lease": lease_seconds,
            },
        ).fetchall()


def postpone(connection: Connection, entry: Entry, error: str, *, mends: bool, jitter: float) -> State | None:
    """Record a failure. One that cannot mend is set aside after a few attempts.

    Returns the entry's state now, or None where it is no longer owed as it was claimed: then nothing is recorded.
    `jitter` between 0 and 1 spreads the next attempts of several processes.
    """
    aside = not mends and entry.attempts >= ATTEMPTS_BEFORE_ASIDE
    row = connection.execute(
        POSTPONE,
        {
            "error": normalise_text(error)[:2_000],
            "seconds": backoff(entry.attempts, jitter),
            "aside": aside,
            "document_id": entry.document_id,
            "store": entry.store,
            "wanted": entry.wanted,
        },
    ).fetchone()
    return None if row is None else State(row[0])


def backoff(attempts: int, jitter: float) -> float:
    """Seconds until the next attempt: doubling from one second to five minutes, halved at most by jitter."""
    full = min(BACKOFF_SECONDS * 2.0 ** min(attempts, 30), BACKOFF_LIMIT_SECONDS)
    return full * (0.5 + jitter / 2)


def retry_aside(connection: Connection) -> list[int]:
    """Owe again what was set aside; returns the document ids."""
    return [int(row[0]) for row in connection.execute(RETRY_ASIDE)]


def states(connection: Connection, document_id: int) -> dict[Store, State]:
    """Both stores' states for a document; empty for one that the ledger does not know."""
    return {Store(store): State(state) for store, state in connection.execute(STATES, (document_id,))}


def owing_stores(connection: Connection, user_id: int) -> frozenset[Store]:
    """The stores that owe this user a ready document, set aside included."""
    return frozenset(Store(row[0]) for row in connection.execute(OWED_OF_USER, (user_id,)))


def owed_among(connection: Connection, documents: list[int]) -> set[int]:
    """Those of these documents that some store is owed, set aside included."""
    return {row[0] for row in connection.execute(OWED_AMONG, (documents,))}


def finish_ready(connection: Connection, transition_id: int, stage: Stage) -> list[int]:
    """Set `ready` for documents whose serving store is done; returns their ids."""
    parameters = {"reads": list(ROUTING[stage].reads), "transition_id": transition_id}
    return [int(row[0]) for row in connection.execute(FINISH_READY, parameters)]


def _row(document_id: int, user_id: int) -> dict[str, object]:
    return {
        "document_id": document_id,
        "user_id": user_id,
        "stores": list(Store),
        "lease": LEASE_SECONDS,
    }
