"""`Idempotency-Key`: the same request again gets the first one's answer, and has no second effect."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.errors import ErrorInfo
from adapters.idempotency import Answer
from adapters.registry import Registry
from adapters.signing import generate
from tests.unit.serving.http_support import PROOF, Clock, FakeBackend, Gateway, gateway, pair, until
from tests.unit.serving.test_http_errors import read_of_endless_body
from tests.unit.serving.test_http_files import begin, refused

PATH = "/v1/adapters/delta/versions"


async def push(g: Gateway, key: str, seed: int = 0, **fields: str) -> httpx.Response:
    return await g.http.put(PATH, files=pair(seed), data=fields, headers={"idempotency-key": key})


async def test_a_repeated_upload_is_answered_without_being_carried_out(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        first = await push(g, "k1", alias="prod")
        await push(g, "k2", seed=1, alias="prod")
        again = await push(g, "k1", alias="prod")  # another boundary in the body, the same content
        assert again.content == first.content
        assert again.status_code == 201
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["x-adapter-digest"] == first.headers["x-adapter-digest"]
        assert "idempotent-replayed" not in first.headers
        aliases = {item.alias: item.version for item in g.registry.get_adapter("default", "delta").aliases}
        assert aliases["prod"] == 2  # without the key it would have moved back
        assert len(g.backend.admitted) == 2
        assert g.sample("deltamux_uploads_open") == 0


@pytest.mark.parametrize("other", [{"seed": 1}, {"alias": "prod"}])
async def test_a_key_stands_for_one_request(tmp_path: Path, other: dict[str, Any]) -> None:
    async with gateway(tmp_path) as g:
        await push(g, "k")
        reply = await push(g, "k", **other)
        refused(reply, 409, "idempotency_key_reused", "idempotency-key")
        assert reply.headers["x-should-retry"] == "false"
        moved = await g.http.delete("/v1/adapters/delta", headers={"idempotency-key": "k"})
        refused(moved, 409, "idempotency_key_reused", "idempotency-key")
        assert (await g.http.get("/v1/adapters/delta")).status_code == 200


async def test_a_request_under_way_is_waited_for(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with gateway(tmp_path, FakeBackend(admit_gate=gate)) as g:
        first = asyncio.create_task(push(g, "k"))
        await until(lambda: bool(g.backend.admitted))
        reply = await push(g, "k")
        refused(reply, 409, "request_in_progress", "idempotency-key")
        assert reply.headers["x-should-retry"] == "true"
        gate.set()
        assert (await push(g, "k")).content in ((await first).content, reply.content)
        await first
        assert (await push(g, "k")).content == (await first).content


async def test_a_refused_request_leaves_its_key_free(tmp_path: Path) -> None:
    answers: list[Any] = [ErrorInfo("Overloaded", "full"), PROOF]
    async with gateway(tmp_path, FakeBackend(admission=lambda _: answers.pop(0))) as g:
        assert (await push(g, "k")).status_code == 429
        assert (await push(g, "k")).status_code == 201
        assert (await push(g, "k")).headers["idempotent-replayed"] == "true"


async def test_a_compare_and_swap_is_answered_as_it_was(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta")
        body, headers = {"version": 1, "expected_revision": 0}, {"idempotency-key": "move"}
        path = "/v1/adapters/delta/aliases/prod"
        first = await g.http.put(path, json=body, headers=headers)
        assert first.status_code == 200
        assert (await g.http.put(path, json=body)).status_code == 409  # lost, without the key
        assert (await g.http.put(path, json=body, headers=headers)).content == first.content


async def test_a_rollback_and_a_signer_are_made_once(tmp_path: Path) -> None:
    public = generate()[1].decode()
    async with gateway(tmp_path) as g:
        for seed in (1, 2):
            await g.push("delta", seed=seed, alias="prod")
        for path, body in (
            ("/v1/adapters/delta/aliases/prod/rollback", {}),
            ("/v1/signers", {"public_key": public}),
        ):
            headers = {"idempotency-key": path}
            first = await g.http.post(path, json=body, headers=headers)
            again = await g.http.post(path, json=body, headers=headers)
            assert (again.status_code, again.content) == (first.status_code, first.content)
            assert first.is_success
            assert again.headers["idempotent-replayed"] == "true"


async def test_what_comes_with_a_deletion_is_bounded(tmp_path: Path) -> None:
    key = [(b"idempotency-key", b"k")]  # under one, the body is looked at
    async with gateway(tmp_path, max_body_bytes=1000) as g:
        await g.push("delta")
        kind, piece = b"application/json", b" " * 100
        num_read = await read_of_endless_body(g.app, "DELETE", "/v1/adapters/delta", kind, piece, headers=key)
        assert num_read == 11
        assert (await g.http.get("/v1/adapters/delta")).status_code == 200


async def test_announcing_a_file_twice_under_one_key_makes_one_upload(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        g.http.headers["idempotency-key"] = "one"
        assert (await begin(g, 10))["id"] == (await begin(g, 10))["id"]
        g.http.headers["idempotency-key"] = "two"
        await begin(g, 10)
        assert len((await g.http.get("/v1/uploads")).json()["data"]) == 2


async def test_keys_belong_to_a_tenant_and_must_be_keys(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for tenant in ("acme", "other"):
            g.use(g.key(tenant))
            reply = await push(g, "k")
            assert reply.status_code == 201
            assert "idempotent-replayed" not in reply.headers
        refused(await push(g, "has a space"), 400, "invalid_value", "idempotency-key")
        refused(await push(g, "x" * 256), 400, "invalid_value", "idempotency-key")


def test_answers_and_claims_end(tmp_path: Path) -> None:
    clock = Clock()
    with Registry(f"sqlite:///{tmp_path}/r.db", clock=clock) as registry:
        keys = registry.idempotency
        lost = keys.claim("t", "k", "f", 10)
        assert isinstance(lost, str)
        clock.now += 10  # its holder was killed
        claim = keys.claim("t", "k", "f", 10)
        assert isinstance(claim, str)
        keys.record("t", "k", lost, Answer(200, "old", None), 100)  # too late
        keys.record("t", "k", claim, Answer(200, "new", None), 100)
        assert keys.claim("t", "k", "f", 10) == Answer(200, "new", None)
        clock.now += 100
        assert isinstance(keys.claim("t", "k", "another", 10), str)
