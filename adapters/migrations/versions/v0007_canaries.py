"""Aliases that divide requests, with their history; who signs uploads."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0005"


def upgrade() -> None:
    name = sa.String(63).with_variant(sa.String(63, collation="C"), "postgresql")
    op.add_column("aliases", sa.Column("canaries", sa.JSON))
    op.create_table(
        "alias_history",
        sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id"), primary_key=True),
        sa.Column("alias", name, primary_key=True),
        sa.Column("revision", sa.Integer, primary_key=True),
        sa.Column("version", sa.Integer),
        sa.Column("canaries", sa.JSON),
        sa.Column("back_to", sa.Integer),
        sa.Column("at", sa.Float, nullable=False),
    )
    op.execute(
        "INSERT INTO alias_history (adapter_id, alias, revision, version, at) "
        "SELECT adapter_id, alias, revision, version, updated_at FROM aliases"
    )
    op.add_column("tenants", sa.Column("signatures_required_at", sa.Float))
    op.create_table(
        "signers",
        sa.Column("tenant", sa.String(63), sa.ForeignKey("tenants.name"), primary_key=True),
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("public_key", sa.String(64), nullable=False),
        sa.Column("label", sa.String(200), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("revoked_at", sa.Float),
    )
