"""What the registry is asked: which version a reference means, and lists of adapters and versions. Each over one
transaction; `Registry` says what they raise.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, select

from adapters.aliases import resolve_alias
from adapters.errors import InvalidRequest
from adapters.migrations.queries import (
    ADAPTERS,
    LIVE,
    POINTED_AT,
    VERSIONS,
    adapter_records,
    not_found,
)
from adapters.migrations.schema import (
    AdapterPage,
    AdapterRecord,
    VersionRecord,
    adapters,
    aliases,
    versions,
)
from adapters.names import MAX_VERSION, ModelReference, check_name

MAX_PAGE = 200
"""The most items that one listing returns."""


def resolve(tx: Connection, tenant: str, reference: ModelReference, unit: str | None) -> VersionRecord:
    """See Registry. `tenant`: the reference's, or the default one."""
    query = VERSIONS.where(adapters.c.tenant == tenant, adapters.c.name == reference.name)
    if reference.version is not None:
        query = query.where(versions.c.version == reference.version)
    elif reference.digest is not None:  # several only where uploads failed before one that did not
        query = query.where(versions.c.digest == reference.digest)
        query = query.order_by(versions.c.version.desc()).limit(1)
    else:
        query = query.join(aliases, POINTED_AT).where(aliases.c.alias == reference.alias)
        query = query.add_columns(aliases.c.canaries)
    row = tx.execute(query).one_or_none()
    if row is None:
        raise not_found(reference)
    if reference.alias is not None:
        return resolve_alias(tx, row, reference.alias, unit)
    return VersionRecord(*row[1:])


def adapter_id(tx: Connection, tenant: str, name: str) -> int:
    """The id of an adapter with a live version. Raises NotFound, InvalidReference."""
    reference = ModelReference(tenant, name)  # before the database sees the name
    query = ADAPTERS.where(adapters.c.tenant == tenant, adapters.c.name == name)
    row = tx.execute(query).one_or_none()
    if row is None:
        raise not_found(reference)
    return int(row.id)


def list_adapters(tx: Connection, tenant: str, *, limit: int, after: str | None) -> AdapterPage:
    """See Registry."""
    check_between("limit", limit, MAX_PAGE)
    query = ADAPTERS.where(adapters.c.tenant == check_name(tenant, what="tenant"))
    if after is not None:
        query = query.where(adapters.c.name > check_name(after, what="after"))
    rows = tx.execute(query.order_by(adapters.c.name).limit(limit + 1)).all()
    items = adapter_records(tx, rows[:limit])
    return AdapterPage(items, items[-1].name if len(rows) > limit else None)


def get_adapter(tx: Connection, tenant: str, name: str) -> AdapterRecord:
    """See Registry."""
    reference = ModelReference(tenant, name)
    query = ADAPTERS.where(adapters.c.tenant == tenant, adapters.c.name == name)
    found = adapter_records(tx, tx.execute(query).all())
    if not found:
        raise not_found(reference)
    return found[0]


def list_versions(
    tx: Connection, tenant: str, name: str, *, limit: int, before: int | None
) -> tuple[VersionRecord, ...]:
    """See Registry."""
    check_between("limit", limit, MAX_PAGE)
    reference = ModelReference(tenant, name)
    if before is not None:
        check_between("before", before, MAX_VERSION)
    query = VERSIONS.where(adapters.c.tenant == tenant, adapters.c.name == name)
    page = query if before is None else query.where(versions.c.version < before)
    if tx.execute(query.limit(1)).one_or_none() is None:
        raise not_found(reference)
    rows = tx.execute(page.order_by(versions.c.version.desc()).limit(limit)).all()
    return tuple(VersionRecord(*row[1:]) for row in rows)


def versions_of(tx: Connection, tenant: str, digests: Collection[str]) -> dict[str, list[str]]:
    """See Registry."""
    found: dict[str, list[str]] = {}
    query = VERSIONS.where(adapters.c.tenant == tenant, versions.c.digest.in_(digests))
    for row in tx.execute(query.order_by(adapters.c.name, versions.c.version)) if digests else ():
        found.setdefault(row.digest, []).append(f"{row.name}@v{row.version}")
    return found


def live_digests(tx: Connection) -> frozenset[str]:
    """See Registry."""
    return frozenset(tx.scalars(select(versions.c.digest).where(LIVE).distinct()))


def check_between(what: str, value: int, most: int) -> None:
    """Raises InvalidRequest where `value` is not 1 to `most`."""
    if not 1 <= value <= most:
        raise InvalidRequest(f"{what} is {value}; expected 1 to {most}.", param=what)
