"""What a tenant may keep: its own limits, before the settings', and the errors where it wants more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from adapters.canonical import to_canonical
from adapters.errors import QuotaExceeded
from adapters.quotas import Quota
from adapters.registry import Registry
from tests.unit.serving.http_support import FakeBackend, gateway, lora, until
from tests.unit.serving.test_http_files import begin, complete, refused, send

SIZE = to_canonical(lora()).size_bytes


async def test_the_number_of_deltas_and_of_versions_is_bounded(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        g.limited(max_adapters=1, max_versions=2)
        assert (await g.push("a", seed=0)).status_code == 201
        reply = await g.push("b", seed=1)
        refused(reply, 429, "insufficient_quota", None)
        assert reply.headers["x-should-retry"] == "false"
        assert "1 of at most 1 adapters" in reply.json()["error"]["message"]
        assert (await g.push("a", seed=1)).status_code == 201
        assert (await g.push("a", seed=1)).status_code == 201  # no third version
        refused(await g.push("a", seed=2), 429, "insufficient_quota", None)
        assert len(set(g.store.iter_digests())) == 2
        await g.http.delete("/v1/adapters/a/versions/1")
        assert (await g.push("a", seed=2)).status_code == 201
        back = await g.http.post("/v1/adapters/a/versions/1/undelete")
        refused(back, 429, "insufficient_quota", None)


async def test_stored_bytes_are_bounded_and_equal_contents_count_once(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        g.limited(max_stored_bytes=2 * SIZE + 10)
        for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 1)):
            assert (await g.push(name, seed=seed)).status_code == 201, name
        refused(await g.push("e", seed=2), 429, "insufficient_quota", None)
        assert len(set(g.store.iter_digests())) == 2  # what was refused left nothing


async def test_open_files_are_bounded_and_their_bytes_count(tmp_path: Path) -> None:
    body = {"bytes": 10, "filename": "f", "mime_type": "x", "purpose": "user_data"}
    async with gateway(tmp_path) as g:
        g.limited(max_files=2, max_stored_bytes=100)
        first = await begin(g, 10)
        refused(await g.http.post("/v1/uploads", json={**body, "bytes": 91}), 429, "insufficient_quota", None)
        second = await begin(g, 10)
        refused(await g.http.post("/v1/uploads", json=body), 429, "insufficient_quota", None)
        await g.http.post(f"/v1/uploads/{first['id']}/cancel")
        await begin(g, 10)
        part = (await send(g, second["id"], b"0123456789")).json()["id"]
        file_id = (await complete(g, second["id"], [part])).json()["file"]["id"]
        refused(await g.http.post("/v1/uploads", json=body), 429, "insufficient_quota", None)
        await g.http.delete(f"/v1/files/{file_id}")
        await begin(g, 10)


async def test_the_settings_hold_where_a_tenant_has_no_limits_of_its_own(tmp_path: Path) -> None:
    async with gateway(tmp_path, max_adapters=1) as g:
        assert (await g.push("a")).status_code == 201
        refused(await g.push("b"), 429, "insufficient_quota", None)
        g.limited(max_adapters=2)
        for name in ("a", "b"):
            assert (await g.push(name)).status_code == 201
        refused(await g.push("c"), 429, "insufficient_quota", None)


async def test_the_semaphore_is_shared_by_bodies_and_parts(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with gateway(tmp_path, FakeBackend(admit_gate=gate), max_open_uploads=1) as g:
        upload = await begin(g, 4)
        first = asyncio.create_task(g.push("delta"))
        await until(lambda: bool(g.backend.admitted))
        reply = await send(g, upload["id"], b"1234")
        refused(reply, 429, "rate_limit_exceeded", None)
        assert reply.headers["retry-after"] == "1"
        gate.set()
        await first
        assert (await send(g, upload["id"], b"1234")).status_code == 200


def test_the_last_free_place_is_given_once(tmp_path: Path) -> None:
    with Registry(f"sqlite:///{tmp_path}/r.db") as registry:

        def publish(name: str, number: int, quota: Quota) -> None:
            registry.publish(
                "t", name, f"{number:064x}", method="LORA", backbone_digest="", task="causal-lm", size_bytes=5,
                labels={}, proof={}, quota=quota,
            )  # fmt: skip

        publish("a", 1, Quota(max_stored_bytes=5))
        with pytest.raises(QuotaExceeded, match="5 of at most 9 stored bytes"):
            publish("a", 2, Quota(max_stored_bytes=9))
        registry.check_room("t", "a", Quota(max_adapters=1))
        with pytest.raises(QuotaExceeded, match="1 of at most 1 adapters"):
            registry.check_room("t", "b", Quota(max_adapters=1))
