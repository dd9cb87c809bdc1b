"""What is known of stored bytes, so that those nobody needs can be collected by several processes at once."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "blobs",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("marked_at", sa.Float),
        sa.Column("swept_at", sa.Float),
    )
    op.create_table(
        "holds",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("digest", sa.String(64), sa.ForeignKey("blobs.digest"), nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
    )
    op.create_index("ix_holds_digest", "holds", ["digest"])
    op.create_index("ix_versions_digest", "versions", ["digest"])
    op.execute("INSERT INTO blobs (digest) SELECT DISTINCT digest FROM versions")
