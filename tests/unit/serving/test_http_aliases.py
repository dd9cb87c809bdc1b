"""An alias that divides its requests, over HTTP and from the command line."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from adapters.aliases import place_of
from tests.unit.serving.cli_support import commands
from tests.unit.serving.http_support import FakeBackend, Gateway, digest, gateway, until
from tests.unit.serving.test_http_errors import assert_envelope

PATH = "/v1/adapters/delta/aliases/prod"


async def two_versions(g: Gateway, percent: int = 50) -> None:
    await g.push("delta", seed=1, alias="prod")
    await g.push("delta", seed=2)
    body = {"version": 1, "canaries": {"2": percent}, "expected_revision": 1}
    moved = (await g.http.put(PATH, json=body)).raise_for_status().json()
    assert (moved["version"], moved["weights"]) == (1, {"1": 100 - percent, "2": percent})


async def served(g: Gateway, *, request_id: str = "", **body: Any) -> str:
    headers = {"x-request-id": request_id} if request_id else {}
    body = {"model": "delta:prod", "prompt": "hi", **body}
    reply = (await g.http.post("/v1/completions", json=body, headers=headers)).raise_for_status()
    assert f"sha256:{g.backend.calls[-1].adapter_digest}" == reply.headers["x-adapter-digest"]
    return reply.headers["x-adapter-digest"].removeprefix("sha256:")


async def test_a_user_keeps_its_version_and_a_request_id_decides_without_one(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await two_versions(g)
        users = [f"user-{number}" for number in range(12)]
        first = [await served(g, user=user) for user in users]
        assert set(first) == {digest(1), digest(2)}
        assert [await served(g, user=user, request_id=f"r-{user}") for user in users] == first
        ids = [f"req-{number}" for number in range(12)]
        by_request = [await served(g, request_id=request_id) for request_id in ids]
        assert set(by_request) == {digest(1), digest(2)}
        assert [await served(g, request_id=request_id) for request_id in ids] == by_request


async def test_the_same_user_of_another_tenant_is_another_one(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await two_versions(g)
        users = [f"user-{number}" for number in range(12)]
        own = [await served(g, user=user) for user in users]
        owner, other = g.key(), g.key("acme")
        g.use(owner)
        (await g.http.put("/v1/adapters/delta/grants/acme")).raise_for_status()
        g.use(other)
        theirs = [await served(g, user=user, model="default/delta:prod") for user in users]
        assert set(theirs) == {digest(1), digest(2)}
        assert theirs != own


async def test_a_request_in_progress_stays_on_the_version_that_it_began_with(tmp_path: Path) -> None:
    hold = asyncio.Event()
    async with gateway(tmp_path, FakeBackend(hold=hold)) as g:
        await two_versions(g)
        places = {f"u{n}": place_of("default", "delta", "prod", f"default/user/u{n}") for n in range(9)}
        user = next(user for user, place in places.items() if place < 50)
        running = asyncio.create_task(served(g, user=user))
        await until(lambda: bool(g.backend.open_calls))
        (await g.http.post(f"{PATH}/rollback", json={})).raise_for_status()
        hold.set()
        assert await running == digest(2)
        assert await served(g, user=user) == digest(1)


async def test_usage_says_which_version_served(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await two_versions(g)
        answers = [await served(g, user=f"user-{number}") for number in range(12)]
        g.tenancy.ledger.stop()
        rows = (await g.http.get("/v1/usage", params={"group_by": "adapter"})).json()["data"]
        got = {row["adapter"]: (row["versions"], row["requests"]) for row in rows}
        assert got == {
            f"sha256:{digest(seed)}": ([f"delta@v{seed}"], answers.count(digest(seed))) for seed in (1, 2)
        }


@pytest.mark.parametrize(
    "canaries",
    [
        {"2": 100},
        {"1": 10},
        {"02": 10},
        {"latest": 10},
        {"2": 10.5},
        [2],
        {str(number): 1 for number in range(2, 12)},
    ],
)
async def test_faulty_shares(tmp_path: Path, canaries: Any) -> None:
    async with gateway(tmp_path) as g:
        await two_versions(g)
        reply = await g.http.put(PATH, json={"version": 1, "canaries": canaries})
        assert_envelope(reply, 400)
        assert reply.json()["error"]["param"].startswith("canaries")


async def test_rollback_and_history(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await two_versions(g)
        assert_envelope(
            await g.http.post(f"{PATH}/rollback", json={"expected_revision": 1}), 409, "expected_revision"
        )
        back = (await g.http.post(f"{PATH}/rollback", json={"expected_revision": 2})).json()
        assert (back["weights"], back["revision"]) == ({"1": 100}, 3)
        assert_envelope(await g.http.post(f"{PATH}/rollback", json={}), 409, "alias")
        moves = (await g.http.get(f"{PATH}/history")).json()["data"]
        assert [(move["version"], move["canaries"]) for move in moves] == [(1, {}), (1, {"2": 50}), (1, {})]
        assert_envelope(await g.http.post("/v1/adapters/delta/aliases/none/rollback", json={}), 404, "alias")


async def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(tmp_path) as g:
        run = commands(g, monkeypatch)
        await g.push("delta", seed=1, alias="prod")
        assert "points at it already" in (
            await run("adapters", "promote", "delta", "--canary", "10", exit_code=1)
        )
        await g.push("delta", seed=2)
        assert "points at v1 (90 %) and v2 (10 %)" in await run(
            "adapters", "promote", "delta", "--canary", "10"
        )
        assert "prod -> v1 (90 %) and v2 (10 %)" in await run("adapters", "list")
        assert "v1 (60 %) and v2 (40 %)" in await run("adapters", "promote", "delta", "--canary", "40")
        assert "points at version 1" in await run("adapters", "rollback", "delta")
        await run("adapters", "promote", "delta", "2", "--canary", "40")
        assert "points at version 2" in await run("adapters", "promote", "delta")
        assert "points at version 1" in await run("adapters", "rollback", "delta")
        assert "no earlier version" in await run("adapters", "rollback", "delta", exit_code=1)
        assert "no alias 'x'" in await run("adapters", "rollback", "delta", "--alias", "x", exit_code=1)
