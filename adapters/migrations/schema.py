"""The registry's records, as its callers see them, and its tables.

No row but a hold is ever removed: that is why version numbers and alias revisions never come back. Times are Unix
seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
)

Status = Literal["validating", "ready", "failed"]


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One immutable upload. Only `status` and `proof` change, once, when validation ends.

    `created_at` is Unix seconds, `digest` bare hex. `republished`: `publish` found this digest live under this
    name and changed nothing.
    """

    tenant: str
    name: str
    version: int
    digest: str
    status: Status
    method: str
    backbone_digest: str
    task: str
    size_bytes: int
    labels: Mapping[str, str]
    proof: Mapping[str, Any]
    created_at: float
    republished: bool = False


@dataclass(frozen=True, slots=True)
class AliasRecord:
    """Where an alias points. `revision` grows with every move, also across deletion. `updated_at`: Unix seconds.

    `canaries`: versions beside the main one, with their shares of the requests in percent.
    """

    tenant: str
    name: str
    alias: str
    version: int
    revision: int
    updated_at: float
    canaries: Mapping[int, int] = field(default_factory=dict)

    @property
    def weights(self) -> dict[int, int]:
        """Every version that the alias means, with its share in percent, the main one's first."""
        return {self.version: 100 - sum(self.canaries.values()), **self.canaries}


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One move of an alias, to its removal where `version` is None. `at`: Unix seconds."""

    alias: str
    revision: int
    version: int | None
    canaries: Mapping[int, int]
    at: float


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name with at least one live version.

    `created_at` is when the name was first used, in Unix seconds. `latest` is what the bare name means, None while
    no version is ready. `aliases` holds every alias, sorted.
    """

    tenant: str
    name: str
    created_at: float
    latest: VersionRecord | None
    aliases: tuple[AliasRecord, ...]


@dataclass(frozen=True, slots=True)
class AdapterPage:
    """Adapters by name. `next_after` is the `after` of the next page, None on the last."""

    items: tuple[AdapterRecord, ...]
    next_after: str | None


metadata = MetaData()

# Names compare by their bytes in every database, whatever language it was made for: pages end where they began.
NAME = String(63).with_variant(String(63, collation="C"), "postgresql")

adapters = Table(
    "adapters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", NAME, nullable=False),
    Column("name", NAME, nullable=False),
    Column("created_at", Float, nullable=False),  # when the name was first used
    UniqueConstraint("tenant", "name", name="uq_adapters_tenant_name"),
)

versions = Table(
    "versions",
    metadata,
    Column("adapter_id", Integer, ForeignKey("adapters.id"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("status", String(10), nullable=False),
    Column("method", Text, nullable=False),
    Column("backbone_digest", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("labels", JSON, nullable=False),
    Column("proof", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("deleted_at", Float),  # null: live
    CheckConstraint("status IN ('validating', 'ready', 'failed')", name="ck_versions_status"),
)

_counts = and_(versions.c.deleted_at.is_(None), versions.c.status != "failed")
Index(
    "uq_versions_live_digest",
    versions.c.adapter_id,
    versions.c.digest,
    unique=True,
    sqlite_where=_counts,
    postgresql_where=_counts,
)

aliases = Table(
    "aliases",
    metadata,
    Column("adapter_id", Integer, ForeignKey("adapters.id"), primary_key=True),
    Column("alias", NAME, primary_key=True),
    Column(
        "version", Integer
    ),  # null: gone; the row stays so that its revision never returns to an old value
    Column("revision", Integer, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("canaries", JSON(none_as_null=True)),  # version -> percent; null: every request goes to `version`
    ForeignKeyConstraint(["adapter_id", "version"], ["versions.adapter_id", "versions.version"]),
)

alias_history = Table(
    "alias_history",
    metadata,
    Column("adapter_id", Integer, ForeignKey("adapters.id"), primary_key=True),
    Column("alias", NAME, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("version", Integer),  # null: the alias was removed
    Column("canaries", JSON(none_as_null=True)),
    Column("back_to", Integer),  # the revision that a rollback from here returns to; null: none
    Column("at", Float, nullable=False),
)

Index("ix_versions_digest", versions.c.digest)

blobs = Table(
    "blobs",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("marked_at", Float),  # null: in use when the last collection looked
    Column("swept_at", Float),  # null: the store may have it
)

holds = Table(
    "holds",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("digest", String(64), ForeignKey("blobs.digest"), nullable=False),
    Column("expires_at", Float, nullable=False),
    Index("ix_holds_digest", "digest"),
)
