"""Soft deletion and the way back: rows stay, references stop resolving, aliases and grants go. Each over one
transaction; `Registry` says what they raise, and writes the audit log.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, and_, delete, func, select, update

from adapters.aliases import advance_latest, in_use_by, point
from adapters.blob_records import BlobRecords
from adapters.errors import Conflict
from adapters.migrations.access import grants
from adapters.migrations.queries import (
    ALIASES,
    COUNTS,
    LIVE,
    VERSIONS,
    not_found,
    require_version,
)
from adapters.migrations.schema import VersionRecord, adapters, versions
from adapters.names import LATEST, ModelReference
from adapters.quotas import Quota, check_version


def delete_version(tx: Connection, tenant: str, name: str, version: int, *, now: float) -> VersionRecord:
    """See Registry."""
    adapter_id, record = require_version(tx, tenant, name, version)
    mains, canaries = in_use_by(tx, adapter_id, version)
    if held := sorted((mains - {LATEST}) | canaries):
        raise Conflict(
            f"Version {version} of {name!r} is in use by alias {', '.join(map(repr, held))}.",
            param="version",
            remedy="Move the alias to another version first, or delete the whole adapter.",
        )
    _delete(tx, versions.c.adapter_id == adapter_id, versions.c.version == version, now=now)
    if LATEST in mains:
        newest_ready = select(func.max(versions.c.version)).where(
            versions.c.adapter_id == adapter_id, LIVE, versions.c.status == "ready"
        )
        point(tx, adapter_id, LATEST, tx.scalar(newest_ready), now)
    return record


def undelete_version(
    tx: Connection, tenant: str, name: str, version: int, *, blobs: BlobRecords, quota: Quota, now: float
) -> VersionRecord:
    """See Registry."""
    reference = ModelReference(tenant, name, version=version)
    named = and_(adapters.c.tenant == tenant, adapters.c.name == name)
    mine = and_(versions.c.adapter_id == adapters.c.id, versions.c.version == version)
    columns = (adapters.c.id, versions.c.digest, versions.c.status, versions.c.size_bytes)
    query = select(*columns).join_from(adapters, versions, mine)
    gone = tx.execute(query.where(named, versions.c.deleted_at.is_not(None))).one_or_none()
    if gone is None:
        raise not_found(reference)
    same = VERSIONS.where(adapters.c.id == gone.id, versions.c.digest == gone.digest)
    if gone.status != "failed" and (found := tx.execute(same.where(COUNTS)).one_or_none()):
        raise Conflict(
            f"Version {found.version} of {name!r} has the same content as {version}.", param="version"
        )
    check_version(tx, quota, tenant, name, gone.digest, gone.size_bytes)
    blobs.confirm(tx, gone.digest, None)
    row = and_(versions.c.adapter_id == gone.id, versions.c.version == version)
    tx.execute(update(versions).where(row).values(deleted_at=None))
    advance_latest(tx, gone.id, version, gone.status, now)
    return require_version(tx, tenant, name, version)[1]


def delete_adapter(tx: Connection, tenant: str, name: str, *, now: float) -> tuple[VersionRecord, ...]:
    """See Registry."""
    reference = ModelReference(tenant, name)
    query = VERSIONS.where(adapters.c.tenant == tenant, adapters.c.name == name)
    rows = tx.execute(query.order_by(versions.c.version.desc())).all()
    if not rows:
        raise not_found(reference)
    adapter_id = rows[0].id
    _delete(tx, versions.c.adapter_id == adapter_id, now=now)
    for alias in tx.execute(ALIASES.where(adapters.c.id == adapter_id)).all():
        point(tx, adapter_id, alias.alias, None, now)
    # the name may be used again, for something that was never meant to be shared
    tx.execute(delete(grants).where(grants.c.owner == tenant, grants.c.adapter == name))
    return tuple(VersionRecord(*row[1:]) for row in rows)


def _delete(tx: Connection, *which: ColumnElement[bool], now: float) -> None:
    tx.execute(update(versions).where(*which, LIVE).values(deleted_at=now))
