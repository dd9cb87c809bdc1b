"""What the registry reads, as queries and as functions over one transaction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import Connection, Row, and_, exists, select

from adapters.errors import NotFound
from adapters.migrations.schema import AdapterRecord, AliasRecord, VersionRecord, adapters, aliases, versions
from adapters.names import LATEST, ModelReference

# Rows of these two queries: the adapter's id, then the fields of the record in their order.
LIVE = versions.c.deleted_at.is_(None)
COUNTS = versions.c.status != "failed"  # with LIVE: at most one per name and digest
VERSION_COLUMNS = tuple(versions.c[field.name] for field in fields(VersionRecord) if field.name in versions.c)
VERSIONS = (
    select(adapters.c.id, adapters.c.tenant, adapters.c.name, *VERSION_COLUMNS)
    .join_from(adapters, versions, versions.c.adapter_id == adapters.c.id)
    .where(LIVE)
)
ALIAS_COLUMNS = tuple(aliases.c[field.name] for field in fields(AliasRecord) if field.name in aliases.c)
ALIASES = (
    select(adapters.c.id, adapters.c.tenant, adapters.c.name, *ALIAS_COLUMNS)
    .join_from(adapters, aliases, aliases.c.adapter_id == adapters.c.id)
    .where(aliases.c.version.is_not(None))
)
POINTED_AT = and_(aliases.c.adapter_id == versions.c.adapter_id, aliases.c.version == versions.c.version)
ADAPTERS = select(adapters).where(exists().where(versions.c.adapter_id == adapters.c.id, LIVE))


def require_version(tx: Connection, tenant: str, name: str, version: int) -> tuple[int, VersionRecord]:
    """The adapter's id and a live version of it. Raises NotFound."""
    reference = ModelReference(tenant, name, version=version)
    query = VERSIONS.where(
        adapters.c.tenant == tenant, adapters.c.name == name, versions.c.version == version
    )
    row = tx.execute(query).one_or_none()
    if row is None:
        raise not_found(reference)
    return row.id, VersionRecord(*row[1:])


def find_alias(tx: Connection, adapter_id: int, alias: str) -> AliasRecord | None:
    """Where the alias points, None where it is not set."""
    row = tx.execute(ALIASES.where(adapters.c.id == adapter_id, aliases.c.alias == alias)).one_or_none()
    return None if row is None else alias_record(row)


def alias_record(row: Row[Any]) -> AliasRecord:
    """The record in a row of ALIASES. JSON has no integer keys."""
    canaries = {int(version): percent for version, percent in (row.canaries or {}).items()}
    return AliasRecord(row.tenant, row.name, row.alias, row.version, row.revision, row.updated_at, canaries)


def adapter_records(tx: Connection, rows: Sequence[Row[Any]]) -> tuple[AdapterRecord, ...]:
    """Records for rows of `adapters`, with two queries for all of them."""
    ids = [row.id for row in rows]
    pointed_at = VERSIONS.join(aliases, POINTED_AT).where(aliases.c.alias == LATEST, adapters.c.id.in_(ids))
    latest = {row.id: VersionRecord(*row[1:]) for row in tx.execute(pointed_at)}
    pointing: dict[int, list[AliasRecord]] = defaultdict(list)
    for row in tx.execute(ALIASES.where(adapters.c.id.in_(ids)).order_by(aliases.c.alias)):
        pointing[row.id].append(alias_record(row))
    return tuple(
        AdapterRecord(row.tenant, row.name, row.created_at, latest.get(row.id), tuple(pointing[row.id]))
        for row in rows
    )


def not_found(reference: ModelReference) -> NotFound:
    """One message for every way not to exist, so that it tells nothing about what does."""
    return NotFound(f"The model '{reference}' does not exist.", param="model")
