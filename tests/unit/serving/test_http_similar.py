"""The search for prompts like another one, over HTTP and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.canonical import Canonical, to_canonical
from adapters.errors import ErrorInfo
from adapters.normal_form import Delta, VirtualTokens
from tests.unit.serving.cli_support import commands
from tests.unit.serving.http_support import SPEC, WIDTH, FakeBackend, Gateway, gateway
from tests.unit.serving.test_http_errors import assert_envelope

PATH = "/v1/adapters/{}/versions/1/similar"
BASE = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH)
DRAW = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


def prompt(distance: float) -> Canonical:
    op = VirtualTokens(embeddings=BASE + distance * DRAW)
    delta = Delta(method="PROMPT_TUNING", ops=(op,), position_offset=3, backbone_digest=SPEC.digest)
    return to_canonical(delta)


async def push(g: Gateway, name: str, distance: float) -> str:
    canonical = prompt(distance)
    files = {"manifest.json": canonical.manifest, "tensors.safetensors": canonical.tensors}
    parts = [("file", (file, data)) for file, data in files.items()]
    (await g.http.put(f"/v1/adapters/{name}/versions", files=parts)).raise_for_status()
    return canonical.digest


async def found(g: Gateway, name: str, **query: Any) -> list[str]:
    reply = (await g.http.get(PATH.format(name), params=query)).raise_for_status()
    return [item["id"] for item in reply.json()["data"]]


async def test_the_nearest_comes_first_and_equals_come_by_name(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for name, distance in (("far", 3.0), ("near", 0.1), ("b-twin", 0.0), ("a-twin", 0.0), ("me", 0.0)):
            await push(g, name, distance)
        await g.push("a-lora")
        order = ["a-twin@v1", "b-twin@v1", "near@v1", "far@v1"]
        assert await found(g, "me") == order
        assert await found(g, "me") == order
        assert await found(g, "me", top=1) == order[:1]
        body = (await g.http.get(PATH.format("me"))).json()
        twin, near = body["data"][0], body["data"][2]
        assert (twin["mean_cosine"], twin["token_cosine"], twin["activation_overlap"]) == (1.0, 1.0, 1.0)
        assert 0.9 < near["mean_cosine"] < 1
        assert (body["num_compared"], body["has_more"]) == (4, False)
        back = (await g.http.get(PATH.format("near"))).json()["data"]
        (mirrored,) = [item for item in back if item["id"] == "me@v1"]
        for measure in ("mean_cosine", "token_cosine", "activation_overlap"):
            assert mirrored[measure] == near[measure]


async def test_only_the_callers_own_prompts_are_compared(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        acme, own = g.key("acme"), g.key()
        g.use(acme)
        await push(g, "theirs", 0.0)
        g.use(own)
        await push(g, "me", 0.0)
        await push(g, "mine", 1.0)
        assert await found(g, "me") == ["mine@v1"]
        g.use(g.key("default", adapters=["me"]))
        assert await found(g, "me") == []
        assert_envelope(await g.http.get(PATH.format("mine")), 404, "name")


async def test_activations_are_left_out_where_they_are_not_wanted_or_not_to_be_had(tmp_path: Path) -> None:
    asked: list[str] = []

    def activated(digest: str) -> bytes | ErrorInfo:
        asked.append(digest)
        return ErrorInfo("Overloaded", "No room.")

    async with gateway(tmp_path, FakeBackend(activated=activated)) as g:
        for name, distance in (("me", 0.0), ("other", 1.0)):
            await push(g, name, distance)
        for query, num_asked in (({"activations": "false"}, 0), ({}, 1)):
            (item,) = (await g.http.get(PATH.format("me"), params=query)).json()["data"]
            assert item["activation_overlap"] is None
            assert len(asked) == num_asked


async def test_what_is_no_prompt_and_faulty_numbers(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push("lora")
        reply = await g.http.get(PATH.format("lora"))
        assert_envelope(reply, 400, "version")
        assert "LORA" in reply.json()["error"]["message"]
        for top in ("0", "21", "x"):
            assert_envelope(await g.http.get(PATH.format("lora"), params={"top": top}), 400, "top")


async def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(tmp_path) as g:
        run = commands(g, monkeypatch)
        await push(g, "me", 0.0)
        digest = await push(g, "other", 1.0)
        g.backend.activated = lambda found: b"\x03" if found == digest else b"\x01"
        shown = await run("adapters", "similar", "me", "--top", "3")
        assert "other@v1" in shown
        assert "0.5" in shown
        assert "1 prompts of the same form compared" in shown
