"""Places of requests in progress: never more than the limit, and none lost to a gateway that was killed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from sqlalchemy import Connection

from adapters.errors import RateLimited, RegistryUnavailable
from adapters.migrations.database import Database
from serving.tenancy.places import DatabasePlaces, Places, ProcessPlaces

REPOSITORY = Path(__file__).parents[3]
T = "default"
LEASE_S = 0.45

Made = Callable[[], Places]


@pytest.fixture(params=["process", "sqlite", "postgresql"])
async def make(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Made]:
    """Makes places; in the database, several share what they count, and a lease is short."""
    databases: list[Database] = []
    kept: list[Places] = []
    url = f"sqlite:///{tmp_path}/registry.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").clear("shared")

    def made() -> Places:
        if request.param == "process":
            kept.append(ProcessPlaces())
        else:
            databases.append(Database(url, busy_timeout_s=30))
            kept.append(DatabasePlaces(databases[-1], clock=time.time, lease_s=LEASE_S))
        return kept[-1]

    yield made
    for places in kept:
        places.stop()
    for database in databases:
        database.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "places"]


async def taken(places: Places, number: int, limit: int, *, first: int = 0) -> int:
    """How many of `number` takers at once got a place."""

    async def one(place: int) -> bool:
        try:
            await places.take(T, f"r{place}", limit)
        except RateLimited:
            return False
        return True

    return sum(await asyncio.gather(*(one(place) for place in range(first, first + number))))


async def test_no_more_than_the_limit_and_freed_places_at_once(make: Made) -> None:
    places = make()
    assert await taken(places, 8, 3) == 3
    assert await taken(places, 1, 4, first=100) == 1  # a limit that was raised
    places.free(T, "r100")
    for place in range(200, 230):  # one after another: the next finds the last one's place
        await places.take(T, f"r{place}", 4)
        places.free(T, f"r{place}")
    assert await taken(places, 8, 4, first=300) == 1


async def test_requests_without_a_limit_free_what_they_took(make: Made) -> None:
    places = make()
    for place in range(3):
        await places.take(T, f"unlimited{place}", None)
        places.free(T, f"unlimited{place}")
    assert await taken(places, 3, 2) == 2


@pytest.mark.parametrize("make", ["sqlite", "postgresql"], indirect=True)
async def test_gateways_share_the_limit_and_a_living_one_keeps_its_places(make: Made) -> None:
    first, second = make(), make()
    got = await asyncio.gather(taken(first, 8, 3), taken(second, 8, 3, first=50))
    assert sum(got) == 3
    await asyncio.sleep(2.5 * LEASE_S)
    assert await taken(second, 1, 3, first=90) == 0


@pytest.mark.parametrize("make", ["sqlite", "postgresql"], indirect=True)
async def test_a_database_that_fails_loses_no_place(make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    places = make()
    assert isinstance(places, DatabasePlaces)
    assert await taken(places, 1, 1) == 1
    failing, write = threading.Event(), places._database.write

    def fail() -> AbstractContextManager[Connection]:
        failing.set()
        raise RegistryUnavailable("The registry's database is full.")

    monkeypatch.setattr(places._database, "write", fail)
    places.free(T, "r0")
    assert await asyncio.to_thread(failing.wait, 5)
    with pytest.raises(RegistryUnavailable):
        await places.take(T, "r1", 1)
    monkeypatch.setattr(places._database, "write", write)
    await places.take(T, "r2", 1)


WORKER = """
import asyncio, random, sys, time
from adapters.errors import RateLimited
from adapters.migrations.database import Database
from serving.tenancy.places import DatabasePlaces

url, name, limit, lease_s, seconds, hold = sys.argv[1], sys.argv[2], int(sys.argv[3]), *map(float, sys.argv[4:])
places = DatabasePlaces(Database(url, busy_timeout_s=30), clock=time.time, lease_s=lease_s)
say = lambda what, place: print(what, place, time.monotonic(), flush=True)

async def one(number):
    count = 0
    while time.monotonic() < end:
        count += 1
        place = f"{name}-{number}-{count}"
        try:
            await places.take("default", place, limit)
        except RateLimited:
            await asyncio.sleep(random.random() * 0.01)
            continue
        say("took", place)
        await asyncio.sleep(hold or random.random() * 0.02)
        say("frees", place)
        places.free("default", place)

async def main():
    await asyncio.gather(*(one(number) for number in range(4)))

print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + seconds
asyncio.run(main())
places.stop()
"""


@pytest.mark.parametrize("database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def test_processes_at_once_with_one_that_is_killed(
    request: pytest.FixtureRequest, tmp_path: Path, database: str
) -> None:
    limit, seconds = 4, 2.0
    url = f"sqlite:///{tmp_path}/registry.db"
    if database == "postgresql":
        url = request.getfixturevalue("postgres").clear("shared")
    Database(url, busy_timeout_s=5).close()
    outputs = [tmp_path / name for name in ("victim", "a", "b")]
    workers = []
    for output in outputs:
        hold = 60 if output.name == "victim" else 0
        command = [sys.executable, "-c", WORKER, url, output.name]
        command += [str(item) for item in (limit, LEASE_S, seconds, hold)]
        with output.open("wb") as out:
            workers.append(subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=out))
    try:
        for output in outputs:
            while b"ready" not in output.read_bytes():
                time.sleep(0.01)
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(b"\n")
            worker.stdin.close()
        time.sleep(0.4 * seconds)
        killed_at = time.monotonic()
        workers[0].send_signal(signal.SIGKILL)
        assert [worker.wait(timeout=60) for worker in workers] == [-signal.SIGKILL, 0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()

    changes: list[tuple[float, int]] = []
    for output in outputs:
        lines = [line.split() for line in output.read_text().splitlines() if line != "ready"]
        ends = {place: float(at) for what, place, at in lines if what == "frees"}
        begins = {place: float(at) for what, place, at in lines if what == "took"}
        assert begins
        for place, at in begins.items():
            changes += [(at, 1), (ends.get(place, killed_at), -1)]
    running, most, most_after = 0, 0, 0
    for at, change in sorted(changes):
        running += change
        most = max(most, running)
        if at > killed_at + 1.5 * LEASE_S:
            most_after = max(most_after, running)
    assert most == limit  # never more
    assert most_after == limit  # what the killed one held is not missed for longer than its lease
    assert len(changes) > 100
