"""Files of versions, and what two versions differ in, over HTTP and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.canonical import to_canonical
from adapters.store import FILES
from serving.tenancy.principal import Scope
from tests.unit.serving.cli_support import commands
from tests.unit.serving.http_support import digest, gateway, lora
from tests.unit.serving.test_http_errors import assert_envelope

VERSIONS = "/v1/adapters/delta/versions"


async def test_files_come_byte_for_byte_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.http.contents.PIECE_BYTES", 50)
    async with gateway(tmp_path) as g:
        await g.push("delta", seed=3)
        canonical = to_canonical(lora(3))
        for file, data in zip(FILES, (canonical.manifest, canonical.tensors), strict=True):
            reply = await g.http.get(f"{VERSIONS}/1/files/{file}")
            assert reply.content == data
            assert reply.headers["content-length"] == str(len(data))
            assert reply.headers["x-adapter-digest"] == f"sha256:{canonical.digest}"
        assert_envelope(await g.http.get(f"{VERSIONS}/1/files/sizes.json"), 404, "file")
        assert_envelope(await g.http.get(f"{VERSIONS}/2/files/{FILES[0]}"), 404, "name")


async def test_a_key_for_inference_gets_no_weights(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta")
        for scope, status in ((Scope.INFER, 403), (Scope.UPLOAD, 200), (Scope.MANAGE, 200)):
            g.use(g.key("default", scope))
            assert (await g.http.get(f"{VERSIONS}/1/files/{FILES[1]}")).status_code == status
        g.use(g.key("acme"))
        assert_envelope(await g.http.get(f"{VERSIONS}/1/files/{FILES[1]}"), 404, "name")


async def test_a_diff_needs_both_versions_to_be_the_callers(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for seed in (1, 2):
            await g.push("delta", seed=seed)
        found = (await g.http.get(f"{VERSIONS}/1/diff", params={"against": "delta"})).json()
        assert [item["id"] for item in found["between"]] == ["delta@v1", "delta@v2"]
        assert found["distance"] > 1
        for against in ("delta@v9", "other/delta", "nothing"):
            reply = await g.http.get(f"{VERSIONS}/1/diff", params={"against": against})
            assert_envelope(reply, 404, "model")
        assert_envelope(await g.http.get(f"{VERSIONS}/1/diff", params={"against": "No!"}), 400, "model")
        assert_envelope(await g.http.get(f"{VERSIONS}/1/diff"), 400, "against")


async def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(tmp_path) as g:
        run = commands(g, monkeypatch)
        for seed in (1, 2):
            await g.push("delta", seed=seed, alias="prod")
        shown = await run("adapters", "diff", "delta@v1", "delta:prod")
        assert "0.attn.x -> 0.q.out" in shown
        assert "rank 2" in shown
        assert "distance:" in shown
        assert "the two are equal" in await run("adapters", "diff", "delta", "delta@v2")

        target = tmp_path / "pulled" / "delta"
        for reference in ("delta", "delta:prod", "delta@v2", f"delta@sha256:{digest(2)}"):
            assert f"sha256:{digest(2)}" in await run("adapters", "pull", reference, str(target))
            canonical = to_canonical(lora(2))
            assert {path.name: path.read_bytes() for path in target.iterdir()} == {
                "manifest.json": canonical.manifest,
                "tensors.safetensors": canonical.tensors,
            }
            assert "not an empty directory" in await run(
                "adapters", "pull", "delta", str(target), exit_code=1
            )
            for path in target.iterdir():
                path.unlink()
        await run("adapters", "pull", "delta@v1", str(target))
        assert "delta@v1" in await run("push", str(target), "delta")  # the same version again
        for reference in ("absent", "delta:none", "delta@v9", f"delta@sha256:{'0' * 64}"):
            assert "does not exist" in await run(
                "adapters", "pull", reference, str(tmp_path / "x"), exit_code=1
            )


async def test_pull_keeps_nothing_whose_digest_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(tmp_path) as g:
        run = commands(g, monkeypatch)
        await g.push("delta")
        (stored,) = (tmp_path / "blobs").rglob("tensors.safetensors")
        data = bytearray(stored.read_bytes())
        data[-1] ^= 1
        stored.write_bytes(data)
        says = await run("adapters", "pull", "delta", str(tmp_path / "out"), exit_code=1)
        assert f"the server says sha256:{digest()}" in says
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".pull-*"))
