"""The registry: which digest a name, alias or version of a tenant means.

Versions are immutable integers per name, counted from 1 and never used twice. Aliases move by compare-and-swap.
Deletion is soft: rows stay, references stop resolving, and until its bytes are collected a version can be undeleted.
Digests are the identity; a name is only a way to one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, select, update

from adapters import audit
from adapters.aliases import (
    check_canaries,
    check_revision,
    history,
    in_use_by,
    point,
    ready,
    require_alias,
    require_ready,
    resolve_alias,
    roll_back,
)
from adapters.blob_records import BlobRecords
from adapters.errors import Conflict, InvalidRequest, NotFound
from adapters.migrations.access import grants
from adapters.migrations.database import Database
from adapters.migrations.queries import (
    ADAPTERS,
    ALIASES,
    COUNTS,
    LIVE,
    POINTED_AT,
    VERSION_COLUMNS,
    VERSIONS,
    adapter_records,
    find_alias,
    not_found,
    require_version,
)
from adapters.migrations.schema import (
    AdapterPage,
    AdapterRecord,
    AliasMove,
    AliasRecord,
    Status,
    VersionRecord,
    adapters,
    aliases,
    versions,
)
from adapters.names import LATEST, MAX_VERSION, ModelReference, check_digest, check_name

__all__ = [
    "DEFAULT_TENANT",
    "MAX_PAGE",
    "AdapterPage",
    "AdapterRecord",
    "AliasMove",
    "AliasRecord",
    "Registry",
    "Status",
    "VersionRecord",
]

DEFAULT_TENANT = "default"
"""The tenant of single-tenant mode."""

MAX_PAGE = 200
"""The most items that one listing returns."""


class Registry:
    """Versions and aliases of every tenant, in one database. Thread-safe; blocks, so call it off the event loop.

    Every method raises RegistryUnavailable where the database fails, after which nothing has changed, and
    InvalidReference for names outside the grammar. `clock` gives Unix seconds. Whatever changes something writes
    its line of the audit log, naming `actor`, in the same transaction.
    """

    def __init__(
        self, url: str, *, busy_timeout_s: float = 5.0, clock: Callable[[], float] = time.time
    ) -> None:
        """Open the database at `url` (`sqlite:///path`, `postgresql://…`), making or migrating its tables first."""
        self._database = Database(url, busy_timeout_s=busy_timeout_s)
        self._clock = clock
        self.blobs = BlobRecords(self._database, clock)

    def publish(  # noqa: PLR0913  one argument per column
        self,
        tenant: str,
        name: str,
        digest: str,
        *,
        method: str,
        backbone_digest: str,
        task: str,
        size_bytes: int,
        labels: Mapping[str, str],
        proof: Mapping[str, Any],
        status: Status = "ready",
        alias: str | None = None,
        hold: str | None = None,
        actor: str = audit.SYSTEM,
    ) -> VersionRecord:
        """Make `digest` the next version of `name`; a ready one becomes `latest` and, where given, `alias`.

        One transaction, durable once this returns. Where the digest is already a live version of this name (and did
        not fail), that version is returned with `republished` set and only `alias` moves: a retried upload has no
        second effect. `hold` is ended, the hold under which the bytes were stored.
        Raises Conflict where `alias` is wanted for a version that is not ready, StoreError where the bytes are
        collected already.
        """
        check_name(tenant, what="tenant")
        check_name(name)
        check_digest(digest)
        if alias is not None:
            check_name(alias, what="alias")
        with self._database.write() as tx:
            now = self._clock()
            self.blobs.confirm(tx, digest, hold)
            named = and_(adapters.c.tenant == tenant, adapters.c.name == name)
            adapter_id = tx.scalar(select(adapters.c.id).where(named))
            if adapter_id is None:
                row = insert(adapters).values(tenant=tenant, name=name, created_at=now)
                adapter_id = tx.execute(row.returning(adapters.c.id)).scalar_one()
            same = VERSIONS.where(adapters.c.id == adapter_id, versions.c.digest == digest, COUNTS)
            if found := tx.execute(same).one_or_none():
                known = VersionRecord(*found[1:])
                if alias is not None:
                    self._point(tx, adapter_id, alias, ready(known).version)
                    self._log(tx, actor, "alias.set", tenant, f"{name}:{alias}", version=known.version)
                return replace(known, republished=True)
            used = select(func.max(versions.c.version)).where(versions.c.adapter_id == adapter_id)
            record = VersionRecord(
                tenant=tenant,
                name=name,
                version=(tx.scalar(used) or 0) + 1,
                digest=digest,
                status=status,
                method=method,
                backbone_digest=backbone_digest,
                task=task,
                size_bytes=size_bytes,
                labels=dict(labels),
                proof=dict(proof),
                created_at=now,
            )
            values = {column.key: getattr(record, column.key) for column in VERSION_COLUMNS}
            tx.execute(insert(versions).values(adapter_id=adapter_id, **values))
            if status == "ready":
                self._point(tx, adapter_id, LATEST, record.version)
            if alias not in (None, LATEST):
                self._point(tx, adapter_id, alias, ready(record).version)
            facts = {"digest": digest, "status": status, "alias": alias}
            self._log(tx, actor, "version.publish", tenant, f"{name}@v{record.version}", **facts)
        return record

    def finish_validation(
        self,
        tenant: str,
        name: str,
        version: int,
        status: Literal["ready", "failed"],
        *,
        proof: Mapping[str, Any],
        actor: str = audit.SYSTEM,
    ) -> VersionRecord:
        """End the validation of a version published as `validating`, with its final proof.

        A ready one becomes `latest` unless that is newer already. Raises NotFound, and Conflict where the version
        is not `validating`.
        """
        with self._database.write() as tx:
            adapter_id, record = require_version(tx, tenant, name, version)
            if record.status != "validating":
                raise Conflict(
                    f"Version {version} of {name!r} is {record.status}; only a validating one becomes {status}.",
                    param="status",
                )
            row = and_(versions.c.adapter_id == adapter_id, versions.c.version == version)
            tx.execute(update(versions).where(row).values(status=status, proof=dict(proof)))
            self._advance_latest(tx, adapter_id, version, status)
            self._log(tx, actor, "version.validate", tenant, f"{name}@v{version}", status=status)
        return replace(record, status=status, proof=dict(proof))

    def resolve(
        self, reference: ModelReference, *, default_tenant: str = DEFAULT_TENANT, unit: str | None = None
    ) -> VersionRecord:
        """The live version that `reference` means; `default_tenant` where it names no tenant.

        `unit`: on whose behalf, by which an alias with canaries chooses (see `aliases`); its main version without
        one. It may be `validating` or `failed`, except through an alias. One query, for a canary two.
        Raises NotFound.
        """
        tenant = reference.tenant if reference.tenant is not None else default_tenant
        query = VERSIONS.where(adapters.c.tenant == tenant, adapters.c.name == reference.name)
        if reference.version is not None:
            query = query.where(versions.c.version == reference.version)
        elif reference.digest is not None:  # several only where uploads failed before one that did not
            query = query.where(versions.c.digest == reference.digest)
            query = query.order_by(versions.c.version.desc()).limit(1)
        else:
            query = query.join(aliases, POINTED_AT).where(aliases.c.alias == reference.alias)
            query = query.add_columns(aliases.c.canaries)
        with self._database.read() as tx:
            row = tx.execute(query).one_or_none()
            if row is None:
                raise not_found(reference)
            if reference.alias is not None:
                return resolve_alias(tx, row, reference.alias, unit)
        return VersionRecord(*row[1:])

    def list_adapters(self, tenant: str, *, limit: int = 100, after: str | None = None) -> AdapterPage:
        """Up to `limit` adapters of `tenant` in the order of their names, beginning behind the name `after`."""
        _check_between("limit", limit, MAX_PAGE)
        query = ADAPTERS.where(adapters.c.tenant == check_name(tenant, what="tenant"))
        if after is not None:
            query = query.where(adapters.c.name > check_name(after, what="after"))
        with self._database.read() as tx:
            rows = tx.execute(query.order_by(adapters.c.name).limit(limit + 1)).all()
            items = adapter_records(tx, rows[:limit])
        return AdapterPage(items, items[-1].name if len(rows) > limit else None)

    def get_adapter(self, tenant: str, name: str) -> AdapterRecord:
        """The adapter with this name. Raises NotFound."""
        reference = ModelReference(tenant, name)
        query = ADAPTERS.where(adapters.c.tenant == tenant, adapters.c.name == name)
        with self._database.read() as tx:
            found = adapter_records(tx, tx.execute(query).all())
        if not found:
            raise not_found(reference)
        return found[0]

    def get_version(self, tenant: str, name: str, version: int) -> VersionRecord:
        """One live version. Raises NotFound."""
        return self.resolve(ModelReference(tenant, name, version=version))

    def list_versions(
        self, tenant: str, name: str, *, limit: int = 100, before: int | None = None
    ) -> tuple[VersionRecord, ...]:
        """Up to `limit` live versions, newest first, beginning below the number `before`. Raises NotFound."""
        _check_between("limit", limit, MAX_PAGE)
        reference = ModelReference(tenant, name)
        if before is not None:
            _check_between("before", before, MAX_VERSION)
        query = VERSIONS.where(adapters.c.tenant == tenant, adapters.c.name == name)
        page = query if before is None else query.where(versions.c.version < before)
        with self._database.read() as tx:
            if tx.execute(query.limit(1)).one_or_none() is None:
                raise not_found(reference)
            rows = tx.execute(page.order_by(versions.c.version.desc()).limit(limit)).all()
        return tuple(VersionRecord(*row[1:]) for row in rows)

    def set_alias(
        self,
        tenant: str,
        name: str,
        alias: str,
        version: int,
        *,
        expected_revision: int | None,
        canaries: Mapping[int, int] | None = None,
        actor: str = audit.SYSTEM,
    ) -> AliasRecord:
        """Point `alias` at a ready version, and `canaries` (version -> percent) of its requests at others.

        `expected_revision`: the revision that the caller has seen, 0 if it saw no such alias, None to move it
        whatever it is. Raises InvalidRequest for the shares, NotFound, and Conflict where the revision is another or
        a version not ready.
        """
        check_name(alias, what="alias")
        shares = dict(canaries or {})
        check_canaries(version, shares)
        with self._database.write() as tx:
            adapter_id, _ = require_ready(tx, tenant, name, (version, *shares))
            check_revision(find_alias(tx, adapter_id, alias), name, alias, expected_revision)
            revision, updated_at = self._point(tx, adapter_id, alias, version, shares)
            facts: dict[str, object] = {"version": version, "revision": revision} | (
                {"canaries": shares} if shares else {}
            )
            self._log(tx, actor, "alias.set", tenant, f"{name}:{alias}", **facts)
        return AliasRecord(tenant, name, alias, version, revision, updated_at, shares)

    def roll_back_alias(
        self,
        tenant: str,
        name: str,
        alias: str,
        *,
        expected_revision: int | None,
        actor: str = audit.SYSTEM,
    ) -> AliasRecord:
        """End the canary of `alias`, or where it has none, return it to the version that it pointed at before.

        Raises NotFound, and Conflict where the revision is another or nothing is left to return to.
        """
        check_name(alias, what="alias")
        with self._database.write() as tx:
            adapter_id = self._adapter_id(tx, tenant, name)
            current = require_alias(tx, name, adapter_id, alias)
            check_revision(current, name, alias, expected_revision)
            version, revision, updated_at = roll_back(tx, tenant, name, current, adapter_id, self._clock())
            facts = {"version": version, "revision": revision}
            self._log(tx, actor, "alias.rollback", tenant, f"{name}:{alias}", **facts)
        return AliasRecord(tenant, name, alias, version, revision, updated_at)

    def alias_history(self, tenant: str, name: str, alias: str, *, limit: int = 100) -> tuple[AliasMove, ...]:
        """The newest `limit` moves of an alias, newest first. Raises NotFound for one that was never set."""
        _check_between("limit", limit, MAX_PAGE)
        check_name(alias, what="alias")
        with self._database.read() as tx:
            moves = history(tx, self._adapter_id(tx, tenant, name), alias, limit=limit)
        if not moves:
            raise NotFound(f"{name!r} has no alias {alias!r}.", param="alias")
        return moves

    def delete_version(
        self, tenant: str, name: str, version: int, *, actor: str = audit.SYSTEM
    ) -> VersionRecord:
        """Delete one version and return it. `latest`, if it was that, falls back to the newest ready one left.

        Raises NotFound, and Conflict naming the aliases, other than `latest`, that point at the version.
        """
        with self._database.write() as tx:
            adapter_id, record = require_version(tx, tenant, name, version)
            mains, canaries = in_use_by(tx, adapter_id, version)
            if held := sorted((mains - {LATEST}) | canaries):
                raise Conflict(
                    f"Version {version} of {name!r} is in use by alias {', '.join(map(repr, held))}.",
                    param="version",
                    remedy="Move the alias to another version first, or delete the whole adapter.",
                )
            self._delete(tx, versions.c.adapter_id == adapter_id, versions.c.version == version)
            if LATEST in mains:
                ready = select(func.max(versions.c.version)).where(
                    versions.c.adapter_id == adapter_id, LIVE, versions.c.status == "ready"
                )
                self._point(tx, adapter_id, LATEST, tx.scalar(ready))
            self._log(tx, actor, "version.delete", tenant, f"{name}@v{version}", digest=record.digest)
        return record

    def undelete_version(
        self, tenant: str, name: str, version: int, *, actor: str = audit.SYSTEM
    ) -> VersionRecord:
        """Undo the deletion of one version; a ready one becomes `latest` unless that is newer. Returns it.

        Raises NotFound where no such version was deleted, Conflict where another live one has the same content,
        and StoreError where the bytes are collected.
        """
        reference = ModelReference(tenant, name, version=version)
        named = and_(adapters.c.tenant == tenant, adapters.c.name == name)
        with self._database.write() as tx:
            mine = and_(versions.c.adapter_id == adapters.c.id, versions.c.version == version)
            query = select(adapters.c.id, versions.c.digest, versions.c.status).join_from(
                adapters, versions, mine
            )
            gone = tx.execute(query.where(named, versions.c.deleted_at.is_not(None))).one_or_none()
            if gone is None:
                raise not_found(reference)
            same = VERSIONS.where(adapters.c.id == gone.id, versions.c.digest == gone.digest)
            if gone.status != "failed" and (found := tx.execute(same.where(COUNTS)).one_or_none()):
                raise Conflict(
                    f"Version {found.version} of {name!r} has the same content as {version}.", param="version"
                )
            self.blobs.confirm(tx, gone.digest, None)
            row = and_(versions.c.adapter_id == gone.id, versions.c.version == version)
            tx.execute(update(versions).where(row).values(deleted_at=None))
            self._advance_latest(tx, gone.id, version, gone.status)
            self._log(tx, actor, "version.undelete", tenant, f"{name}@v{version}", digest=gone.digest)
            return require_version(tx, tenant, name, version)[1]

    def delete_adapter(
        self, tenant: str, name: str, *, actor: str = audit.SYSTEM
    ) -> tuple[VersionRecord, ...]:
        """Delete every version, alias and grant of `name`; returns the versions, newest first. Raises NotFound."""
        reference = ModelReference(tenant, name)
        query = VERSIONS.where(adapters.c.tenant == tenant, adapters.c.name == name)
        with self._database.write() as tx:
            rows = tx.execute(query.order_by(versions.c.version.desc())).all()
            if not rows:
                raise not_found(reference)
            adapter_id = rows[0].id
            self._delete(tx, versions.c.adapter_id == adapter_id)
            for alias in tx.execute(ALIASES.where(adapters.c.id == adapter_id)).all():
                self._point(tx, adapter_id, alias.alias, None)
            # the name may be used again, for something that was never meant to be shared
            tx.execute(delete(grants).where(grants.c.owner == tenant, grants.c.adapter == name))
            self._log(tx, actor, "adapter.delete", tenant, name, versions=[row.version for row in rows])
        return tuple(VersionRecord(*row[1:]) for row in rows)

    def versions_of(self, tenant: str, digests: Collection[str]) -> dict[str, list[str]]:
        """`name@vN` of every live version of a tenant's that has one of these contents, by digest, in their order."""
        found: dict[str, list[str]] = {}
        query = VERSIONS.where(adapters.c.tenant == tenant, versions.c.digest.in_(digests))
        with self._database.read() as tx:
            for row in tx.execute(query.order_by(adapters.c.name, versions.c.version)) if digests else ():
                found.setdefault(row.digest, []).append(f"{row.name}@v{row.version}")
        return found

    def live_digests(self) -> frozenset[str]:
        """Every digest that a live version of any tenant refers to, whatever its status."""
        with self._database.read() as tx:
            return frozenset(tx.scalars(select(versions.c.digest).where(LIVE).distinct()))

    def ping(self) -> None:
        """Read one row. Raises RegistryUnavailable where that fails."""
        with self._database.read() as tx:
            tx.execute(select(adapters.c.id).limit(1)).all()

    def close(self) -> None:
        """Close the database; for use when no call is in progress."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _point(
        self,
        tx: Connection,
        adapter_id: int,
        alias: str,
        version: int | None,
        canaries: Mapping[int, int] | None = None,
    ) -> tuple[int, float]:
        return point(tx, adapter_id, alias, version, self._clock(), canaries=canaries)

    def _adapter_id(self, tx: Connection, tenant: str, name: str) -> int:
        """The id of an adapter with a live version. Raises NotFound, InvalidReference."""
        reference = ModelReference(tenant, name)  # before the database sees the name
        query = ADAPTERS.where(adapters.c.tenant == tenant, adapters.c.name == name)
        row = tx.execute(query).one_or_none()
        if row is None:
            raise not_found(reference)
        return int(row.id)

    def _advance_latest(self, tx: Connection, adapter_id: int, version: int, status: str) -> None:
        latest = find_alias(tx, adapter_id, LATEST)
        if status == "ready" and (latest is None or latest.version < version):
            self._point(tx, adapter_id, LATEST, version)

    def _log(
        self, tx: Connection, actor: str, action: str, tenant: str, subject: str, **details: object
    ) -> None:
        entry = audit.Entry(self._clock(), actor, action, tenant, subject, details)
        audit.append(tx, entry)

    def _delete(self, tx: Connection, *which: ColumnElement[bool]) -> None:
        tx.execute(update(versions).where(*which, LIVE).values(deleted_at=self._clock()))


def _check_between(what: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise InvalidRequest(f"{what} is {value}; expected 1 to {most}.", param=what)
