"""The ledger of requests."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("key_id", sa.String(16), nullable=False),
        sa.Column("adapter_digest", sa.String(64)),
        sa.Column("hour", sa.Integer, nullable=False),
        sa.Column("opened_at", sa.Float, nullable=False),
        sa.Column("closed_at", sa.Float),
        sa.Column("outcome", sa.String(9), nullable=False),
        sa.Column("reserved_tokens", sa.Integer, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("cached_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.CheckConstraint(
            "outcome IN ('open', 'completed', 'cancelled', 'failed', 'crashed')", name="ck_usage_outcome"
        ),
    )
    op.create_index("ix_usage_tenant_hour", "usage", ["tenant", "hour"])
