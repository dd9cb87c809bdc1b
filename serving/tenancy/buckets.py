"""Rates: what a tenant may take per minute, as token buckets.

A bucket holds at most one minute's limit and refills evenly. A request takes one from `requests` and, from `tokens`,
what it could come to at most; what it did not use is given back at its end. So at no moment has more been promised
than the limit: counting afterwards would let through whatever arrives before the first count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from anyio import to_thread
from sqlalchemy import ColumnElement, Connection, case, literal, select, update

from adapters.errors import QuotaExceeded, RateLimited
from adapters.migrations.access import buckets
from adapters.migrations.database import Database

PERIOD_S = 60.0
FULL = {"level": 1e18, "at": 0.0}
"""The columns of a bucket that is full, whatever its limit."""


class Kind(StrEnum):
    """What is counted."""

    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Share:
    """What one request takes of one kind. `limit`: per minute."""

    kind: Kind
    limit: int
    cost: int


@dataclass(frozen=True, slots=True)
class Standing:
    """A bucket after a request was counted, or refused. `reset_s`: until it is full again."""

    limit: int
    remaining: int
    reset_s: float

    @classmethod
    def of(cls, limit: int, level: float) -> Standing:
        """The standing at this level, which is below zero where more was used than was promised."""
        return cls(limit, max(0, int(level)), (limit - level) / limit * PERIOD_S)


Standings = Mapping[Kind, Standing]


class Buckets(Protocol):
    """Counts what tenants take. `clock`s give Unix seconds."""

    async def take(self, tenant: str, shares: Sequence[Share]) -> Standings:
        """Take all of `shares`, or none. Raises QuotaExceeded where a cost is more than its limit, RateLimited."""
        ...

    async def give(self, tenant: str, shares: Sequence[Share]) -> None:
        """Give back a part of what was taken; a negative cost takes what was used beyond it."""
        ...

    async def standings(self, tenant: str, shares: Sequence[Share]) -> Standings:
        """How things stand, taking nothing."""
        ...


class ProcessBuckets:
    """Counts in this process: exact here, and with G gateways up to G times a limit in all.

    Use from one event loop. No method waits, so none is ever interrupted between its check and its taking.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._levels: dict[tuple[str, Kind], tuple[float, float]] = {}  # level, at

    async def take(self, tenant: str, shares: Sequence[Share]) -> Standings:
        """See `Buckets`."""
        levels = self._refilled(tenant, shares)
        for share in shares:
            _check(share, levels[share.kind])
        return self._set(tenant, shares, {share.kind: levels[share.kind] - share.cost for share in shares})

    async def give(self, tenant: str, shares: Sequence[Share]) -> None:
        """See `Buckets`."""
        levels = self._refilled(tenant, shares)
        back = {share.kind: min(share.limit, levels[share.kind] + share.cost) for share in shares}
        self._set(tenant, shares, back)

    async def standings(self, tenant: str, shares: Sequence[Share]) -> Standings:
        """See `Buckets`."""
        levels = self._refilled(tenant, shares)
        return {share.kind: Standing.of(share.limit, levels[share.kind]) for share in shares}

    def _refilled(self, tenant: str, shares: Sequence[Share]) -> dict[Kind, float]:
        now = self._clock()
        found = {}
        for share in shares:
            level, at = self._levels.get((tenant, share.kind), (share.limit, now))
            found[share.kind] = min(share.limit, level + max(0.0, now - at) * share.limit / PERIOD_S)
        return found

    def _set(self, tenant: str, shares: Sequence[Share], levels: Mapping[Kind, float]) -> Standings:
        now = self._clock()
        for kind, level in levels.items():
            self._levels[tenant, kind] = level, now
        return {share.kind: Standing.of(share.limit, levels[share.kind]) for share in shares}


class DatabaseBuckets:
    """Counts in the database: exact for all gateways together, for a transaction a request.

    The check and the taking are one conditional UPDATE, whoever else writes. Gateways whose clocks differ by d see
    at most limit * d / 60 more or less.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    async def take(self, tenant: str, shares: Sequence[Share]) -> Standings:
        """See `Buckets`. Raises RegistryUnavailable."""
        return await to_thread.run_sync(self._take, tenant, shares)

    async def give(self, tenant: str, shares: Sequence[Share]) -> None:
        """See `Buckets`. Raises RegistryUnavailable."""
        await to_thread.run_sync(self._give, tenant, shares)

    async def standings(self, tenant: str, shares: Sequence[Share]) -> Standings:
        """See `Buckets`. Raises RegistryUnavailable."""
        return await to_thread.run_sync(self._standings, tenant, shares)

    def _take(self, tenant: str, shares: Sequence[Share]) -> Standings:
        now = self._clock()
        found = {}
        with self._database.write() as tx:  # an exception undoes the shares that were taken before it
            for share in shares:
                level = _refilled(share, now)
                enough = _row(tenant, share) & (level >= share.cost)
                values = {"level": level - share.cost, "at": _later(now)}
                left = tx.scalar(update(buckets).where(enough).values(values).returning(buckets.c.level))
                if left is None:
                    _check(share, _level(tx, tenant, share, now))
                    raise AssertionError("a bucket that has enough gave nothing")
                found[share.kind] = Standing.of(share.limit, left)
        return found

    def _give(self, tenant: str, shares: Sequence[Share]) -> None:
        now = self._clock()
        with self._database.write() as tx:
            for share in shares:
                level = _least(_refilled(share, now) + share.cost, literal(float(share.limit)))
                values = {"level": level, "at": _later(now)}
                tx.execute(update(buckets).where(_row(tenant, share)).values(values))

    def _standings(self, tenant: str, shares: Sequence[Share]) -> Standings:
        now = self._clock()
        with self._database.read() as tx:
            return {s.kind: Standing.of(s.limit, _level(tx, tenant, s, now)) for s in shares}


def _check(share: Share, level: float) -> None:
    """Raises what a request is told that wants more than `level`, and how long until there is enough."""
    if share.cost > share.limit:
        raise QuotaExceeded(
            f"The request could take {share.cost} {share.kind}, the limit is {share.limit} per minute.",
            param="max_tokens",
            remedy="Shorten the prompt, or ask for fewer tokens or choices (max_tokens, n).",
        )
    if level < share.cost:
        raise RateLimited(
            f"The limit of {share.limit} {share.kind} per minute is reached: "
            f"{max(0, int(level))} left, {share.cost} needed.",
            retry_after_s=(share.cost - level) / share.limit * PERIOD_S,
            remedy="Wait as long as retry-after says.",
        )


def _row(tenant: str, share: Share) -> ColumnElement[bool]:
    return (buckets.c.tenant == tenant) & (buckets.c.kind == share.kind.value)


def _level(tx: Connection, tenant: str, share: Share, now: float) -> float:
    level = tx.scalar(select(_refilled(share, now)).where(_row(tenant, share)))
    assert level is not None, f"{tenant}: no bucket of {share.kind}"
    return float(level)


def _refilled(share: Share, now: float) -> ColumnElement[float]:
    """The level at `now`, as SQL."""
    elapsed = _later(now) - buckets.c.at
    return _least(buckets.c.level + elapsed * (share.limit / PERIOD_S), literal(float(share.limit)))


def _later(now: float) -> ColumnElement[float]:
    return case((buckets.c.at > now, buckets.c.at), else_=literal(now))


def _least(first: ColumnElement[float], second: ColumnElement[float]) -> ColumnElement[float]:
    # min() of two values has another name in every database
    return case((first < second, first), else_=second)
