"""Tenants and their limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from adapters import audit
from adapters.errors import Conflict, NotFound
from adapters.migrations.access import buckets, tenants
from adapters.migrations.database import Database
from adapters.names import check_name
from serving.core import ServiceClass
from serving.tenancy.buckets import FULL, Kind
from serving.tenancy.principal import BOUNDS, Limits


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant. Times are Unix seconds; a disabled one's keys are refused."""

    name: str
    created_at: float
    disabled_at: float | None
    limits: Limits


class Tenants:
    """Every tenant, in the registry's database. Thread-safe; blocks.

    Every method raises RegistryUnavailable where the database fails. `actor`: as in `audit.Entry`.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def create(self, name: str, limits: Limits, *, actor: str) -> Tenant:
        """Add a tenant. Raises InvalidReference, and Conflict where there is one of this name."""
        check_name(name, what="tenant")
        made = Tenant(name, self._clock(), None, limits)
        try:
            with self._database.write() as tx:
                tx.execute(insert(tenants).values(name=name, created_at=made.created_at, **asdict(limits)))
                tx.execute(insert(buckets), [{"tenant": name, "kind": kind, **FULL} for kind in Kind])
                audit.append(
                    tx, audit.Entry(made.created_at, actor, "tenant.create", name, name, asdict(limits))
                )
        except IntegrityError:
            raise Conflict(f"The tenant {name!r} exists already.", param="tenant") from None
        return made

    def list(self) -> list[Tenant]:
        """Every tenant, by name."""
        with self._database.read() as tx:
            return [_tenant(row) for row in tx.execute(select(tenants).order_by(tenants.c.name))]

    def get(self, name: str) -> Tenant:
        """One tenant. Raises NotFound."""
        with self._database.read() as tx:
            return require_tenant(tx, name)

    def set_limits(self, name: str, limits: Limits, *, actor: str) -> Tenant:
        """Replace a tenant's limits; they hold for its next request. Raises NotFound."""
        with self._database.write() as tx:
            require_tenant(tx, name)
            tx.execute(update(tenants).where(tenants.c.name == name).values(**asdict(limits)))
            entry = audit.Entry(self._clock(), actor, "tenant.limits", name, name, asdict(limits))
            audit.append(tx, entry)
            return require_tenant(tx, name)

    def set_disabled(self, name: str, disabled: bool, *, actor: str) -> Tenant:
        """Refuse, or take again, every key of a tenant. Its deltas stay. Raises NotFound."""
        with self._database.write() as tx:
            require_tenant(tx, name)
            now = self._clock()
            values = {"disabled_at": now if disabled else None}
            tx.execute(update(tenants).where(tenants.c.name == name).values(values))
            action = "tenant.disable" if disabled else "tenant.enable"
            audit.append(tx, audit.Entry(now, actor, action, name, name, {}))
            return require_tenant(tx, name)


def require_tenant(tx: Connection, name: str) -> Tenant:
    """The tenant of this name. Raises NotFound."""
    row = tx.execute(select(tenants).where(tenants.c.name == name)).one_or_none()
    if row is None:
        raise NotFound(f"The tenant {check_name(name, what='tenant')!r} does not exist.", param="tenant")
    return _tenant(row)


def limits_of(row: Row[Any]) -> Limits:
    """The limits in a row that has the columns of `tenants`."""
    return Limits(
        **{name: getattr(row, name) for name in BOUNDS},
        weight=row.weight,
        service_class=ServiceClass(row.service_class),
    )


def _tenant(row: Row[Any]) -> Tenant:
    return Tenant(row.name, row.created_at, row.disabled_at, limits_of(row))
