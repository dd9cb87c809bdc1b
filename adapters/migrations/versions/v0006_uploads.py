"""Files sent in parts, idempotency keys, and what a tenant may keep."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(39), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64)),
        sa.Column("status", sa.String(9), nullable=False),
        sa.Column("file_id", sa.String(37)),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float),
        sa.CheckConstraint(
            "status IN ('pending', 'completed', 'cancelled', 'expired')", name="ck_uploads_status"
        ),
        sa.UniqueConstraint("file_id", name="uq_uploads_file_id"),
    )
    op.create_index("ix_uploads_tenant", "uploads", ["tenant"])
    op.create_table(
        "upload_parts",
        sa.Column("upload_id", sa.String(39), sa.ForeignKey("uploads.id"), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("claim", sa.String(32), nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("body", sa.Text),
        sa.Column("adapter_digest", sa.String(80)),
    )
    op.create_index("ix_idempotency_keys_expires_at", "idempotency_keys", ["expires_at"])
    op.add_column("tenants", sa.Column("max_stored_bytes", sa.BigInteger))
    for name in ("max_adapters", "max_versions", "max_files"):
        op.add_column("tenants", sa.Column(name, sa.Integer))
