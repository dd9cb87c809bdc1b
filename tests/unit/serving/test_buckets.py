"""Token buckets, in the process and in the database: the same behaviour, never more than the limit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from adapters.errors import QuotaExceeded, RateLimited
from adapters.migrations.database import Database
from serving.http.admission import duration
from serving.tenancy.buckets import Buckets, DatabaseBuckets, Kind, ProcessBuckets, Share
from tests.unit.serving.http_support import Clock

T = "default"


@pytest.fixture
def clock() -> Clock:
    return Clock()


Made = Callable[[], Buckets]


@pytest.fixture(params=["process", "sqlite", "postgresql"])
async def make(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> AsyncIterator[Made]:
    """Makes buckets; in the database, several share what they count."""
    databases: list[Database] = []
    url = f"sqlite:///{tmp_path}/registry.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").clear("shared")

    def made() -> Buckets:
        if request.param == "process":
            return ProcessBuckets(clock=clock)
        databases.append(Database(url, busy_timeout_s=30))
        return DatabaseBuckets(databases[-1], clock=clock)

    yield made
    for database in databases:
        database.close()


def tokens(cost: int, limit: int = 100) -> list[Share]:
    return [Share(Kind.TOKENS, limit, cost)]


async def test_a_bucket_gives_its_limit_and_refills_evenly(make: Made, clock: Clock) -> None:
    buckets = make()
    standing = (await buckets.take(T, tokens(70)))[Kind.TOKENS]
    assert (standing.limit, standing.remaining, standing.reset_s) == (100, 30, pytest.approx(42.0))
    with pytest.raises(RateLimited) as refused:
        await buckets.take(T, tokens(40))
    assert refused.value.retry_after_s == pytest.approx(6.0)
    assert (await buckets.standings(T, tokens(0)))[Kind.TOKENS].remaining == 30  # refused: nothing taken
    clock.now += 5.99
    with pytest.raises(RateLimited):
        await buckets.take(T, tokens(40))
    clock.now += 0.02
    await buckets.take(T, tokens(40))
    clock.now += 1000
    assert (await buckets.standings(T, tokens(0)))[Kind.TOKENS].remaining == 100


async def test_what_comes_back_never_overfills(make: Made) -> None:
    buckets = make()
    await buckets.take(T, tokens(50))
    await buckets.give(T, tokens(20))
    assert (await buckets.standings(T, tokens(0)))[Kind.TOKENS].remaining == 70
    await buckets.give(T, tokens(90))
    assert (await buckets.standings(T, tokens(0)))[Kind.TOKENS].remaining == 100


async def test_use_beyond_the_reservation_is_a_debt(make: Made, clock: Clock) -> None:
    buckets = make()
    await buckets.take(T, tokens(100))
    await buckets.give(T, tokens(-50))
    with pytest.raises(RateLimited) as refused:
        await buckets.take(T, tokens(10))
    assert refused.value.retry_after_s == pytest.approx(36.0)
    assert "0 left" in str(refused.value)


async def test_more_than_the_whole_limit_never_passes(make: Made) -> None:
    with pytest.raises(QuotaExceeded):
        await make().take(T, tokens(101))


async def test_all_shares_or_none(make: Made) -> None:
    buckets = make()
    requests = Share(Kind.REQUESTS, 5, 1)
    with pytest.raises(QuotaExceeded):
        await buckets.take(T, [requests, *tokens(1000)])
    await buckets.take(T, [requests, *tokens(100)])
    with pytest.raises(RateLimited):
        await buckets.take(T, [requests, *tokens(1)])
    assert (await buckets.standings(T, [requests]))[Kind.REQUESTS].remaining == 4


async def test_a_lower_limit_holds_at_once(make: Made) -> None:
    buckets = make()
    await buckets.take(T, tokens(10, limit=1000))
    assert (await buckets.standings(T, tokens(0, limit=50)))[Kind.TOKENS].remaining == 50


async def test_a_clock_that_goes_back_gives_nothing(make: Made, clock: Clock) -> None:
    buckets = make()
    await buckets.take(T, tokens(100))
    clock.now -= 1000
    with pytest.raises(RateLimited):
        await buckets.take(T, tokens(1))
    clock.now += 1000
    with pytest.raises(RateLimited):
        await buckets.take(T, tokens(1))


async def test_random_takers_at_once_never_get_more_than_the_limit(make: Made) -> None:
    buckets, draw = make(), random.Random(3)
    held = most = 0

    async def one() -> None:
        nonlocal held, most
        cost = draw.randint(1, 30)
        used = draw.randint(0, cost)
        try:
            await buckets.take(T, tokens(cost))
        except RateLimited:
            return
        held += cost
        most = max(most, held)
        await asyncio.sleep(0)
        held -= cost - used
        await buckets.give(T, tokens(cost - used))

    await asyncio.gather(*(one() for _ in range(60)))
    assert held <= most <= 100
    assert (await buckets.standings(T, tokens(0)))[Kind.TOKENS].remaining == 100 - held


@pytest.mark.parametrize("make", ["sqlite", "postgresql"], indirect=True)
async def test_gateways_that_share_a_database_share_the_limit(make: Made) -> None:
    gateways = [make(), make()]

    async def one(number: int) -> bool:
        try:
            await gateways[number % 2].take(T, tokens(5))
        except RateLimited:
            return False
        return True

    passed = await asyncio.gather(*(one(number) for number in range(40)))
    assert sum(passed) == 20


@pytest.mark.parametrize("make", ["process"], indirect=True)
async def test_gateways_that_count_alone_pass_a_limit_each(make: Made) -> None:
    for buckets in (make(), make()):  # the error that the settings' page states
        await buckets.take(T, tokens(100))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (-1, "0ms"), (0.0201, "21ms"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (360, "6m0s")],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
