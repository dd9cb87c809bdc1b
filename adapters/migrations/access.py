"""The tables of access: tenants, their keys, limits, usage, grants between them, and the audit log.

They are in the registry's database because a mutation and its line of the audit log are one transaction. Times are
Unix seconds.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from adapters.migrations.schema import metadata

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("created_at", Float, nullable=False),
    Column("disabled_at", Float),  # null: active
    Column("weight", Float, nullable=False),
    Column("service_class", String(8), nullable=False),
    Column("requests_per_min", Integer),  # these three: null is unlimited
    Column("tokens_per_min", Integer),
    Column("max_concurrency", Integer),
    Column("signatures_required_at", Float),  # null: unsigned uploads are taken too
    CheckConstraint("service_class IN ('realtime', 'standard', 'batch')", name="ck_tenants_service_class"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(63), ForeignKey("tenants.name"), nullable=False),
    Column("hash", String(64), nullable=False),  # HMAC-SHA256 of the whole key; the key itself is nowhere
    Column("label", String(200), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("adapters", JSON, nullable=False),  # globs; an empty list is every delta of the tenant
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
)

signers = Table(
    "signers",
    metadata,
    Column("tenant", String(63), ForeignKey("tenants.name"), primary_key=True),
    Column("id", String(16), primary_key=True),  # begins the sha256 of the public key
    Column("public_key", String(64), nullable=False),
    Column("label", String(200), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)

grants = Table(
    "grants",
    metadata,
    Column("owner", String(63), primary_key=True),
    Column("adapter", String(63), primary_key=True),
    Column("grantee", String(63), primary_key=True),  # a tenant, or "*" for every one
    Column("created_at", Float, nullable=False),
    Index("ix_grants_grantee", "grantee"),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", Float, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("details", Text, nullable=False),  # JSON as it was hashed
    Column("hash", String(64), nullable=False),
    UniqueConstraint("hash", name="uq_audit_log_hash"),
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # one row, 1
    Column("seq", Integer, nullable=False),
    Column("hash", String(64), nullable=False),
)

buckets = Table(
    "buckets",
    metadata,
    Column("tenant", String(63), ForeignKey("tenants.name"), primary_key=True),
    Column("kind", String(8), primary_key=True),
    Column(
        "level", Float, nullable=False
    ),  # what may still be taken at `at`; more than the limit counts as the limit
    Column("at", Float, nullable=False),
    CheckConstraint("kind IN ('requests', 'tokens')", name="ck_buckets_kind"),
)

usage = Table(
    "usage",
    metadata,
    Column("id", String(64), primary_key=True),  # of the request, as its answer has it
    Column("tenant", String(63), nullable=False),
    Column("key_id", String(16), nullable=False),  # empty: there were no keys
    Column("adapter_digest", String(64)),  # null: the bare backbone
    Column("hour", Integer, nullable=False),  # opened_at // 3600
    Column("opened_at", Float, nullable=False),
    Column("closed_at", Float),
    Column("outcome", String(9), nullable=False),
    Column("reserved_tokens", Integer, nullable=False),  # what it could have come to at most
    Column("prompt_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),  # of the prompt's, those that were not computed again
    Column("completion_tokens", Integer, nullable=False),
    CheckConstraint(
        "outcome IN ('open', 'completed', 'cancelled', 'failed', 'crashed')", name="ck_usage_outcome"
    ),
    Index("ix_usage_tenant_hour", "tenant", "hour"),
    Index("ix_usage_hour", "hour"),
)

places = Table(
    "places",
    metadata,
    Column("id", String(64), primary_key=True),  # of a request in progress
    Column("tenant", String(63), ForeignKey("tenants.name"), nullable=False),
    Column("expires_at", Float, nullable=False),  # put off for as long as its gateway lives
    Index("ix_places_tenant", "tenant"),
)
