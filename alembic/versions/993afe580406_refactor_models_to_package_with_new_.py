"""refactor models to package with new tables: users, conversations, facts, documents

Revision ID: 993afe580406
Revises:
"""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from alembic import op

revision = "993afe580406"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    create_users()
    create_conversations()
    create_messages()
    create_conversation_memories()
    create_user_facts()
    create_documents()


def downgrade() -> None:
    for table in (
        "documents",
        "user_facts",
        "conversation_memories",
        "messages",
        "conversations",
        "users",
    ):
        op.drop_table(table)


def create_users() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("email", sa.String(), nullable=False),
        sa.Column("username", sa.String(), nullable=False),
        sa.Column("hashed_password", sa.String()),
        sa.Column("full_name", sa.String()),
        sa.Column("is_active", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("is_verified", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("provider", sa.String(), server_default="local", nullable=False),
        sa.Column("provider_id", sa.String()),
        sa.Column("avatar_url", sa.String()),
        moment("created_at"),
        sa.Column("last_login", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("email"),
        sa.UniqueConstraint("username"),
    )


def create_conversations() -> None:
    op.create_table(
        "conversations",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("title", sa.String(), server_default="New Conversation", nullable=False),
        sa.Column("pinned", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("archived", sa.Boolean(), server_default=sa.false(), nullable=False),
        moment("created_at"),
        moment("updated_at"),
        sa.Column("deleted_at", sa.DateTime(timezone=True)),
        sa.PrimaryKeyConstraint("id"),
        belongs_to("users", "user_id"),
    )


def create_messages() -> None:
    op.create_table(
        "messages",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("conversation_id", sa.String(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("token_count", sa.Integer()),
        sa.Column("metadata_json", sa.Text()),
        moment("created_at"),
        sa.PrimaryKeyConstraint("id"),
        belongs_to("conversations", "conversation_id"),
        belongs_to("users", "user_id"),
    )


def create_conversation_memories() -> None:
    op.create_table(
        "conversation_memories",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("conversation_id", sa.String(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("summary_text", sa.Text()),
        sa.Column("summary_version", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("summarized_until_message_id", sa.String()),
        sa.Column("summarized_until_created_at", sa.DateTime(timezone=True)),
        sa.Column("last_summary_token_estimate", sa.Integer()),
        moment("updated_at"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("conversation_id"),
        belongs_to("conversations", "conversation_id"),
        belongs_to("users", "user_id"),
    )


def create_user_facts() -> None:
    op.create_table(
        "user_facts",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.Text()),
        moment("last_updated"),
        sa.PrimaryKeyConstraint("id"),
    )


def create_documents() -> None:
    op.create_table(
        "documents",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        moment("created_at"),
        sa.PrimaryKeyConstraint("id"),
        belongs_to("users", "user_id"),
    )


def moment(name: str) -> sa.Column[datetime]:
    return sa.Column(name, sa.DateTime(timezone=True), server_default=sa.func.now())


def belongs_to(table: str, column: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{table}.id"], ondelete="CASCADE")
