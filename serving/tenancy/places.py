"""Places: how many requests of a tenant may be in progress at once.

A place is taken before a request runs and freed at its end. In the database it is a row that expires unless its
gateway, every few seconds, puts that off: what a killed gateway held is free again LEASE_S later at most.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from anyio import to_thread
from sqlalchemy import delete, func, insert, select, update

from adapters.errors import DeltamuxError, RateLimited
from adapters.migrations.access import places
from adapters.migrations.database import Database

log = logging.getLogger(__name__)

LEASE_S = 15.0
RETRY_AFTER_S = 1.0


class Places(Protocol):
    """Counts requests in progress. `limit` None: no bound."""

    async def take(self, tenant: str, place: str, limit: int | None) -> None:
        """Take `place`, an id that nobody else uses. Raises RateLimited where `limit` are taken already."""
        ...

    def free(self, tenant: str, place: str) -> None:
        """Give back what was taken. Never blocks, never fails."""
        ...

    def stop(self) -> None:
        """Write what is left. The last call."""
        ...


class ProcessPlaces:
    """Counts in this process: exact here, and with G gateways up to G times a limit in all. Use from one event loop."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()

    async def take(self, tenant: str, place: str, limit: int | None) -> None:  # noqa: ARG002
        """See `Places`. Does not wait, so is never interrupted between its check and its taking."""
        if limit is not None and self._taken[tenant] >= limit:
            raise _full(limit)
        self._taken[tenant] += 1

    def free(self, tenant: str, place: str) -> None:  # noqa: ARG002
        """See `Places`."""
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]

    def stop(self) -> None:
        """See `Places`."""


class DatabasePlaces:
    """Counts in the database: never more than the limit for all gateways together, for a transaction a request.

    Requests of tenants without a limit are not counted, so one that is set counts those that come after it. A gateway
    that can't reach the database for `lease_s` is taken for dead: its requests run on and are no longer counted.
    Clocks of gateways (`clock`: Unix seconds) may differ by up to two thirds of `lease_s`.

    Freed places are given back by a thread, together; one that is taken in this process meanwhile knows of them.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float], lease_s: float = LEASE_S) -> None:
        self._database = database
        self._clock = clock
        self._lease_s = lease_s
        self._held: set[str] = set()
        self._freed: set[str] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False

    async def take(self, tenant: str, place: str, limit: int | None) -> None:
        """See `Places`. Raises RegistryUnavailable."""
        if limit is not None:
            await to_thread.run_sync(self._take, tenant, place, limit)

    def free(self, tenant: str, place: str) -> None:  # noqa: ARG002
        """See `Places`."""
        with self._changed:
            if place in self._held:
                self._held.remove(place)
                self._freed.add(place)
                self._changed.notify()

    def stop(self) -> None:
        """See `Places`."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _take(self, tenant: str, place: str, limit: int) -> None:
        with self._changed:
            freed = list(self._freed)
        now = self._clock()
        ended = places.c.id.in_(freed) | ((places.c.tenant == tenant) & (places.c.expires_at <= now))
        with self._database.write() as tx:  # no other writer until its end: count and insertion are one step
            tx.execute(delete(places).where(ended))
            taken = tx.scalar(select(func.count()).where(places.c.tenant == tenant)) or 0
            if taken < limit:
                row = {"id": place, "tenant": tenant, "expires_at": now + self._lease_s}
                tx.execute(insert(places).values(row))
        with self._changed:
            self._freed.difference_update(freed)
            if taken < limit:
                self._held.add(place)
                self._start()
                self._changed.notify()
        if taken >= limit:
            raise _full(limit)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="places", daemon=True)
            self._thread.start()

    def _keep(self) -> None:
        """Give freed places back, and put off the end of those that are held, until told to stop."""
        every_s = self._lease_s / 3
        due = time.monotonic() + every_s
        while True:
            with self._changed:
                while not (self._freed or self._stopping):
                    left_s = due - time.monotonic()
                    if self._held and left_s <= 0:
                        break
                    self._changed.wait(left_s if self._held else None)
                freed, held, stopping = list(self._freed), list(self._held), self._stopping
            try:
                self._write(freed, held)
            except DeltamuxError as error:
                log.warning("places could not be written: %s", type(error).__name__)
                if stopping:
                    return
                time.sleep(every_s / 10)
                continue
            due = time.monotonic() + every_s
            with self._changed:
                self._freed.difference_update(freed)
            if stopping:
                return

    def _write(self, freed: list[str], held: list[str]) -> None:
        with self._database.write() as tx:
            tx.execute(delete(places).where(places.c.id.in_(freed)))
            later = {"expires_at": self._clock() + self._lease_s}
            tx.execute(update(places).where(places.c.id.in_(held)).values(later))


def _full(limit: int) -> RateLimited:
    return RateLimited(
        f"{limit} requests of this tenant are in progress, which is its limit.",
        retry_after_s=RETRY_AFTER_S,
        remedy="Wait for one of them to end.",
    )
