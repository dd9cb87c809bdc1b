"""Grants: a tenant lets another one, or all, use a delta of its own. Without one a delta is private."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection, Exists, Select, delete, exists, insert, select

from adapters import audit
from adapters.errors import InvalidRequest
from adapters.migrations.access import grants
from adapters.migrations.database import Database
from adapters.migrations.queries import LIVE, not_found
from adapters.migrations.schema import adapters, versions
from adapters.names import ModelReference, check_name

EVERYONE = "*"
"""The grantee of a shared delta; no tenant can have this name."""
MAX_GRANTS = 1000
"""Grantees of one delta: what a tenant may write here is bounded."""


class Grants:
    """Every grant, in the registry's database. Thread-safe; blocks.

    A grant lets its grantee use the delta by `owner/name`, whatever version; it never lets it change or pass it on.
    Every method raises RegistryUnavailable where the database fails. `actor`: as in `audit.Entry`.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def grant(self, owner: str, adapter: str, grantee: str, *, actor: str) -> None:
        """Let `grantee` use a live delta of `owner`; once more changes nothing.

        A name that no tenant has is taken like any other: an owner must not learn who else is a tenant here. Raises
        NotFound for the delta, InvalidReference for what is no name, InvalidRequest where the grantee is the owner
        or MAX_GRANTS are reached.
        """
        if grantee == owner:
            raise InvalidRequest("tenant: got the owner, who needs no grant.", param="tenant")
        if grantee != EVERYONE:
            check_name(grantee, what="tenant")
        with self._database.write() as tx:
            _require_adapter(tx, owner, adapter)
            grantees = set(tx.scalars(_of(owner, adapter)))
            if grantee in grantees:
                return
            if len(grantees) >= MAX_GRANTS:
                raise InvalidRequest(
                    f"tenant: {len(grantees)} have a grant for this delta, which is the most.",
                    param="tenant",
                    remedy=f"Withdraw one, or grant it to everyone ({EVERYONE}).",
                )
            now = self._clock()
            row = {"owner": owner, "adapter": adapter, "grantee": grantee, "created_at": now}
            tx.execute(insert(grants).values(row))
            audit.append(tx, audit.Entry(now, actor, "grant.create", owner, adapter, {"grantee": grantee}))

    def withdraw(self, owner: str, adapter: str, grantee: str, *, actor: str) -> bool:
        """Take a grant back; False where there was none. Requests in progress end as they began."""
        with self._database.write() as tx:
            row = delete(grants).where(
                grants.c.owner == owner, grants.c.adapter == adapter, grants.c.grantee == grantee
            )
            if not tx.execute(row).rowcount:
                return False
            entry = audit.Entry(self._clock(), actor, "grant.withdraw", owner, adapter, {"grantee": grantee})
            audit.append(tx, entry)
        return True

    def of(self, owner: str, adapter: str) -> list[str]:
        """The grantees of a live delta, sorted. Raises NotFound."""
        with self._database.read() as tx:
            _require_adapter(tx, owner, adapter)
            return sorted(tx.scalars(_of(owner, adapter)))

    def covers(self, owner: str, adapter: str, tenant: str) -> bool:
        """Whether `tenant` may use `owner`/`adapter`. Reads grants only: it takes as long for what does not exist."""
        with self._database.read() as tx:
            return bool(tx.scalar(select(_found(owner, adapter, tenant, EVERYONE))))

    def to(self, tenant: str) -> list[tuple[str, str]]:
        """(owner, name) of every delta of others that `tenant` may use, sorted."""
        query = select(grants.c.owner, grants.c.adapter).distinct()
        query = query.where(grants.c.grantee.in_([tenant, EVERYONE]), grants.c.owner != tenant)
        with self._database.read() as tx:
            return sorted((row.owner, row.adapter) for row in tx.execute(query))


def _of(owner: str, adapter: str) -> Select[str]:
    return select(grants.c.grantee).where(grants.c.owner == owner, grants.c.adapter == adapter)


def _found(owner: str, adapter: str, *grantees: str) -> Exists:
    return exists().where(
        grants.c.owner == owner, grants.c.adapter == adapter, grants.c.grantee.in_(grantees)
    )


def _require_adapter(tx: Connection, owner: str, adapter: str) -> None:
    live = exists().where(
        adapters.c.tenant == owner, adapters.c.name == adapter, versions.c.adapter_id == adapters.c.id, LIVE
    )
    if not tx.scalar(select(live)):
        raise not_found(ModelReference(owner, adapter))
