"""The ledger: a row for every admitted request, also when its caller leaves, its backend fails or its gateway dies."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from adapters import audit
from adapters.errors import RegistryUnavailable
from adapters.migrations.database import Database
from serving.core import GenerateCall
from serving.deployments.housekeeping import keep_forever
from serving.tenancy.ledger import HOUR_S, Ledger, Outcome, Tokens
from serving.tenancy.principal import Scope
from tests.unit.serving.http_support import BACKBONE, Clock, FakeBackend, Gateway, digest, gateway, tokens
from tests.unit.serving.test_http_errors import assert_envelope
from tests.unit.serving.test_http_limits import PROMPT, break_off, post_and_leave, refuse

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    made = Database(url, busy_timeout_s=0.2)
    yield made
    made.close()


def rows(database: Database, columns: str) -> list[tuple[Any, ...]]:
    query = text(f"SELECT {columns} FROM usage ORDER BY opened_at, id")  # noqa: S608
    with database.read() as tx:
        return [tuple(row) for row in tx.execute(query)]


def begin(ledger: Ledger, request_id: str) -> Any:
    return ledger.open(request_id, "acme", "k", adapter_digest=None, reserved_tokens=9)


# -- the ledger alone ------------------------------------------------------------------------------------------


def test_open_then_closed(database: Database) -> None:
    clock = Clock()
    told: list[tuple[Outcome, Tokens]] = []
    ledger = Ledger(database, clock=clock, on_closed=lambda *item: told.append(item))
    ledger.open("r", "acme", "k", adapter_digest="d" * 64, reserved_tokens=9).result(5)
    everything = "tenant, key_id, adapter_digest, hour, opened_at, closed_at, outcome, reserved_tokens"
    assert rows(database, everything) == [("acme", "k", "d" * 64, 277, 1e6, None, "open", 9)]
    clock.now += 2
    ledger.close("r", Outcome.COMPLETED, Tokens(prompt=5, cached=4, completion=3))
    ledger.stop()
    found = rows(database, "outcome, closed_at, prompt_tokens, cached_tokens, completion_tokens")
    assert found == [("completed", 1e6 + 2, 5, 4, 3)]
    assert told == [(Outcome.COMPLETED, Tokens(prompt=5, cached=4, completion=3))]


def test_many_requests_share_commits(database: Database) -> None:
    ledger = Ledger(database, clock=Clock(), on_closed=lambda *_: None)
    with database.write():  # the ledger has to wait: what comes meanwhile goes together
        written = [begin(ledger, f"r{number}") for number in range(200)]
    writes = Counter[str]()
    write = database.write

    def counting() -> Any:
        writes["transactions"] += 1
        return write()

    database.write = counting  # type: ignore[method-assign]
    for future in written:
        future.result(5)
    for number in range(200):
        ledger.close(f"r{number}", Outcome.COMPLETED, Tokens())
    ledger.stop()
    assert len(rows(database, "id")) == 200
    assert writes["transactions"] < 10


def test_a_failing_database_fails_what_opens_and_keeps_what_closes(database: Database) -> None:
    ledger = Ledger(database, clock=Clock(), on_closed=lambda *_: None)
    begin(ledger, "a").result(5)
    with database.write():  # held for longer than the ledger waits for its turn
        ledger.close("a", Outcome.FAILED, Tokens(prompt=1))
        refused = begin(ledger, "b")
        with pytest.raises(RegistryUnavailable):
            refused.result(5)
    ledger.close("b", Outcome.FAILED, Tokens())  # it never was: no row
    begin(ledger, "c").result(5)
    ledger.stop()
    assert rows(database, "id, outcome") == [("a", "failed"), ("c", "open")]


def test_the_ledger_survives_a_caller_that_does_not_wait(database: Database) -> None:
    ledger = Ledger(database, clock=Clock(), on_closed=lambda *_: None)
    assert not begin(ledger, "a").cancel()
    ledger.stop()
    assert rows(database, "id, outcome") == [("a", "open")]
    assert not [thread for thread in threading.enumerate() if thread.name == "ledger"]


CRASHING = """
import sys, time
from adapters.migrations.database import Database
from serving.tenancy.ledger import Ledger, Outcome, Tokens
closed = lambda *_: print("closed", flush=True)
ledger = Ledger(Database(sys.argv[1], busy_timeout_s=5), clock=time.time, on_closed=closed)
for name in "abc":
    ledger.open(name, "acme", "k", adapter_digest=None, reserved_tokens=7).result()
