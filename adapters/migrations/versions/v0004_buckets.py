"""Rates that several gateways count together."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    buckets = op.create_table(
        "buckets",
        sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.name"), primary_key=True),
        sa.Column("kind", sa.String(8), primary_key=True),
        sa.Column("level", sa.Float, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.CheckConstraint("kind IN ('requests', 'tokens')", name="ck_buckets_kind"),
    )
    names = op.get_bind().scalars(sa.text("SELECT name FROM tenants")).all()
    full = [
        {"tenant": name, "kind": kind, "level": 1e18, "at": 0.0}
        for name in names
        for kind in ("requests", "tokens")
    ]
    op.bulk_insert(buckets, full)
