"""Rollouts as a dashboard may meet them: nothing done yet, a day of good evidence, and one where all went wrong.

Two users have a real document each in both stores, so that explanations can ask them; a day of traffic is written
as rows, the same at every run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from src.database import Role
from src.tools.rag_tools.migration.shadow import fingerprint
from src.tools.rag_tools.migration.stages import Stage
from tests.support.routers import add_users, router_on, write_note

HOSTILE = "</td></table><script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>\u202e{{1234*5678}}"
HOSTS = ("app-1", "app-1", "app-2")

TRANSITION = """
INSERT INTO rollout_transitions
    (id, stage, read_percent, read_threshold, shadow_sample_rate, actor, reason, evidence, created_at)
VALUES (%s, %s, %s, %s, 1, %s, %s, %s, clock_timestamp() - make_interval(mins => %s))
"""
# A comparison every 20 seconds and cohort; pgvector as fast as FAISS but for its last hundredth.
TRAFFIC = """
INSERT INTO shadow_diffs (at, transition_id, stage, user_id, cohort, cause, served_by, overlap_at_k,
                          served_ms, shadow_ms, fingerprint, event)
SELECT at, t.id, t.stage, 1, c.cohort,
       CASE WHEN noise < %(bad)s THEN (%(causes)s::text[])[1 + (noise * 7)::int %% array_length(%(causes)s::text[], 1)]
            WHEN noise < %(bad)s + 6 THEN 'stale' WHEN noise < %(bad)s + 30 THEN 'tie' ELSE 'match' END,
       CASE WHEN noise %% 10 = 0 AND t.read_percent > 0 THEN 'pgvector' ELSE 'faiss' END,
       CASE WHEN noise < %(bad)s THEN 0.6667 ELSE 1 END,
       c.ms * (0.8 + noise / 1500.0), c.ms * %(slow)s * (0.7 + (noise * 7 %% 1000) / 1000.0), %(fingerprint)s,
       jsonb_build_object('served_by', 'faiss', 'served', '[]'::jsonb, 'shadow', '[]'::jsonb, 'overlap_at_k', 0.6667,
                          'rbo', null, 'top1_match', null, 'largest_similarity_difference', null)
FROM generate_series(clock_timestamp() - make_interval(mins => %(from)s),
                     clock_timestamp() - make_interval(mins => %(to)s), interval '20 seconds') AS at
CROSS JOIN (VALUES ('small', 4.0), ('medium', 9.0), ('large', 21.0)) AS c (cohort, ms)
CROSS JOIN LATERAL (SELECT abs(hashtext(c.cohort || extract(epoch FROM at)::bigint / 20)) %% 1000 AS noise) AS n
CROSS JOIN LATERAL (SELECT id, stage, read_percent FROM rollout_transitions WHERE created_at <= at
                    ORDER BY id DESC LIMIT 1) AS t
WHERE t.stage IN ('shadow', 'live')
"""
COUNTS = """
INSERT INTO rollout_counts (transition_id, since, name, count)
SELECT t.id, since, 'reads.' || store, CASE store WHEN 'pgvector' THEN t.read_percent ELSE 100 - t.read_percent END
FROM generate_series(clock_timestamp() - interval '1430 minutes', clock_timestamp(), interval '10 minutes') AS since
CROSS JOIN unnest(ARRAY['faiss', 'pgvector']) AS store
CROSS JOIN LATERAL (SELECT id, read_percent FROM rollout_transitions WHERE created_at <= since
                    ORDER BY id DESC LIMIT 1) AS t
"""
INSTANCE = """
INSERT INTO rollout_instances (instance, host, pid, transition_id, halted, started_at, seen_at)
VALUES (%s, %s, %s, %s, %s, clock_timestamp() - interval '1 day', clock_timestamp() - make_interval(secs => %s))
"""
LEGACY = """
INSERT INTO legacy_chunks (docstore_id, position, source, document_id, user_id, ordinal, status, reason)
SELECT 'chunk-' || n, n, 'uploads/notes.pdf', CASE WHEN n > 12 THEN 1 END, CASE WHEN n > 12 THEN 1 END, n,
       CASE WHEN n > 12 THEN 'assigned' ELSE 'quarantined' END,
       CASE WHEN n > 12 THEN 'path' WHEN n > 4 THEN 'several_users' ELSE 'no_row' END
FROM generate_series(1, 480) AS n
"""
VERIFIED = """
INSERT INTO verify_runs (transition_id, started_at, finished_at, chunks, differences, report)
VALUES (%s, clock_timestamp() - make_interval(mins => %s), clock_timestamp() - make_interval(mins => %s - 1),
        48120, %s, '{}')
"""
DIFFERENCE = """
INSERT INTO shadow_diffs (at, transition_id, stage, user_id, cohort, cause, served_by, overlap_at_k,
                          served_ms, shadow_ms, fingerprint, event)
VALUES (clock_timestamp() - make_interval(secs => %(age)s), (SELECT max(id) FROM rollout_transitions), 'live',
        %(user)s, 'small', %(cause)s, 'faiss', 0.6667, 4, 5, %(fingerprint)s, %(event)s)
RETURNING id
"""
DEBT = """
INSERT INTO vector_ledger
    (document_id, store, user_id, wanted, state, attempts, next_attempt_at, last_error, changed_at)
