"""Users with very many chunks get a second, half as wide copy of their vectors, which a search scans first.

Expand only: code that does not know the tables neither reads nor writes them; deletions reach the copy by
the foreign key, whoever deletes. Stays when FAISS goes.

Revision ID: c3d2e1f4a5b6
Revises: b2e1d3c4f5a6
"""

from __future__ import annotations

from alembic import op

revision = "c3d2e1f4a5b6"
down_revision = "b2e1d3c4f5a6"
branch_labels = None
depends_on = None

# The foreign key takes a lock that writers of chunks wait for; the new table is empty, so it is held for a moment.
LOCK_TIMEOUT = "SET LOCAL lock_timeout = '5s'"

# `ready`: every chunk of the user is in `chunk_halves`, and every writer from now on puts it there.
GIANTS = """
CREATE TABLE giant_users (
    user_id integer PRIMARY KEY,
    ready boolean NOT NULL DEFAULT false,
    since timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE chunk_halves (
    user_id integer NOT NULL,
    id uuid NOT NULL,
    half halfvec(1536) STORAGE PLAIN NOT NULL,
    PRIMARY KEY (user_id, id),
    FOREIGN KEY (user_id, id) REFERENCES document_chunks (user_id, id) ON DELETE CASCADE
) WITH (toast_tuple_target = 8160);
ALTER TABLE chunk_halves ENABLE ROW LEVEL SECURITY;
ALTER TABLE chunk_halves FORCE ROW LEVEL SECURITY;
CREATE POLICY own_halves ON chunk_halves
    USING (user_id = nullif(current_setting('app.user_id', true), '')::integer)
    WITH CHECK (user_id = nullif(current_setting('app.user_id', true), '')::integer);
GRANT SELECT, INSERT, UPDATE, DELETE ON giant_users, chunk_halves TO victus_app, victus_rollout;
"""


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(LOCK_TIMEOUT)
        op.execute(GIANTS)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(LOCK_TIMEOUT)
        op.execute("DROP TABLE chunk_halves")
        op.execute("DROP TABLE giant_users")