ledger.close("a", Outcome.COMPLETED, Tokens(prompt=2, completion=3))
time.sleep(60)
"""


def test_requests_of_a_killed_process_are_found_and_marked(database: Database, url: str) -> None:
    victim = subprocess.Popen(
        [sys.executable, "-c", CRASHING, url],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert victim.stdout is not None
    assert victim.stdout.readline() == "closed\n"
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    ledger = Ledger(database, clock=lambda: 4e9, on_closed=lambda *_: None)
    assert ledger.recover(older_than_s=4e9) == 0
    assert ledger.recover(older_than_s=60) == 2
    assert ledger.recover(older_than_s=60) == 0
    found = rows(database, "id, outcome, prompt_tokens, completion_tokens, reserved_tokens")
    assert found == [("a", "completed", 2, 3, 7), ("b", "crashed", 0, 0, 7), ("c", "crashed", 0, 0, 7)]


def test_a_gateway_that_was_alive_after_all_has_the_last_word(database: Database) -> None:
    ledger = Ledger(database, clock=Clock(), on_closed=lambda *_: None)
    begin(ledger, "a").result(5)
    ledger.recover(older_than_s=0)
    ledger.close("a", Outcome.COMPLETED, Tokens(prompt=1))
    ledger.stop()
    assert rows(database, "outcome, prompt_tokens") == [("completed", 1)]


def test_old_rows_go_and_their_going_is_in_the_audit_log(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.tenancy.ledger.PURGED_AT_ONCE", 3)
    clock = Clock()
    ledger = Ledger(database, clock=clock, on_closed=lambda *_: None)
    for number in range(10):  # one each half hour
        begin(ledger, f"r{number}").result(5)
        if number:
            ledger.close(f"r{number}", Outcome.COMPLETED, Tokens(prompt=1))
        clock.now += HOUR_S / 2
    ledger.stop()
    first = int(1e6) // HOUR_S
    hours = [hour for (hour,) in rows(database, "hour")]
    assert ledger.purge(older_than_s=clock.now) == 0
    removed = ledger.purge(older_than_s=2 * HOUR_S)
    before = int((clock.now - 2 * HOUR_S) // HOUR_S)
    assert removed == sum(hour < before for hour in hours) - 1 > 3
    # whole hours, and never a row that is open: its request may still run
    assert [row[0] for row in rows(database, "hour")] == [first, *(hour for hour in hours if hour >= before)]
    assert ledger.purge(older_than_s=2 * HOUR_S) == 0
    with database.read() as tx:
        lines, verdict = audit.lines(tx, limit=10), audit.verify(tx)
    assert {(line.actor, line.action) for line in lines} == {("system", "usage.purge")}
    assert sum(json.loads(line.details)["rows"] for line in lines) == removed
    assert verdict.problem is None


def test_housekeeping_goes_on_after_a_failure(
    database: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    ledger = Ledger(database, clock=clock, on_closed=lambda *_: None)
    begin(ledger, "left").result(5)
    begin(ledger, "ended").result(5)
    ledger.close("ended", Outcome.COMPLETED, Tokens())
    ledger.stop()
    pauses: list[float] = []
    purge = ledger.purge

    def fail(*, older_than_s: float) -> int:
        raise RegistryUnavailable("The registry's database is full.")

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        match len(pauses):
            case 1:
                assert rows(database, "id, outcome") == [("ended", "completed"), ("left", "open")]
                clock.now += 3 * 86_400
                monkeypatch.setattr(ledger, "purge", fail)
            case 2:
                assert rows(database, "id, outcome") == [("ended", "completed"), ("left", "crashed")]
                monkeypatch.setattr(ledger, "purge", purge)
            case 3:
                assert rows(database, "id") == []
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_forever(ledger, keep_days=2, abandoned_after_s=7200, sleep=sleep)
    assert pauses == [3600.0] * 3
    assert "is full" in caplog.text


# -- behind HTTP -----------------------------------------------------------------------------------------------


def counted(g: Gateway) -> dict[str, float]:
    names = ("prompt", "cached", "completion")
    found = {kind: g.sample("deltamux_usage_tokens_total", kind=kind) for kind in names}
    outcomes = ("completed", "cancelled", "failed")
    return found | {name: g.sample("deltamux_usage_requests_total", outcome=name) for name in outcomes}


async def test_rows_equal_the_counters_whatever_becomes_of_requests(
    tmp_path: Path, url: str, database: Database
) -> None:
    gone = asyncio.Event()

    def script(call: GenerateCall) -> Any:
        match call.sampling.seed:
            case 1:
                return refuse(call)
            case 2:
                return break_off(call)
            case 3:
                gone.set()
        return tokens(call)

    backend = FakeBackend(script=script)
    async with gateway(tmp_path, backend, url=url) as g:
        g.limited(tokens_per_min=100_000)
        body: dict[str, Any] = {"model": BACKBONE, "prompt": [PROMPT, PROMPT], "n": 2, "max_tokens": 7}
        for stream in (False, True):
            for seed in (0, 1, 2):
                await g.http.post("/v1/completions", json={**body, "n": 1, "stream": stream, "seed": seed})
            await g.http.post("/v1/completions", json={**body, "stream": stream})
        backend.hold = asyncio.Event()
        for stream in (False, True):
            gone.clear()
            await post_and_leave(g, {**body, "n": 1, "seed": 3, "stream": stream}, gone)
        g.tenancy.ledger.stop()
        found = rows(database, "outcome, prompt_tokens, cached_tokens, completion_tokens")
        prompt, cached, completion = (sum(row[place] for row in found) for place in (1, 2, 3))
        outcomes = Counter(row[0] for row in found)
        assert counted(g) == {"prompt": prompt, "cached": cached, "completion": completion} | {
            name: outcomes[name] for name in ("completed", "cancelled", "failed")
        }
        assert outcomes == {"failed": 4, "completed": 4, "cancelled": 2}
        assert (cached, completion) == (
            0,
            3 * 2 * 2 + 3 * 4 * 2 + sum(row[3] for row in found if row[0] != "completed"),
        )


GATEWAY = """
import asyncio, sys
from pathlib import Path
from tests.unit.serving.http_support import FakeBackend, gateway, listening, tokens
from tests.unit.serving.test_http_limits import refuse

