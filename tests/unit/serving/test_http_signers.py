"""Signed uploads: off by default, and where a tenant wants them nothing else gets in."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.canonical import to_canonical
from adapters.signing import generate, read_public_key, sign, signer_id
from tests.unit.serving.cli_support import commands
from tests.unit.serving.http_support import Gateway, digest, gateway, lora
from tests.unit.serving.test_http_errors import assert_envelope
from tests.unit.serving.test_http_uploads import peft_files

PRIVATE, PUBLIC = (half.decode() for half in generate())
OTHER = generate()[0]


async def require(g: Gateway, required: bool = True) -> None:
    body = {"require_signature": required}
    (await g.http.put("/v1/signature_policy", json=body)).raise_for_status()


async def accept(g: Gateway) -> str:
    reply = await g.http.post("/v1/signers", json={"public_key": PUBLIC, "label": "ci"})
    return str(reply.raise_for_status().json()["id"])


async def test_an_unsigned_upload_is_taken_until_the_tenant_wants_signatures(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        assert "signature" not in (await g.push("delta", seed=1)).json()["proof"]
        await accept(g)
        await require(g)
        stored = list(g.store.iter_digests())
        refused = await g.push("delta", seed=2)
        assert_envelope(refused, 400, "signature")
        assert refused.json()["error"]["code"] == "invalid_signature"
        assert list(g.store.iter_digests()) == stored
        await require(g, False)
        assert (await g.push("delta", seed=2)).status_code == 201


async def test_a_signed_upload_says_so_in_its_proof(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        signer = await accept(g)
        await require(g)
        signature = sign(PRIVATE.encode(), digest(1))
        proof = (await g.push("delta", seed=1, signature=signature)).raise_for_status().json()["proof"]
        public_key = read_public_key(PUBLIC)
        assert signer == signer_id(public_key)
        assert proof["signature"] == {
            "signer": signer,
            "public_key": public_key,
            "label": "ci",
            "signature": signature,
        }


@pytest.mark.parametrize("required", [True, False])
async def test_a_wrong_signature_is_refused_also_where_none_is_wanted(tmp_path: Path, required: bool) -> None:
    async with gateway(tmp_path) as g:
        signer = await accept(g)
        await require(g, required)
        of_another = sign(PRIVATE.encode(), digest(2))
        by_another = sign(OTHER, digest(1))
        for signature in (of_another, by_another, "x", "é"):
            reply = await g.push("delta", seed=1, signature=signature)
            assert_envelope(reply, 400, "signature")
        good = sign(PRIVATE.encode(), digest(1))
        (await g.http.delete(f"/v1/signers/{signer}")).raise_for_status()
        assert_envelope(await g.push("delta", seed=1, signature=good), 400, "signature")
        assert list(g.store.iter_digests()) == []


async def test_a_tenants_signers_are_its_own(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        own, acme = g.key(), g.key("acme")
        g.use(own)
        signer = await accept(g)
        await require(g)
        g.use(acme)
        assert (await g.http.get("/v1/signers")).json() == {
            "object": "list",
            "data": [],
            "require_signature": False,
        }
        for unknown in (signer, "%00", "x"):
            assert_envelope(await g.http.delete(f"/v1/signers/{unknown}"), 404, "signer")
        signature = sign(PRIVATE.encode(), digest(1))
        assert_envelope(await g.push("delta", seed=1, signature=signature), 400, "signature")
        assert (await g.push("delta", seed=1)).status_code == 201


async def test_faulty_signers(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await accept(g)
        for body, status, param in (
            ({"public_key": PUBLIC}, 409, "public_key"),
            ({"public_key": PRIVATE}, 400, "public_key"),
            ({"public_key": "x"}, 400, "public_key"),
            ({"public_key": "11" * 32, "label": "a\nb"}, 400, "label"),
            ({}, 400, "public_key"),
        ):
            assert_envelope(await g.http.post("/v1/signers", json=body), status, param)


async def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(tmp_path) as g:
        run = commands(g, monkeypatch)
        key = tmp_path / "ci.pem"
        await run("signers", "generate", str(key))
        assert key.stat().st_mode & 0o777 == 0o600
        assert "can't be written" in await run("signers", "generate", str(key), exit_code=1)
        await run("signers", "add", f"{key}.pub", "--label", "ci")
        assert "must be signed" in await run("signers", "require")
        assert "ci" in await run("signers", "list")

        directory = tmp_path / "delta"
        directory.mkdir()
        canonical = to_canonical(lora(1))
        (directory / "manifest.json").write_bytes(canonical.manifest)
        (directory / "tensors.safetensors").write_bytes(canonical.tensors)
        assert "signed uploads only" in await run("push", str(directory), "delta", exit_code=1)
        assert "signature: signer" in await run("push", str(directory), "delta", "--sign", str(key))
        lineage = ("--lineage", "a=b")
        assert "after it was signed" in await run(
            "push", str(directory), "delta", "--sign", str(key), *lineage, exit_code=1
        )
        out = tmp_path / "out"
        assert "signed by" in await run("adapters", "pull", "delta", str(out), "--signed-by", f"{key}.pub")
        other = tmp_path / "other.pem"
        await run("signers", "generate", str(other))
        refused = await run(
            "adapters", "pull", "delta", str(out / "2"), "--signed-by", f"{other}.pub", exit_code=1
        )
        assert "is not signed with" in refused
        assert not (out / "2").exists()

        (tmp_path / "peft").mkdir()
        for _, (file, data) in peft_files():
            (tmp_path / "peft" / file).write_bytes(data)
        assert "canonical form" in await run(
            "push", str(tmp_path / "peft"), "delta", "--sign", str(key), exit_code=1
        )
        assert "need not be signed" in await run("signers", "require", "--off")
        (signer,) = g.tenancy.signers.list("default")
        await run("signers", "revoke", signer.id)
        assert "revoked" in await run("signers", "list")
