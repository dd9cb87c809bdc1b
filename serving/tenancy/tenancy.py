"""Everything about tenants over one database, opened together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from adapters import audit
from adapters.migrations.database import Database
from adapters.registry import DEFAULT_TENANT
from serving.config import Settings
from serving.tenancy.buckets import Buckets, DatabaseBuckets, ProcessBuckets
from serving.tenancy.grants import Grants
from serving.tenancy.keyring import Keyring
from serving.tenancy.keys import read_secret
from serving.tenancy.ledger import Closed, Group, Ledger, report
from serving.tenancy.places import DatabasePlaces, Places, ProcessPlaces
from serving.tenancy.principal import Principal
from serving.tenancy.signers import Signers
from serving.tenancy.tenants import Tenants


class Tenancy:
    """Tenants, keys, grants, limits and the ledger. Thread-safe.

    It blocks, apart from buckets, places and ledger, so call it off the event loop. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        busy_timeout_s: float = 5.0,
        clock: Callable[[], float] = time.time,
        on_closed: Closed = lambda _outcome, _tokens: None,
    ) -> None:
        """Open the database that the settings name. `on_closed`: see `Ledger`.

        Raises RegistryUnavailable, and Unavailable for the secret.
        """
        secret = read_secret(settings.auth.secret_file)
        self._database = Database(settings.database.url, busy_timeout_s=busy_timeout_s)
        self.tenants = Tenants(self._database, clock=clock)
        self.keys = Keyring(self._database, secret, clock=clock)
        self.grants = Grants(self._database, clock=clock)
        self.signers = Signers(self._database, clock=clock)
        self.buckets: Buckets
        self.places: Places
        if settings.limits.counted_in == "process":
            self.buckets, self.places = ProcessBuckets(clock=clock), ProcessPlaces()
        else:
            self.buckets = DatabaseBuckets(self._database, clock=clock)
            self.places = DatabasePlaces(self._database, clock=clock)
        self.ledger = Ledger(self._database, clock=clock, on_closed=on_closed)

    def caller(self, key: str | None) -> Principal:
        """Who calls with `key`: while there has never been a key, DEFAULT_TENANT with every scope.

        Raises Unauthenticated.
        """
        if not self.keys.any():
            return self.keys.open_principal(DEFAULT_TENANT)
        return self.keys.authenticate(key)

    def usage(
        self, by: Sequence[Group], *, where: Mapping[Group, str], start: float, end: float, limit: int
    ) -> list[dict[str, Any]]:
        """Sums over the ledger; see `ledger.report`."""
        with self._database.read() as tx:
            return report(tx, by, where=where, start=start, end=end, limit=limit)

    def audit_lines(self, *, limit: int) -> list[audit.Line]:
        """The newest `limit` lines of the audit log, newest first."""
        with self._database.read() as tx:
            return audit.lines(tx, limit=limit)

    def verify_audit(self, *, expected: str | None = None) -> audit.Verdict:
        """Whether the audit log is what was written; see `audit.verify`."""
        with self._database.read() as tx:
            return audit.verify(tx, expected=expected)

    def close(self) -> None:
        """Write what ledger and places still hold, and close the database; for use when no call is in progress."""
        self.places.stop()
        self.ledger.stop()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
