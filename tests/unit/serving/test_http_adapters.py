"""The registry's routes: pages, versions, compare-and-swap aliases, deletion."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from adapters.collector import Collector
from adapters.errors import Unavailable
from tests.unit.serving.http_support import BACKBONE, digest, gateway
from tests.unit.serving.test_http_errors import assert_envelope


async def test_pages(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for seed, name in enumerate("abcde"):
            await g.push(name, seed=seed)
        seen: list[str] = []
        query: dict[str, Any] = {"limit": 2}
        while True:
            page = (await g.http.get("/v1/adapters", params=query)).json()
            assert page["first_id"] == page["data"][0]["id"]
            seen += [adapter["id"] for adapter in page["data"]]
            if not page["has_more"]:
                break
            query["after"] = page["last_id"]
        assert seen == list("abcde")
        empty = (await g.http.get("/v1/adapters", params={"after": "e"})).json()
        assert empty == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


async def test_adapter_and_versions(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for seed in (1, 2, 3):
            await g.push("delta", seed=seed)
        adapter = (await g.http.get("/v1/adapters/delta")).json()
        assert (adapter["id"], adapter["object"], adapter["owned_by"]) == ("delta", "adapter", "default")
        assert adapter["latest"]["id"] == "delta@v3"
        assert [alias["id"] for alias in adapter["aliases"]] == ["delta:latest"]
        version = (await g.http.get("/v1/adapters/delta/versions/2")).json()
        assert (version["digest"], version["proof"]["effect"]) == (f"sha256:{digest(2)}", 1.5)
        found = (await g.http.get("/v1/adapters/delta/versions", params={"before": 3, "limit": 1})).json()
        assert [item["version"] for item in found["data"]] == [2]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/adapters/absent"),
        ("GET", "/v1/adapters/absent/versions"),
        ("GET", "/v1/adapters/delta/versions/9"),
        ("DELETE", "/v1/adapters/absent"),
        ("DELETE", "/v1/adapters/delta/versions/9"),
        ("PUT", "/v1/adapters/delta/aliases/prod"),
    ],
)
async def test_what_is_not_there(tmp_path: Path, method: str, path: str) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta")
        reply = await g.http.request(method, path, json={"version": 9} if method == "PUT" else None)
        assert_envelope(reply, 404, "name")
        assert reply.json()["error"]["code"] == "not_found"


async def test_alias_moves_by_compare_and_swap(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for seed in (1, 2):
            await g.push("delta", seed=seed)
        path = "/v1/adapters/delta/aliases/prod"
        made = (await g.http.put(path, json={"version": 1, "expected_revision": 0})).json()
        assert (made["id"], made["version"], made["revision"]) == ("delta:prod", 1, 1)
        moved = (await g.http.put(path, json={"version": 2, "expected_revision": 1})).json()
        assert (moved["version"], moved["revision"]) == (2, 2)
        lost = await g.http.put(path, json={"version": 1, "expected_revision": 1})
        assert_envelope(lost, 409, "expected_revision")
        assert lost.headers["x-should-retry"] == "false"
        assert (await g.http.put(path, json={"version": 1, "expected_revision": None})).json()[
            "revision"
        ] == 3
        with pytest.raises(openai.ConflictError):
            await g.openai.put(
                "/adapters/delta/aliases/prod", body={"version": 1, "expected_revision": 0}, cast_to=object
            )


async def test_of_many_swaps_one_wins(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta")
        body = {"version": 1, "expected_revision": 0}
        swaps = [g.http.put("/v1/adapters/delta/aliases/prod", json=body) for _ in range(8)]
        statuses = [reply.status_code for reply in await asyncio.gather(*swaps)]
        assert sorted(statuses) == [200] + [409] * 7


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "version"),
        ({"version": 0}, "version"),
        ({"version": "1"}, "version"),
        ({"version": 1, "expected_revision": -1}, "expected_revision"),
        ({"version": 1, "expected_revision": 10**30}, None),
        ({"version": 1, "force": True}, "force"),
    ],
)
async def test_faulty_alias_bodies(tmp_path: Path, body: dict[str, Any], param: str | None) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta")
        reply = await g.http.put("/v1/adapters/delta/aliases/prod", json=body)
        assert_envelope(reply, 400 if param else 409, param)


async def test_a_deleted_version_is_gone_and_freed(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for seed in (1, 2):
            await g.push("delta", seed=seed)
        reply = (await g.http.delete("/v1/adapters/delta/versions/2")).json()
        assert reply == {"id": "delta@v2", "object": "adapter.version", "deleted": True, "bytes_freed": 200}
        assert g.backend.released == [digest(2)]
        assert (await g.http.get("/v1/adapters/delta/versions/2")).status_code == 404
        await g.openai.completions.create(model="delta", prompt="hi")
        assert g.backend.calls[-1].adapter_digest == digest(1)


async def test_content_that_another_version_has_stays(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for name in ("a", "b"):
            await g.push(name)
        assert (await g.http.delete("/v1/adapters/a")).json()["bytes_freed"] == 0
        assert g.backend.released == []
        assert (await g.http.delete("/v1/adapters/b")).json()["bytes_freed"] == 200
        assert g.backend.released == [digest()]


async def test_a_version_that_an_alias_names_is_in_use(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta", alias="prod")
        assert_envelope(await g.http.delete("/v1/adapters/delta/versions/1"), 409)
        assert g.backend.released == []


async def test_a_deleted_adapter_is_gone_with_all_versions(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for seed in (1, 2):
            await g.push("delta", seed=seed, alias="prod")
        reply = (await g.http.delete("/v1/adapters/delta")).json()
        assert reply == {
            "id": "delta",
            "object": "adapter",
            "deleted": True,
            "bytes_freed": 400,
            "versions": [2, 1],
        }
        for model in ("delta", "delta:prod", "delta@v1", f"delta@sha256:{digest(1)}"):
            with pytest.raises(openai.NotFoundError):
                await g.openai.completions.create(model=model, prompt="hi")
        assert [model.id for model in (await g.openai.models.list()).data] == [BACKBONE]


async def test_a_deletion_stands_though_the_backend_is_gone(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta")
        g.backend.failure = Unavailable("gone")
        reply = await g.http.delete("/v1/adapters/delta")
        assert (reply.status_code, reply.json()["bytes_freed"]) == (200, None)
        assert (await g.http.get("/v1/adapters/delta")).status_code == 404


async def test_a_deleted_version_comes_back_until_its_bytes_are_collected(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        published = (await g.push("delta", seed=1)).json()
        await g.http.delete("/v1/adapters/delta/versions/1")
        path = "/v1/adapters/delta/versions/1/undelete"
        back = await g.http.post(path)
        assert (back.status_code, back.json()) == (200, published)
        await g.openai.completions.create(model="delta", prompt="hi")
        assert_envelope(await g.http.post(path), 404)
        await g.http.delete("/v1/adapters/delta")
        for _ in range(2):
            Collector(g.registry, g.store, grace_s=0).collect()
        assert list(g.store.iter_digests()) == []
        assert_envelope(await g.http.post(path), 503)
        assert (await g.push("delta", seed=1)).json()["version"] == 2