class Backend(FakeBackend):
    async def generate(self, call):
        if call.sampling.seed == 1:
            yield refuse(call)[0]
            return
        for batch in tokens(call):
            yield batch
            if call.sampling.seed == 9:
                await asyncio.Event().wait()

async def main():
    async with gateway(Path(sys.argv[1]), Backend(), url=sys.argv[2]) as g, listening(g.app) as (host, port):
        print(port, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
KINDS = ("prompt", "cached", "completion")


def on_page(page: str) -> Counter[str]:
    """Usage as the page of metrics has it, by outcome and by kind of token."""
    found = re.findall(r'^deltamux_usage_(?:requests|tokens)_total{\w+="(\w+)"} (\S+)$', page, re.MULTILINE)
    return Counter({name: int(float(value)) for name, value in found})


@pytest.mark.parametrize("url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True)
async def test_rows_equal_the_counters_of_a_gateway_that_was_killed_and_of_the_next(
    tmp_path: Path, url: str, database: Database
) -> None:
    victim = subprocess.Popen(
        [sys.executable, "-c", GATEWAY, str(tmp_path), url], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert victim.stdout is not None
        port = int(victim.stdout.readline())
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            for seed in (0, 0, 0, 1, 1):
                body = {"model": BACKBONE, "prompt": PROMPT, "seed": seed}
                assert (await http.post("/v1/completions", json=body)).status_code == (503 if seed else 200)
            waiting = {"model": BACKBONE, "prompt": PROMPT, "seed": 9, "stream": True}

            async def hangs() -> tuple[httpx.Response, AsyncIterator[str]]:
                request = http.build_request("POST", "/v1/completions", json=waiting)
                reply = await http.send(request, stream=True)
                texts = reply.aiter_text()
                assert (await anext(texts)).startswith("data: ")  # its row is durable
                return reply, texts

            for _ in range(2):
                reply, _texts = await hangs()
                await reply.aclose()
            cut = [await hangs() for _ in range(3)]
            async with asyncio.timeout(10):
                while (before := on_page((await http.get("/metrics")).text))["cancelled"] < 2:
                    await asyncio.sleep(0.02)
            victim.send_signal(signal.SIGKILL)
            for reply, texts in cut:
                with pytest.raises(httpx.HTTPError):
                    [_ async for _ in texts]
                await reply.aclose()
    finally:
        victim.kill()
        victim.wait()
        victim.stdout.close()  # type: ignore[union-attr]

    async with gateway(tmp_path, url=url) as g:
        g.tenancy.ledger.recover(older_than_s=0)
        await g.http.post("/v1/completions", json={"model": BACKBONE, "prompt": PROMPT})
        g.tenancy.ledger.stop()
        counters = before + on_page((await g.http.get("/metrics")).text)
        data = (await g.http.get("/v1/usage", params={"group_by": "outcome"})).json()["data"]
    assert counters == Counter({row["outcome"]: row["requests"] for row in data}) + Counter(
        {kind: sum(row[f"{kind}_tokens"] for row in data) for kind in KINDS}
    )
    assert {row["outcome"]: row["requests"] for row in data} == {
        "completed": 4, "failed": 2, "cancelled": 2, "crashed": 3
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_is_answered_that_the_ledger_does_not_know(
    tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(tmp_path) as g:
        body = {"model": BACKBONE, "prompt": PROMPT, "stream": stream}
        opened: list[Future[None]] = []

        def delayed(*args: Any, **options: Any) -> Future[None]:
            opened.append(Future())
            return opened[-1]

        monkeypatch.setattr(g.tenancy.ledger, "open", delayed)
        sending = asyncio.create_task(g.http.post("/v1/completions", json=body))
        while not (
            opened and g.backend.calls and not g.backend.open_calls
        ):  # all has been generated meanwhile
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.02)
        assert not sending.done()
        opened[0].set_exception(RegistryUnavailable("The registry's database is full."))
        reply = await sending
        assert_envelope(reply, 503)
        assert "Hello" not in reply.text


async def test_usage_by_tenant_key_delta_hour_and_outcome(tmp_path: Path, url: str) -> None:
    clock = Clock()
    async with gateway(tmp_path, clock=clock, url=url) as g:
        admin = g.key("default", Scope.ADMIN)
        acme, second, other = g.key("acme"), g.key("acme"), g.key("other")
        g.use(acme)
        await g.push("delta")
        body: dict[str, Any] = {"model": "delta", "prompt": PROMPT}
        for key, model in ((acme, "delta"), (acme, BACKBONE), (second, "delta"), (other, BACKBONE)):
            g.use(key)
            await g.http.post("/v1/completions", json={**body, "model": model})
            clock.now += 1800
        g.tenancy.ledger.stop()

        async def usage(caller: str, *group_by: str, **query: Any) -> list[dict[str, Any]]:
            g.use(caller)
            query = {"group_by": group_by, "start_time": 0, "end_time": 2e6} | query
            found = (await g.http.get("/v1/usage", params=query)).raise_for_status().json()
            assert found["has_more"] is False
            for row in found["data"]:  # three tokens in and three out each
                assert row.pop("object") == "usage"
                assert (row.pop("prompt_tokens"), row.pop("completion_tokens")) == (3 * row["requests"],) * 2
                assert row.pop("cached_tokens") == 0
            return list(found["data"])

        assert await usage(admin) == [{"requests": 4}]
        assert await usage(acme) == [{"requests": 3}]
        assert await usage(admin, tenant="other") == [{"requests": 1}]
        assert await usage(admin, "tenant") == [
            {"tenant": "acme", "requests": 3},
            {"tenant": "other", "requests": 1},
        ]
        delta = f"sha256:{digest()}"
        by_delta = [
            {"adapter": "base", "requests": 1},
            {"adapter": delta, "versions": ["delta@v1"], "requests": 2},
        ]
        assert sorted(await usage(acme, "adapter"), key=str) == sorted(by_delta, key=str)
        assert await usage(acme, adapter=delta) == [{"requests": 2}]
        assert await usage(acme, adapter="base") == [{"requests": 1}]
        first, again = acme.split("_")[1], second.split("_")[1]
        by_key = [{"key": first, "requests": 2}, {"key": again, "requests": 1}]
        assert sorted(await usage(acme, "key"), key=str) == sorted(by_key, key=str)
        assert await usage(acme, key=again) == [{"requests": 1}]
        hour = 1_000_000 // 3600 * 3600
        by_hour = [{"hour": hour, "requests": 1}, {"hour": hour + 3600, "requests": 2}]
        assert await usage(acme, "hour") == by_hour
        assert await usage(acme, start_time=1_000_000, end_time=1_001_800) == [{"requests": 1}]
        assert await usage(acme, "outcome") == [{"outcome": "completed", "requests": 3}]
        assert await usage(acme, "hour", start_time=0, end_time=1) == []

        g.use(acme)
        assert_envelope(await g.http.get("/v1/usage", params={"tenant": "other"}), 403, "tenant")
        assert_envelope(await g.http.get("/v1/usage", params={"group_by": "prompt"}), 400)
        assert_envelope(
            await g.http.get("/v1/usage", params={"start_time": 5, "end_time": 4}), 400, "start_time"
        )
        page = (
            await g.http.get("/v1/usage", params={"group_by": "hour", "limit": 1, "start_time": 0})
        ).json()
        assert (len(page["data"]), page["has_more"]) == (1, True)
