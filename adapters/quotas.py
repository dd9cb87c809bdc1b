"""What a tenant may keep, checked in the transaction that would exceed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, and_, func, select

from adapters.errors import QuotaExceeded
from adapters.migrations.queries import LIVE
from adapters.migrations.schema import adapters, versions
from adapters.migrations.uploads import uploads

_DELETE = "Delete what is not needed any more, or ask the operator for more."


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """A tenant's bounds; None: none.

    `max_stored_bytes`: of the contents of live versions, one that has several names counted once, and of files sent
    in parts. `max_adapters`: names with a live version. `max_versions`: live versions of all of them. `max_files`:
    files sent in parts, pending or waiting for use.
    """

    max_stored_bytes: int | None = None
    max_adapters: int | None = None
    max_versions: int | None = None
    max_files: int | None = None


UNLIMITED = Quota()


def check_name(tx: Connection, quota: Quota, tenant: str, name: str) -> None:
    """Raises QuotaExceeded where `name` would be one more adapter than `tenant` may have."""
    if quota.max_adapters is None:
        return
    live = _live(tenant)
    if tx.execute(live.where(adapters.c.name == name).limit(1)).all():
        return
    count = tx.scalar(select(func.count(func.distinct(live.subquery().c.adapter_id))))
    _check("adapters", count, 1, quota.max_adapters)


def check_version(tx: Connection, quota: Quota, tenant: str, name: str, digest: str, size_bytes: int) -> None:
    """Raises QuotaExceeded where one more live version of `name`, of this content, is more than `tenant` may have."""
    check_name(tx, quota, tenant, name)
    live = _live(tenant)
    if quota.max_versions is not None:
        count = tx.scalar(select(func.count()).select_from(live.subquery()))
        _check("live versions", count, 1, quota.max_versions)
    if quota.max_stored_bytes is None or tx.execute(live.where(versions.c.digest == digest).limit(1)).all():
        return
    _check("stored bytes", _stored_bytes(tx, tenant), size_bytes, quota.max_stored_bytes)


def _live(tenant: str) -> Select[Any]:
    found = select(versions.c.adapter_id).join_from(
        adapters, versions, versions.c.adapter_id == adapters.c.id
    )
    return found.where(adapters.c.tenant == tenant, LIVE)


def check_file(tx: Connection, quota: Quota, tenant: str, size_bytes: int) -> None:
    """Raises QuotaExceeded where one more file of so many bytes is more than `tenant` may send."""
    kept = and_(uploads.c.tenant == tenant, uploads.c.ended_at.is_(None))
    count, total = tx.execute(select(func.count(), func.sum(uploads.c.size_bytes)).where(kept)).one()
    if quota.max_files is not None:
        _check("files sent in parts", count, 1, quota.max_files)
    if quota.max_stored_bytes is not None:
        used = _stored_bytes(tx, tenant) + int(total or 0)
        _check("stored bytes", used, size_bytes, quota.max_stored_bytes)


def _stored_bytes(tx: Connection, tenant: str) -> int:
    mine = and_(versions.c.adapter_id == adapters.c.id, adapters.c.tenant == tenant, LIVE)
    sizes = select(func.max(versions.c.size_bytes).label("size")).where(mine).group_by(versions.c.digest)
    return int(tx.scalar(select(func.sum(sizes.subquery().c.size))) or 0)


def _check(what: str, used: int | None, wanted: int, most: int) -> None:
    if (used or 0) + wanted > most:
        raise QuotaExceeded(
            f"The tenant has {used or 0} of at most {most} {what}; this needs {wanted} more.",
            remedy=_DELETE,
        )