VALUES (%s, 'pgvector', %s, 'present', %s, %s, clock_timestamp(), %s, clock_timestamp() - make_interval(mins => %s))
"""


@dataclass(frozen=True, slots=True)
class Made:
    """The two users, and the ids of their chunks."""

    users: tuple[int, int]
    chunks: tuple[UUID, UUID]


def healthy(database: Any, folder: Path) -> Made:
    """Live at 10 percent for some hours, with good evidence all day."""
    with database.connect(autocommit=True) as connection:
        _steps(connection)
        _traffic(connection, begins=1_440, ends=0, bad=0, slow=1.05)
        connection.execute(COUNTS)
        _fleet(connection, transition=5)
        connection.execute(LEGACY)
        connection.execute("INSERT INTO owner_assignments (actor, counts) VALUES ('ada@ops', '{}')")
        connection.execute(VERIFIED, (3, 1_210, 1_210, 0))
        connection.execute(VERIFIED, (5, 95, 95, 0))
    return _documents(database, folder)


def poisoned(database: Any, folder: Path) -> Made:
    """After the same day: a leak, the guard's step back, debts, a halted process; each text a hostile one."""
    made = healthy(database, folder)
    mine, theirs = made.users
    with database.connect(autocommit=True) as connection:
        _traffic(connection, begins=60, ends=12, bad=60, slow=9)
        _step(connection, 6, Stage.LIVE, 0, "guard", f"2 comparisons found a chunk of another user {HOSTILE}", 10)
        difference(connection, mine, "missing_in_pgvector", served=made.chunks[0], shadow=None, age=90)
        difference(connection, mine, "owner_mismatch", served=made.chunks[0], shadow=made.chunks[1], age=60)
        connection.execute(DEBT, (9_001, theirs, "owed", 4, f"PostgreSQL is away: {HOSTILE}", 34))
        connection.execute(DEBT, (9_002, theirs, "aside", 12, f"uploads/{HOSTILE}.pdf is gone", 50))
        connection.execute(INSTANCE, (UUID(int=9 << 96), f"host-{HOSTILE}", 77, 4, None, 1))
        connection.execute(INSTANCE, (UUID(int=8 << 96), "app-3", 78, 6, f"lost commits {HOSTILE}", 1))
        connection.execute(
            "INSERT INTO rollout_holds (held, actor, reason) VALUES (true, 'eve@ops', %s)", (f"wait {HOSTILE}",)
        )
        connection.execute(VERIFIED, (6, 4, 4, 3))
    with database.connect(Role.ROLLOUT, autocommit=True) as connection:
        connection.execute("DELETE FROM document_chunks WHERE id = %s", (made.chunks[0],))
    return made


def difference(
    connection: psycopg.Connection[Any], user: int, cause: str, *, served: UUID, shadow: UUID | None, age: float
) -> int:
    """A comparison in which FAISS answered with `served` and pgvector with `shadow`; its number."""
    event = {
        "served_by": "faiss",
        "served": [[str(served), 0.83]],
        "shadow": [] if shadow is None else [[str(shadow), 0.81]],
        "overlap_at_k": 0.6667,
        "rbo": 0.7,
        "top1_match": False,
        "largest_similarity_difference": 0.02,
    }
    parameters = {"age": age, "user": user, "cause": cause, "fingerprint": fingerprint(3), "event": json.dumps(event)}
    row = connection.execute(DIFFERENCE, parameters).fetchone()
    assert row is not None
    return int(row[0])


def _steps(connection: psycopg.Connection[Any]) -> None:
    evidence = {"gate": {"criteria": [{"name": "model", "verdict": "overridden", "todo": "overridden: no key here"}]}}
    _step(connection, 2, Stage.DUALWRITE, 0, "ada@ops", "window of Friday", 1_420, evidence)
    _step(connection, 3, Stage.SHADOW, 0, "ada@ops", "verified", 1_200)
    _step(connection, 4, Stage.LIVE, 1, "bo@ops", "two quiet days", 620)
    _step(connection, 5, Stage.LIVE, 10, "bo@ops", "no complaint", 230)


def _step(
    connection: psycopg.Connection[Any], number: int, stage: Stage, percent: int, actor: str, reason: str,
    minutes: int, evidence: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    text = json.dumps(evidence or {})
    connection.execute(TRANSITION, (number, stage, percent, percent, actor, reason, text, minutes))


def _traffic(connection: psycopg.Connection[Any], *, begins: int, ends: int, bad: int, slow: float) -> None:
    """`bad` of a thousand comparisons differ without excuse."""
    connection.execute(
        TRAFFIC,
        {
            "from": begins,
            "to": ends,
            "bad": bad,
            "slow": slow,
            "causes": ["missing_in_pgvector", "timeout", "content_drift", "error", "reorder"],
            "fingerprint": fingerprint(3),
        },
    )


def _fleet(connection: psycopg.Connection[Any], transition: int) -> None:
    for number, host in enumerate(HOSTS):
        connection.execute(INSTANCE, (UUID(int=(number + 1) << 96), host, 4_100 + number, transition, None, 0.4))


def _documents(database: Any, folder: Path) -> Made:
    users = add_users(database, 2)
    with router_on(database, folder) as router:
        for user in users:
            name = f"note-{user}.md"
            router.index(router.receive(user, write_note(folder, name, f"The tide of {user} turns at four."), name))
    with database.connect(Role.ROLLOUT) as connection:
        rows = dict(connection.execute("SELECT user_id, id FROM document_chunks").fetchall())
    return Made((users[0], users[1]), (rows[users[0]], rows[users[1]]))
