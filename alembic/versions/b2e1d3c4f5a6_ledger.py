"""The migration's own tables: ledger, stage changes, fleet, owners of legacy chunks, diffs, verify runs.

They live until the contracting revision drops them. Nothing here touches a table of the old release.

Revision ID: b2e1d3c4f5a6
Revises: a1f0c2d3e4b5
"""

from __future__ import annotations

from alembic import op

revision = "b2e1d3c4f5a6"
down_revision = "a1f0c2d3e4b5"
branch_labels = None
depends_on = None

TABLES = (
    "shadow_diffs",
    "verify_runs",
    "legacy_chunks",
    "owner_assignments",
    "rollout_counts",
    "rollout_holds",
    "rollout_instances",
    "rollout_transitions",
    "vector_ledger",
)

LEDGER = """
CREATE TABLE vector_ledger (
    document_id integer NOT NULL,
    store text NOT NULL CHECK (store IN ('faiss', 'pgvector')),
    user_id integer NOT NULL,
    wanted text NOT NULL CHECK (wanted IN ('present', 'absent')),
    state text NOT NULL CHECK (state IN ('owed', 'done', 'aside')),
    attempts integer NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL,
    last_error text,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (document_id, store)
);
CREATE INDEX vector_ledger_claimable ON vector_ledger (next_attempt_at) WHERE state = 'owed';
CREATE INDEX vector_ledger_unsettled ON vector_ledger (user_id, store) WHERE state <> 'done';
CREATE INDEX vector_ledger_recent ON vector_ledger (user_id, changed_at);
"""

# A row of `documents` that goes with its user, or by the old release's hand, is a deletion like any other.
DELETED_BEHIND = """
CREATE FUNCTION documents_leave_a_debt() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO vector_ledger (document_id, store, user_id, wanted, state, next_attempt_at)
    SELECT OLD.id, store, OLD.user_id, 'absent', 'owed', clock_timestamp()
    FROM unnest(ARRAY['faiss', 'pgvector']) AS store
    ON CONFLICT (document_id, store) DO UPDATE
    SET wanted = 'absent', state = 'owed', attempts = 0, last_error = NULL,
        next_attempt_at = clock_timestamp(), changed_at = clock_timestamp()
    WHERE vector_ledger.wanted = 'present';
    RETURN NULL;
END $$;
CREATE TRIGGER leave_a_debt AFTER DELETE ON documents
    FOR EACH ROW EXECUTE FUNCTION documents_leave_a_debt();
"""

# The primary key is what refuses the second of two on-calls: both insert previous + 1.
TRANSITIONS = """
CREATE TABLE rollout_transitions (
    id integer PRIMARY KEY CHECK (id > 0),
    stage text NOT NULL,
    read_percent integer NOT NULL CHECK (read_percent BETWEEN 0 AND 100),
    read_threshold double precision NOT NULL DEFAULT 0,
    shadow_sample_rate double precision NOT NULL CHECK (shadow_sample_rate BETWEEN 0 AND 1),
    actor text NOT NULL,
    reason text NOT NULL,
    evidence jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO rollout_transitions (id, stage, read_percent, shadow_sample_rate, actor, reason)
VALUES (1, 'off', 0, 1, 'alembic', 'seeded');
CREATE FUNCTION rollout_transitions_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'rollout_transitions is append-only: insert the next transition instead';
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON rollout_transitions
    FOR EACH STATEMENT EXECUTE FUNCTION rollout_transitions_append_only();
"""

FLEET = """
CREATE TABLE rollout_instances (
    instance uuid PRIMARY KEY,
    host text NOT NULL,
    pid integer NOT NULL,
    transition_id integer NOT NULL,
    halted text,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE rollout_holds (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    held boolean NOT NULL,
    actor text NOT NULL,
    reason text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE rollout_counts (
    transition_id integer NOT NULL,
    since timestamptz NOT NULL,
    name text NOT NULL,
    count bigint NOT NULL,
    PRIMARY KEY (transition_id, since, name)
);
"""

OWNERS = """
CREATE TABLE owner_assignments (
    version integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    actor text NOT NULL,
    counts jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE legacy_chunks (
    docstore_id text PRIMARY KEY,
    position integer NOT NULL,
    source text NOT NULL,
    document_id integer,
    user_id integer,
    ordinal integer NOT NULL,
    status text NOT NULL CHECK (status IN ('assigned', 'quarantined', 'discarded')),
    reason text NOT NULL,
    decided_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK ((status = 'assigned') = (user_id IS NOT NULL AND document_id IS NOT NULL))
);
CREATE INDEX legacy_chunks_by_document ON legacy_chunks (document_id);
"""

EVIDENCE = """
CREATE TABLE shadow_diffs (
    id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    transition_id integer NOT NULL,
    stage text NOT NULL,
    user_id integer NOT NULL,
    cohort text NOT NULL,
    cause text NOT NULL,
    served_by text NOT NULL,
    overlap_at_k double precision,
    served_ms double precision NOT NULL,
    shadow_ms double precision,
    fingerprint text NOT NULL,
    event jsonb NOT NULL
);
CREATE INDEX shadow_diffs_by_transition ON shadow_diffs (transition_id, at);
CREATE INDEX shadow_diffs_by_time ON shadow_diffs (at);
CREATE TABLE verify_runs (
    id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    transition_id integer NOT NULL,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    chunks bigint NOT NULL,
    differences bigint NOT NULL,
    report jsonb NOT NULL
);
"""

# What a cause needs to know across users: the owner of one chunk id and nothing else.
CHUNK_OWNER = """
CREATE POLICY owner_of_a_chunk ON document_chunks FOR SELECT TO CURRENT_USER USING (true);
CREATE FUNCTION chunk_owner(chunk uuid) RETURNS integer
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp
    AS 'SELECT user_id FROM public.document_chunks WHERE id = chunk LIMIT 1';
REVOKE ALL ON FUNCTION chunk_owner(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION chunk_owner(uuid) TO victus_app, victus_rollout;
CREATE INDEX document_chunks_by_id ON document_chunks (id, user_id);
"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for statement in (LEDGER, DELETED_BEHIND, TRANSITIONS, FLEET, OWNERS, EVIDENCE, CHUNK_OWNER):
            op.execute(statement)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER leave_a_debt ON documents")
        op.execute("DROP FUNCTION documents_leave_a_debt()")
        op.execute("DROP FUNCTION chunk_owner(uuid)")
        op.execute("DROP INDEX document_chunks_by_id")
        op.execute("DROP POLICY owner_of_a_chunk ON document_chunks")
        for table in TABLES:
            op.execute(f"DROP TABLE {table}")
        op.execute("DROP FUNCTION rollout_transitions_append_only()")
