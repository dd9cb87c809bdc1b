"""The registry: which digest a name, alias or version of a tenant means.

Versions are immutable integers per name, counted from 1 and never used twice. Aliases move by compare-and-swap.
Deletion is soft: rows stay, references stop resolving, and until its bytes are collected a version can be undeleted.
Digests are the identity; a name is only a way to one.

Here are transactions and the audit log; what they do beside publishing is in `reading`, `deletion` and `aliases`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

from sqlalchemy import Connection, and_, func, insert, select, update

from adapters import audit, deletion, quotas, reading
from adapters.aliases import (
    advance_latest,
    check_canaries,
    check_revision,
    history,
    point,
    ready,
    require_alias,
    require_ready,
    roll_back,
)
from adapters.blob_records import BlobRecords
from adapters.errors import Conflict, NotFound
from adapters.idempotency import IdempotencyKeys
from adapters.migrations.database import Database
from adapters.migrations.queries import (
    COUNTS,
    VERSION_COLUMNS,
    VERSIONS,
    find_alias,
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
    versions,
)
from adapters.names import LATEST, ModelReference, check_digest, check_name
from adapters.quotas import UNLIMITED, Quota, check_version
from adapters.reading import MAX_PAGE
from adapters.upload_records import UploadRecords

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
        self.uploads = UploadRecords(self._database, clock)
        self.idempotency = IdempotencyKeys(self._database, clock)

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
        quota: Quota = UNLIMITED,
        actor: str = audit.SYSTEM,
    ) -> VersionRecord:
        """Make `digest` the next version of `name`; a ready one becomes `latest` and, where given, `alias`.

        One transaction, durable once this returns. Where the digest is already a live version of this name (and did
        not fail), that version is returned with `republished` set and only `alias` moves: a retried upload has no
        second effect. `hold` is ended, the hold under which the bytes were stored.
        Raises Conflict where `alias` is wanted for a version that is not ready, StoreError where the bytes are
        collected already, QuotaExceeded for a new version that is more than `quota`.
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
                    point(tx, adapter_id, alias, ready(known).version, now)
                    self._log(tx, actor, "alias.set", tenant, f"{name}:{alias}", version=known.version)
                return replace(known, republished=True)
            check_version(tx, quota, tenant, name, digest, size_bytes)
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
                point(tx, adapter_id, LATEST, record.version, now)
            if alias not in (None, LATEST):
                point(tx, adapter_id, alias, ready(record).version, now)
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
            advance_latest(tx, adapter_id, version, status, self._clock())
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
        with self._database.read() as tx:
            return reading.resolve(tx, tenant, reference, unit)

    def list_adapters(self, tenant: str, *, limit: int = 100, after: str | None = None) -> AdapterPage:
        """Up to `limit` adapters of `tenant` in the order of their names, beginning behind the name `after`."""
        with self._database.read() as tx:
            return reading.list_adapters(tx, tenant, limit=limit, after=after)

    def get_adapter(self, tenant: str, name: str) -> AdapterRecord:
        """The adapter with this name. Raises NotFound."""
        with self._database.read() as tx:
            return reading.get_adapter(tx, tenant, name)

    def get_version(self, tenant: str, name: str, version: int) -> VersionRecord:
        """One live version. Raises NotFound."""
        return self.resolve(ModelReference(tenant, name, version=version))

    def list_versions(
        self, tenant: str, name: str, *, limit: int = 100, before: int | None = None
    ) -> tuple[VersionRecord, ...]:
        """Up to `limit` live versions, newest first, beginning below the number `before`. Raises NotFound."""
        with self._database.read() as tx:
            return reading.list_versions(tx, tenant, name, limit=limit, before=before)

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
            revision, updated_at = point(tx, adapter_id, alias, version, self._clock(), canaries=shares)
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
            adapter_id = reading.adapter_id(tx, tenant, name)
            current = require_alias(tx, name, adapter_id, alias)
            check_revision(current, name, alias, expected_revision)
            version, revision, updated_at = roll_back(tx, tenant, name, current, adapter_id, self._clock())
            facts = {"version": version, "revision": revision}
            self._log(tx, actor, "alias.rollback", tenant, f"{name}:{alias}", **facts)
        return AliasRecord(tenant, name, alias, version, revision, updated_at)

    def alias_history(self, tenant: str, name: str, alias: str, *, limit: int = 100) -> tuple[AliasMove, ...]:
        """The newest `limit` moves of an alias, newest first. Raises NotFound for one that was never set."""
        reading.check_between("limit", limit, MAX_PAGE)
        check_name(alias, what="alias")
        with self._database.read() as tx:
            moves = history(tx, reading.adapter_id(tx, tenant, name), alias, limit=limit)
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
            record = deletion.delete_version(tx, tenant, name, version, now=self._clock())
            self._log(tx, actor, "version.delete", tenant, f"{name}@v{version}", digest=record.digest)
        return record

    def check_room(self, tenant: str, name: str, quota: Quota) -> None:
        """Raises QuotaExceeded where `name` would be one more adapter than `tenant` may have, whatever its content."""
        with self._database.read() as tx:
            quotas.check_name(tx, quota, tenant, name)

    def undelete_version(
        self, tenant: str, name: str, version: int, *, quota: Quota = UNLIMITED, actor: str = audit.SYSTEM
    ) -> VersionRecord:
        """Undo the deletion of one version; a ready one becomes `latest` unless that is newer. Returns it.

        Raises NotFound where no such version was deleted, Conflict where another live one has the same content,
        StoreError where the bytes are collected, and QuotaExceeded.
        """
        with self._database.write() as tx:
            record = deletion.undelete_version(
                tx, tenant, name, version, blobs=self.blobs, quota=quota, now=self._clock()
            )
            self._log(tx, actor, "version.undelete", tenant, f"{name}@v{version}", digest=record.digest)
        return record

    def delete_adapter(
        self, tenant: str, name: str, *, actor: str = audit.SYSTEM
    ) -> tuple[VersionRecord, ...]:
        """Delete every version, alias and grant of `name`; returns the versions, newest first. Raises NotFound."""
        with self._database.write() as tx:
            deleted = deletion.delete_adapter(tx, tenant, name, now=self._clock())
            self._log(tx, actor, "adapter.delete", tenant, name, versions=[item.version for item in deleted])
        return deleted

    def versions_of(self, tenant: str, digests: Collection[str]) -> dict[str, list[str]]:
        """`name@vN` of every live version of a tenant's that has one of these contents, by digest, in their order."""
        with self._database.read() as tx:
            return reading.versions_of(tx, tenant, digests)

    def live_digests(self) -> frozenset[str]:
        """Every digest that a live version of any tenant refers to, whatever its status."""
        with self._database.read() as tx:
            return reading.live_digests(tx)

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

    def _log(
        self, tx: Connection, actor: str, action: str, tenant: str, subject: str, **details: object
    ) -> None:
        entry = audit.Entry(self._clock(), actor, action, tenant, subject, details)
        audit.append(tx, entry)
