"""/v1/uploads and /v1/files: a large file comes in parts, and a delta is made of it in bounded memory."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import save

from adapters.canonical import from_canonical, to_canonical
from adapters.errors import InvalidRequest
from adapters.signing import generate, sign
from serving.cli.client import Client
from serving.cli.large import send_large
from serving.tenancy.principal import Scope
from tests.unit.serving.http_support import (
    WIDTH,
    Gateway,
    digest,
    gateway,
    listening,
    pair,
)
from tests.unit.serving.test_http_errors import assert_envelope

PART = 256


def refused(reply: httpx.Response, status: int, code: str, param: str | None) -> None:
    assert_envelope(reply, status)
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error


def md5_of(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def peft_directory(directory: Path, seed: int = 0) -> tuple[Path, Path]:
    """A LoRA of random numbers as PEFT leaves it: (config, tensors)."""
    random = torch.Generator().manual_seed(seed)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {
        key.format("A"): torch.randn(3, WIDTH, generator=random),
        key.format("B"): torch.randn(WIDTH, 3, generator=random),
    }
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny"}
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(save(tensors))
    return directory / "adapter_config.json", directory / "adapter_model.safetensors"


async def begin(g: Gateway, size: int, name: str = "tensors.safetensors", **more: Any) -> dict[str, Any]:
    body = {"bytes": size, "filename": name, "mime_type": "x", "purpose": "user_data", **more}
    reply = await g.http.post("/v1/uploads", json=body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def send(g: Gateway, upload_id: str, data: bytes, **fields: str) -> httpx.Response:
    return await g.http.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("upload", data)}, data=fields)


async def complete(g: Gateway, upload_id: str, part_ids: list[str], **more: str) -> httpx.Response:
    return await g.http.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids, **more})


async def sent(g: Gateway, data: bytes, name: str, *, part: int = PART) -> str:
    """Send a file in parts; its id."""
    upload = await begin(g, len(data), name)
    ids = [
        (await send(g, upload["id"], data[at : at + part])).json()["id"] for at in range(0, len(data), part)
    ]
    done = await complete(g, upload["id"], ids)
    assert done.status_code == 200, done.text
    return str(done.json()["file"]["id"])


async def test_the_sdks_chunked_upload_becomes_a_version(tmp_path: Path) -> None:
    config, tensors = peft_directory(tmp_path / "delta")
    async with gateway(tmp_path) as g, listening(g.app) as (host, port):

        def with_the_sdk() -> Any:
            with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as client:
                upload = client.uploads.upload_file_chunked(
                    file=tensors,
                    mime_type="application/octet-stream",
                    purpose="user_data",
                    part_size=PART,
                    md5=md5_of(tensors.read_bytes()),
                )
                other = client.uploads.upload_file_chunked(
                    file=config.read_bytes(), filename=config.name, bytes=config.stat().st_size,
                    mime_type="application/json", purpose="user_data",
                )  # fmt: skip
                assert upload.status == "completed"
                assert upload.file
                assert other.file
                assert client.files.retrieve(upload.file.id).bytes == tensors.stat().st_size
                body = {"file_ids": [upload.file.id, other.file.id], "alias": "prod", "labels": {"a": "b"}}
                version = client.put("/adapters/large/versions", cast_to=object, body=body)
                assert client.files.delete(upload.file.id).deleted
                with pytest.raises(openai.NotFoundError):
                    client.files.retrieve(upload.file.id)
                return version

        version = await asyncio.to_thread(with_the_sdk)
        plain = await g.http.put(
            "/v1/adapters/plain/versions",
            files=[("file", (path.name, path.read_bytes())) for path in (config, tensors)],
        )
        assert version["digest"] == plain.json()["digest"]
        assert version["labels"] == {"a": "b"}
        blob = g.store.read(version["digest"].removeprefix("sha256:"))
        assert to_canonical(from_canonical(blob.manifest, blob.tensors)).tensors == blob.tensors
        staged = list((tmp_path / "spool" / "staging").iterdir())
        assert staged == []


async def test_files_and_parts_of_a_body_make_one_delta(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        (manifest, tensors) = (data for _, (_, data) in pair(3))
        file_id = await sent(g, tensors, "tensors.safetensors")
        reply = await g.http.put(
            "/v1/adapters/delta/versions",
            files=[("file", ("manifest.json", manifest))],
            data={"file_ids": json.dumps([file_id])},
        )
        assert reply.json()["digest"] == f"sha256:{digest(3)}"
        twice = await g.http.put(
            "/v1/adapters/delta/versions",
            files=[("file", ("manifest.json", manifest)), ("file", ("tensors.safetensors", tensors))],
            data={"file_ids": json.dumps([file_id])},
        )
        refused(twice, 400, "invalid_value", "file_ids")


async def test_a_delta_is_proven_alike_however_it_was_sent(tmp_path: Path) -> None:
    config, tensors = peft_directory(tmp_path / "delta")
    private, public = (half.decode() for half in generate())
    fields = {"lineage": json.dumps({"initialised_from": f"sha256:{digest(7)}"})}
    async with gateway(tmp_path) as g:
        ids = [await sent(g, path.read_bytes(), path.name) for path in (config, tensors)]
        files = [("file", (path.name, path.read_bytes())) for path in (config, tensors)]
        plain = (await g.http.put("/v1/adapters/delta/versions", files=files, data=fields)).json()
        signature = sign(private.encode(), plain["digest"].removeprefix("sha256:"))
        (await g.http.post("/v1/signers", json={"public_key": public})).raise_for_status()
        (await g.http.put("/v1/signature_policy", json={"require_signature": True})).raise_for_status()
        by_id = {"file_ids": ids, **fields}
        refused(
            await g.http.put("/v1/adapters/large/versions", json=by_id), 400, "invalid_signature", "signature"
        )
        reply = await g.http.put("/v1/adapters/large/versions", json=by_id | {"signature": signature})
        proof = reply.raise_for_status().json()["proof"]
        assert proof.pop("signature")["signature"] == signature
        assert proof == plain["proof"]
        assert proof["typology"]["family"] == "reparameterised"
        assert proof["lineage"]["initialised_from"] == f"sha256:{digest(7)}"
        clash = by_id | {"lineage": {"format": "mine"}}
        refused(await g.http.put("/v1/adapters/x/versions", json=clash), 400, "invalid_value", "lineage")


async def test_what_comes_beside_a_delta_is_read_from_files_too(tmp_path: Path) -> None:
    manifest, tensors = peft_directory(tmp_path / "delta")
    async with gateway(tmp_path) as g:
        contents = {path.name: path.read_bytes() for path in (manifest, tensors)}
        contents |= {"head.json": b'{"normalize": true}', "ood.safetensors": save({"a": torch.ones(1)})}
        ids = [await sent(g, data, name) for name, data in contents.items()]
        by_id = await g.http.put("/v1/adapters/x/versions", json={"file_ids": ids})
        files = [("file", item) for item in contents.items()]
        refused(by_id, 400, "invalid_adapter", "head.json")
        assert by_id.json() == (await g.http.put("/v1/adapters/x/versions", files=files)).json()
        assert len(by_id.json()["error"]["problems"]) > 2


async def test_a_header_that_is_dear_to_parse_is_refused_in_a_file_too(tmp_path: Path) -> None:
    header = b'{"a":[' + b",".join([b"[]"] * 340_000) + b"]}"
    async with gateway(tmp_path) as g:
        data = len(header).to_bytes(8, "little") + header
        file_id = await sent(g, data, "tensors.safetensors", part=len(data))
        reply = await g.http.put(
            "/v1/adapters/x/versions", files=[pair(0)[0]], data={"file_ids": json.dumps([file_id])}
        )
        refused(reply, 413, "payload_too_large", "tensors.safetensors")


BAD: dict[str, bytes] = {
    "not safetensors": b"PK\x03\x04" * 100,
    "truncated": pair(0)[1][1][1][:-1],
    "longer than its header says": pair(0)[1][1][1] + b"\0",
    "not a number": save({"a" * 32: torch.full((3,), torch.nan)}),
    "another delta's": pair(5)[1][1][1],
    "no tensors": save({}),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_file_is_checked_as_a_body_is(tmp_path: Path, name: str) -> None:
    manifest = pair(0)[0]
    async with gateway(tmp_path) as g:
        in_body = await g.http.put(
            "/v1/adapters/delta/versions", files=[manifest, ("file", ("tensors.safetensors", BAD[name]))]
        )
        file_id = await sent(g, BAD[name], "tensors.safetensors")
        by_id = await g.http.put(
            "/v1/adapters/delta/versions", files=[manifest], data={"file_ids": json.dumps([file_id])}
        )
        refused(by_id, 400, "invalid_adapter", "adapter")
        assert by_id.json() == in_body.json()
        assert list(g.store.iter_digests()) == []


async def test_a_part_sent_again_is_the_same_part_and_what_came_is_told(tmp_path: Path) -> None:
    data = bytes(range(200)) * 2
    async with gateway(tmp_path) as g:
        upload = await begin(g, len(data), sha256=hashlib.sha256(data).hexdigest())
        first = (await send(g, upload["id"], data[:200])).json()
        assert first["id"] == f"part_{hashlib.sha256(data[:200]).hexdigest()}"
        assert (await send(g, upload["id"], data[:200])).json() == first
        shown = (await g.http.get(f"/v1/uploads/{upload['id']}")).json()
        assert [(part["id"], part["bytes"]) for part in shown["parts"]] == [(first["id"], 200)]
        assert [item["id"] for item in (await g.http.get("/v1/uploads")).json()["data"]] == [upload["id"]]
        # both halves are the same bytes: one part, named twice
        done = await complete(g, upload["id"], [first["id"]] * 2)
        assert done.json()["status"] == "completed"
        assert (await complete(g, upload["id"], [first["id"]] * 2)).json() == done.json()
        refused(await send(g, upload["id"], b"more"), 409, "conflict", "upload_id")
        assert (await g.http.get("/v1/uploads")).json()["data"] == []


async def test_an_upload_goes_on_after_the_server_was_restarted(tmp_path: Path) -> None:
    data = pair(1)[1][1][1]
    async with gateway(tmp_path) as g:
        upload = await begin(g, len(data))
        assert (await send(g, upload["id"], data[:PART])).status_code == 200
    async with gateway(tmp_path) as g:
        come = (await g.http.get(f"/v1/uploads/{upload['id']}")).json()["parts"]
        rest = (await send(g, upload["id"], data[PART:])).json()
        done = (await complete(g, upload["id"], [come[0]["id"], rest["id"]])).json()
    async with gateway(tmp_path) as g:
        reply = await g.http.put(
            "/v1/adapters/delta/versions",
            files=[pair(1)[0]],
            data={"file_ids": json.dumps([done["file"]["id"]])},
        )
        assert reply.json()["digest"] == f"sha256:{digest(1)}"


async def test_checksums_and_sizes_must_be_those_announced(tmp_path: Path) -> None:
    async with gateway(tmp_path, max_upload_bytes=1000) as g:
        upload = (await begin(g, 8, sha256="0" * 64))["id"]
        one, two = [(await send(g, upload, data)).json()["id"] for data in (b"1234", b"5678")]
        refused(await send(g, upload, b"9"), 400, "invalid_value", "data")
        refused(await send(g, upload, b"1234", sha256="0" * 64), 400, "invalid_value", "sha256")
        refused(await complete(g, upload, [one]), 400, "invalid_value", "part_ids")
        refused(await complete(g, upload, [one, f"part_{'0' * 64}"]), 400, "invalid_value", "part_ids")
        refused(await complete(g, upload, [one, two]), 400, "invalid_value", "sha256")
        refused(await complete(g, upload, [one, two], md5="0" * 32), 400, "invalid_value", "md5")
        right = (await begin(g, 8, sha256=hashlib.sha256(b"56781234").hexdigest()))["id"]
        for data in (b"1234", b"5678"):
            await send(g, right, data)
        refused(await complete(g, right, [one, two]), 400, "invalid_value", "sha256")
        md5 = md5_of(b"56781234")
        assert (await complete(g, right, [two, one], md5=md5)).json()["status"] == "completed"
        left = [path.name for path in (tmp_path / "spool" / upload).iterdir()]
        assert f"part-{hashlib.sha256(b'9').hexdigest()}" not in left


async def test_what_is_too_large_is_refused_at_the_first_excess_byte(tmp_path: Path) -> None:
    async with gateway(tmp_path, max_upload_bytes=100, max_file_bytes=1000) as g:
        body = {"bytes": 1001, "filename": "f", "mime_type": "x", "purpose": "user_data"}
        refused(await g.http.post("/v1/uploads", json=body), 413, "payload_too_large", "bytes")
        upload = (await begin(g, 1000))["id"]
        refused(await send(g, upload, b"x" * 101), 413, "payload_too_large", None)
        refused(await send(g, upload, b"x" * 200_000), 413, "payload_too_large", None)
        assert (await send(g, upload, b"x" * 100)).status_code == 200
        assert len(list((tmp_path / "spool" / upload).iterdir())) == 1
        assert g.sample("deltamux_uploads_open") == 0


MALFORMED = {
    "no part": (b"--b--\r\n", "data"),
    "cut short": (b'--b\r\ncontent-disposition: form-data; name="data"\r\n\r\nabc', "body"),
    "another field": (b'--b\r\ncontent-disposition: form-data; name="x"\r\n\r\nabc\r\n--b--\r\n', "field"),
    "twice": (b'--b\r\ncontent-disposition: form-data; name="data"\r\n\r\na\r\n' * 2 + b"--b--\r\n", "data"),
    "no multipart": (b"hello", "body"),
    "a long header": (b"--b\r\nx: " + b"y" * 9999 + b"\r\n\r\n", "body"),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_part_leaves_nothing(tmp_path: Path, name: str) -> None:
    content, param = MALFORMED[name]
    async with gateway(tmp_path) as g:
        upload = (await begin(g, 100))["id"]
        reply = await g.http.post(
            f"/v1/uploads/{upload}/parts",
            content=content,
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
        refused(reply, 400, "invalid_value", param)
        assert list((tmp_path / "spool" / upload).iterdir()) == []
        assert (await g.http.get(f"/v1/uploads/{upload}")).json()["parts"] == []


async def test_uploads_of_others_are_not_found(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        g.use(g.key("acme"))
        upload = await begin(g, 4)
        part = (await send(g, upload["id"], b"1234")).json()["id"]
        file_id = (await complete(g, upload["id"], [part])).json()["file"]["id"]
        g.use(g.key("other"))
        path = f"/v1/uploads/{upload['id']}"
        for reply in (
            await g.http.get(path),
            await send(g, upload["id"], b"1234"),
            await complete(g, upload["id"], [part]),
            await g.http.post(f"{path}/cancel"),
        ):
            refused(reply, 404, "not_found", "upload_id")
        for reply in (
            await g.http.get(f"/v1/files/{file_id}"),
            await g.http.delete(f"/v1/files/{file_id}"),
            await g.http.put("/v1/adapters/delta/versions", json={"file_ids": [file_id]}),
        ):
            refused(reply, 404, "not_found", "file_id")
        assert (await g.http.get("/v1/files")).json()["data"] == []
        g.use(g.key("acme", Scope.INFER))
        refused(await g.http.get(path), 403, "insufficient_permissions", None)


class BrokenClient(Client):
    """Notes the parts that it sends; the connection breaks for good before part number `last` + 1."""

    def __init__(self, server: str, last: int = 99) -> None:
        super().__init__(server)
        self.sent = 0
        self._last = last

    def call(self, method: str, *path: str, **options: Any) -> Any:
        if path[-1] == "parts":
            if self.sent == self._last:
                raise InvalidRequest("unplugged")
            self.sent += 1
        return super().call(method, *path, **options)


async def test_a_push_that_broke_off_is_gone_on_with(tmp_path: Path) -> None:
    config, tensors = peft_directory(tmp_path / "delta")
    files = {path.name: path for path in (tensors, config)}
    num_parts = -(-tensors.stat().st_size // 100) + -(-config.stat().st_size // 100)
    async with gateway(tmp_path) as g, listening(g.app) as (host, port):

        def push(last: int) -> tuple[int, Any, int]:
            shown: list[int] = []
            with BrokenClient(f"http://{host}:{port}", last) as client:
                version = send_large(
                    client, "delta", files, fields={"alias": "prod"}, on_bytes=shown.append, part_bytes=100
                )
                return client.sent, version, sum(shown)

        with pytest.raises(InvalidRequest, match="unplugged"):
            await asyncio.to_thread(push, 2)
        sent, version, shown = await asyncio.to_thread(push, 99)
        assert sent == num_parts - 2
        assert shown == sum(path.stat().st_size for path in files.values())
        assert version["method"] == "LORA"
        assert g.registry.get_adapter("default", "delta").aliases[-1].alias == "prod"
        assert (await g.http.get("/v1/files")).json()["data"] == []
