"""add safety tables: traces with their steps, and actions that wait for approval

Revision ID: 6dd9452c10a1
Revises: 993afe580406
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op

revision = "6dd9452c10a1"
down_revision = "993afe580406"
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_traces()
    create_trace_steps()
    create_pending_actions()


def downgrade() -> None:
    for table in ("pending_actions", "trace_steps", "traces"):
        op.drop_table(table)


def create_traces() -> None:
    op.create_table(
        "traces",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("user_id", sa.Integer()),
        sa.Column("conversation_id", sa.String()),
        sa.Column("name", sa.String()),
        sa.Column("status", sa.String()),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.func.now()),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("metadata_json", sa.Text()),
        sa.PrimaryKeyConstraint("id"),
    )


def create_trace_steps() -> None:
    op.create_table(
        "trace_steps",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("trace_id", sa.String(), nullable=False),
        sa.Column("tool_name", sa.String()),
        sa.Column("args", sa.Text()),
        sa.Column("decision", sa.String()),
        sa.Column("output", sa.Text()),
        sa.Column("duration_ms", sa.Double()),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now()),
        sa.PrimaryKeyConstraint("id"),
        sa.ForeignKeyConstraint(["trace_id"], ["traces.id"], ondelete="CASCADE"),
    )


def create_pending_actions() -> None:
    op.create_table(
        "pending_actions",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("tool_name", sa.String(), nullable=False),
        sa.Column("risk_level", sa.String()),
        sa.Column("args", sa.Text()),
        sa.Column("status", sa.String(), server_default="PENDING", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now()),
        sa.Column("resolved_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id"),
    )
