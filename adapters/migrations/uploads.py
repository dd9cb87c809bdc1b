"""The tables of files that are sent in parts, and of idempotency keys. Times are Unix seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import (
    BigInteger,
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

UploadStatus = Literal["pending", "completed", "cancelled", "expired"]


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """A file that is sent in parts. `sha256`: bare hex; what its sender said, or of a completed one what it is.

    `file_id`: of a completed one. `ended_at`: when its bytes became nobody's; they are removed a while after.
    """

    id: str
    tenant: str
    filename: str
    purpose: str
    size_bytes: int
    sha256: str | None
    status: UploadStatus
    file_id: str | None
    created_at: float
    expires_at: float
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A stored part of an upload, known by the sha256 of its bytes: sent again it is the same part."""

    sha256: str
    size_bytes: int
    created_at: float


uploads = Table(
    "uploads",
    metadata,
    Column("id", String(39), primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64)),
    Column("status", String(9), nullable=False),
    Column("file_id", String(37)),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("ended_at", Float),  # null: its bytes are kept
    CheckConstraint("status IN ('pending', 'completed', 'cancelled', 'expired')", name="ck_uploads_status"),
    UniqueConstraint("file_id", name="uq_uploads_file_id"),
    Index("ix_uploads_tenant", "tenant"),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("upload_id", String(39), ForeignKey("uploads.id"), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Float, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", String(63), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),  # sha256 of what the request asks for
    Column("claim", String(32), nullable=False),  # of the one request that carries it out
    Column("expires_at", Float, nullable=False),
    Column("status", Integer),  # of the answer; null while there is none
    Column("body", Text),  # JSON
    Column("adapter_digest", String(80)),  # the answer's x-adapter-digest
    Index("ix_idempotency_keys_expires_at", "expires_at"),
)
