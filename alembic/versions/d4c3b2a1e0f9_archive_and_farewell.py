"""What the gate `removal` asks: archives of the FAISS directory, and which processes do without FAISS.

Expand only: code of the revision before does not name the new column, so its processes count as needing FAISS.

Revision ID: d4c3b2a1e0f9
Revises: c3d2e1f4a5b6
"""

from __future__ import annotations

from alembic import op

revision = "d4c3b2a1e0f9"
down_revision = "c3d2e1f4a5b6"
branch_labels = None
depends_on = None

ARCHIVES = """
CREATE TABLE faiss_archives (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    transition_id integer NOT NULL,
    sha256 text NOT NULL UNIQUE,
    path text NOT NULL,
    chunks bigint NOT NULL,
    actor text NOT NULL,
    written_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    restored_at timestamptz
);
"""
INSTANCES = "ALTER TABLE rollout_instances ADD COLUMN without_faiss boolean NOT NULL DEFAULT false"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute(ARCHIVES)
        op.execute(INSTANCES)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER TABLE rollout_instances DROP COLUMN without_faiss")
        op.execute("DROP TABLE faiss_archives")
