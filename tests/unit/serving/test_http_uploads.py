"""PUT /v1/adapters/{name}/versions: what is acknowledged is durable and proven, what fails leaves nothing."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from adapters.canonical import from_canonical, to_canonical
from adapters.collector import Collector
from adapters.errors import ErrorInfo, RegistryUnavailable, StoreError, Unavailable
from adapters.registry import Registry
from adapters.store import LocalBlobStore
from adapters.typology import describe
from serving.core import AdmissionProof
from serving.http.multipart import MAX_JSON_BYTES
from tests.unit.serving.http_support import (
    BACKBONE,
    PROOF,
    SPEC,
    WIDTH,
    FakeBackend,
    Gateway,
    digest,
    gateway,
    listening,
    lora,
    pair,
    until,
)
from tests.unit.serving.test_http_errors import assert_envelope, read_of_endless_body

PATH = "/v1/adapters/delta/versions"
Files = list[tuple[str, tuple[str, bytes]]]


def peft_files(**config: Any) -> Files:
    """A LoRA as PEFT's save_pretrained leaves it."""
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    settings["base_model_name_or_path"] = BACKBONE
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.ones(2, WIDTH), key.format("B"): torch.ones(WIDTH, 2)}
    return [
        ("file", ("adapter_config.json", json.dumps({**settings, **config}).encode())),
        ("file", ("adapter_model.safetensors", save(tensors))),
    ]


def left(g: Gateway) -> tuple[set[str], list[str], list[Path]]:
    """What is in the store, in the registry and in the staging area."""
    names = [adapter.name for adapter in g.registry.list_adapters("default").items]
    staged = list(next(Path(g.store._staging).parent.glob("staging")).iterdir())
    return set(g.store.iter_digests()), names, staged


NOTHING: tuple[set[str], list[str], list[Path]] = (set(), [], [])


async def test_an_upload_becomes_a_version(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.push("delta", labels='{"team": "a"}', alias="prod", backbone_digest=SPEC.digest)
        assert reply.status_code == 201
        body = reply.json()
        assert body.pop("created") > 0
        assert body.pop("size_bytes") > 0
        assert body == {
            "id": "delta@v1",
            "object": "adapter.version",
            "name": "delta",
            "version": 1,
            "digest": f"sha256:{digest()}",
            "status": "ready",
            "method": "LORA",
            "task": "causal-lm",
            "backbone_digest": SPEC.digest,
            "labels": {"team": "a"},
            "proof": {**asdict(PROOF), "typology": describe(lora(), to_canonical(lora())), "lineage": {}},
        }
        assert reply.headers["x-adapter-digest"] == f"sha256:{digest()}"
        blob = g.store.read(digest())
        stored = from_canonical(blob.manifest, blob.tensors)
        assert torch.equal(stored.ops[0].A, lora().ops[0].A)  # type: ignore[union-attr]
        aliases = {alias.alias: alias.version for alias in g.registry.get_adapter("default", "delta").aliases}
        assert aliases == {"latest": 1, "prod": 1}
        assert g.backend.admitted == [digest()]
        assert g.sample("deltamux_uploads_total", outcome="ready") == 1
        assert g.sample("deltamux_uploads_open") == 0


async def test_a_peft_directory_becomes_a_version(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.put(PATH, files=peft_files())
        assert reply.status_code == 201, reply.text
        assert reply.json()["method"] == "LORA"


async def test_versions_count_up_and_a_repeated_upload_is_the_same_one(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        assert [(await g.push("delta", seed=seed)).json()["version"] for seed in (1, 2, 1)] == [1, 2, 1]
        assert (await g.http.get("/v1/adapters/delta")).json()["latest"]["version"] == 2


async def test_a_repeated_upload_can_move_an_alias(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for seed in (1, 2):
            await g.push("delta", seed=seed)
        await g.push("delta", seed=1, alias="latest")
        assert (await g.http.get("/v1/adapters/delta")).json()["latest"]["version"] == 1


async def test_the_version_is_visible_only_after_admission(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with gateway(tmp_path, FakeBackend(admit_gate=gate)) as g:
        upload = asyncio.create_task(g.push("delta"))
        await until(lambda: bool(g.backend.admitted))
        assert (await g.http.get("/v1/adapters/delta")).status_code == 404
        assert g.store.exists(digest())  # the backend loads it from there
        assert g.sample("deltamux_uploads_open") == 1
        gate.set()
        assert (await upload).status_code == 201


REFUSED_FILES: list[tuple[str, Files, dict[str, str], str]] = [
    ("no parts", [], {"alias": "prod"}, "invalid_adapter"),
    ("one file only", pair()[:1], {}, "invalid_adapter"),
    ("a file of no format", [*pair(), ("file", ("notes.txt", b"x"))], {}, "invalid_adapter"),
    ("a path as a file name", [("file", ("../manifest.json", b"{}")), pair()[1]], {}, "invalid_adapter"),
    ("a pickle", [*peft_files()[:1], ("file", ("adapter_model.bin", b"\x80\x02"))], {}, "invalid_adapter"),
    (
        "not safetensors",
        [pair()[0], ("file", ("tensors.safetensors", b"PK\x03\x04" * 9))],
        {},
        "invalid_adapter",
    ),
    ("not JSON", [("file", ("manifest.json", b"{")), pair()[1]], {}, "invalid_adapter"),
    ("tensors of another delta", [pair(1)[0], pair(2)[1]], {}, "invalid_adapter"),
    ("another backbone", pair(backbone_digest="c" * 64), {}, "invalid_adapter"),
    ("another backbone, said so", pair(), {"backbone_digest": "c" * 64}, "invalid_adapter"),
    ("a PEFT key nobody knows", peft_files(surprise=1), {}, "invalid_adapter"),
    ("the same file twice", [pair()[0], pair()[0], pair()[1]], {}, "invalid_value"),
    ("an unknown field", pair(), {"tenant": "x"}, "invalid_value"),
    ("a bad alias", pair(), {"alias": "../x"}, "invalid_value"),
    ("labels that are no JSON", pair(), {"labels": "{"}, "invalid_value"),
    ("labels that are a list", pair(), {"labels": "[]"}, "invalid_value"),
    ("labels that are numbers", pair(), {"labels": '{"a": 1}'}, "invalid_value"),
    ("too many labels", pair(), {"labels": json.dumps({str(i): "" for i in range(33)})}, "invalid_value"),
    ("a long label", pair(), {"labels": json.dumps({"a": "x" * 257})}, "invalid_value"),
]


async def test_all_problems_of_an_upload_come_in_one_reply(tmp_path: Path) -> None:
    config, _ = peft_files(surprise=1)
    stray = {"base_model.model.model.layers.0.nowhere.lora_A.weight": torch.ones(2, WIDTH)}
    weights = ("file", ("adapter_model.safetensors", save(stray)))
    async with gateway(tmp_path) as g:
        reply = await g.http.put(PATH, files=[config, weights], data={"backbone_digest": "c" * 64})
        assert_envelope(reply, 400)
        told = "\n".join(reply.json()["error"]["problems"])
        assert all(fragment in told for fragment in ("surprise", "nowhere", "another backbone", "lora_B"))
        assert left(g) == NOTHING


@pytest.mark.parametrize(
    ("files", "fields", "code"),
    [case[1:] for case in REFUSED_FILES],
    ids=[case[0] for case in REFUSED_FILES],
)
async def test_refused_content_leaves_nothing(
    tmp_path: Path, files: Files, fields: dict[str, str], code: str
) -> None:
    async with gateway(tmp_path) as g:
        # `files` must not be empty for httpx to send multipart
        parts = files or [("alias", (None, b"prod"))]
        reply = await g.http.put(PATH, files=parts, data=fields if files else {})  # type: ignore[arg-type]
        assert_envelope(reply, 400)
        error = reply.json()["error"]
        assert error["code"] == code
        if code == "invalid_adapter":
            assert error["problems"]
        assert left(g) == NOTHING
        assert g.backend.admitted == []
        assert g.sample("deltamux_uploads_total", outcome=code) == 1


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("UPPER", 400, "invalid_value"), ("a..b", 400, "invalid_value"), (BACKBONE, 409, "conflict")],
)
async def test_refused_names(tmp_path: Path, name: str, status: int, code: str) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.push(name)
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert left(g) == NOTHING


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("multipart/form-data; boundary=b", b""),
        ("application/json", b"{}"),
        ("application/x-www-form-urlencoded", b"a=b"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"no boundary in here"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nx',
        ),
        ("multipart/form-data; boundary=b", b"--b\r\nx: y\r\n\r\nx\r\n--b--\r\n"),
        ("multipart/form-data; boundary=" + "b" * 300, b"x"),
        ("", b"x"),
    ],
)
async def test_bodies_that_are_no_multipart(tmp_path: Path, content_type: str, content: bytes) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.put(PATH, content=content, headers={"content-type": content_type})
        assert_envelope(reply, 400)
        assert left(g) == NOTHING


async def test_a_body_without_its_end_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        request = g.http.build_request("PUT", PATH, files=pair())
        whole, kind = request.read(), {"content-type": request.headers["content-type"]}
        cut = whole[: whole.rindex(b"\r\n--")]
        reply = await g.http.put(PATH, content=cut + b"\r\n", headers=kind)  # both files are in there
        assert_envelope(reply, 400)
        assert "closing boundary" in reply.json()["error"]["message"]
        assert left(g) == NOTHING
        assert (await g.http.put(PATH, content=whole, headers=kind)).status_code == 201


async def test_too_many_parts(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.put(PATH, files=[("file", (f"{index}.json", b"x")) for index in range(50)])
        assert_envelope(reply, 400)


@pytest.mark.parametrize("chunked", [False, True])
async def test_over_the_limit(tmp_path: Path, chunked: bool) -> None:
    async with gateway(tmp_path, max_upload_bytes=500) as g:
        request = g.http.build_request("PUT", PATH, files=pair())
        if chunked:
            body = request.read()

            async def pieces() -> Any:
                for start in range(0, len(body), 100):
                    yield body[start : start + 100]

            kind = request.headers["content-type"]
            request = g.http.build_request("PUT", PATH, content=pieces(), headers={"content-type": kind})
            assert "content-length" not in request.headers
        reply = await g.http.send(request)
        assert_envelope(reply, 413)
        assert reply.json()["error"]["code"] == "payload_too_large"
        assert left(g) == NOTHING
        assert g.sample("deltamux_uploads_open") == 0


async def test_reading_stops_at_the_first_excess_byte(tmp_path: Path) -> None:
    async with gateway(tmp_path, max_upload_bytes=1000) as g:
        kind = b"multipart/form-data; boundary=b"
        head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="manifest.json"\r\n\r\n'
        num_read = await read_of_endless_body(g.app, "PUT", PATH, kind, b"x" * 400, head=head)
        assert num_read == 4


async def test_a_declared_length_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    async with gateway(tmp_path, max_upload_bytes=1000) as g, listening(g.app) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        head = f"PUT {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 2000000000\r\nexpect: 100-continue\r\n"
        writer.write(head.encode() + b"content-type: multipart/form-data; boundary=b\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 413")  # and no "100 Continue" before it
        writer.close()


async def test_a_client_reads_the_413_although_it_is_still_sending(tmp_path: Path) -> None:
    async with gateway(tmp_path, max_upload_bytes=1000) as g, listening(g.app) as (host, port):
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
            reply = await client.put(PATH, files=[("file", ("manifest.json", b"x" * (8 << 20)))])
        assert_envelope(reply, 413)


@pytest.mark.parametrize(
    ("admission", "status", "code"),
    [
        (ErrorInfo("InvalidDelta", "p", None, None, ("p",)), 400, "invalid_adapter"),
        (ErrorInfo("Overloaded", "No room on the device."), 429, "rate_limit_exceeded"),
        (ErrorInfo("Unavailable", "No replica."), 503, "unavailable"),
    ],
)
async def test_a_delta_that_is_not_admitted_leaves_nothing(
    tmp_path: Path, admission: AdmissionProof | ErrorInfo, status: int, code: str
) -> None:
    async with gateway(tmp_path, FakeBackend(admission=lambda _: admission)) as g:
        reply = await g.push("delta", alias="prod")
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert left(g) == NOTHING
        assert g.backend.released == [digest()]  # nor does it stay in device memory


class NoPublish(Registry):
    """A registry that fails as it commits."""

    def publish(self, *args: Any, **kwargs: Any) -> Any:
        raise RegistryUnavailable("The registry's database is locked.")


class NoPut(LocalBlobStore):
    """A store on a full disk."""

    def put(self, *args: Any, **kwargs: Any) -> None:
        raise StoreError("The store can't store a blob: No space left on device.")


@pytest.mark.parametrize("parts", [{"registry_type": NoPublish}, {"store_type": NoPut}])
async def test_a_failing_part_leaves_nothing(tmp_path: Path, parts: dict[str, Any]) -> None:
    async with gateway(tmp_path, **parts) as g:
        assert_envelope(await g.push("delta", alias="prod"), 503)
        assert left(g) == NOTHING


async def test_an_exception_of_the_backend_leaves_nothing(tmp_path: Path) -> None:
    def explode(_: str) -> AdmissionProof:
        raise ValueError("a bug")

    async with gateway(tmp_path, FakeBackend(admission=explode)) as g:
        assert_envelope(await g.push("delta"), 500)
        assert left(g) == NOTHING


async def test_a_cleanup_that_fails_leaves_the_first_error(tmp_path: Path) -> None:
    info = ErrorInfo("Overloaded", "No room.")
    backend = FakeBackend(admission=lambda _: info, failure=Unavailable("gone"))
    async with gateway(tmp_path, backend) as g:
        assert_envelope(await g.push("delta"), 429)
        assert left(g) == NOTHING


async def test_a_failed_upload_spares_the_content_of_a_live_version(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push("first")
        g.backend.admission = lambda _: ErrorInfo("Overloaded", "No room.")
        assert (await g.push("second")).status_code == 429
        assert left(g) == ({digest()}, ["first"], [])
        assert g.backend.released == []


class OneByOne(FakeBackend):
    """Refuses the first delta and admits the second, each at its own signal."""

    def __init__(self) -> None:
        super().__init__()
        self.signals = (asyncio.Event(), asyncio.Event())

    async def admit(self, digest: str) -> AdmissionProof | ErrorInfo:
        self.admitted.append(digest)
        place = len(self.admitted) - 1
        await self.signals[place].wait()
        return PROOF if place else ErrorInfo("Overloaded", "No room.")


async def test_two_uploads_of_one_content_do_not_delete_each_others_bytes(tmp_path: Path) -> None:
    backend = OneByOne()
    async with gateway(tmp_path, backend) as g:
        uploads = [asyncio.create_task(g.push(name)) for name in ("a", "b")]
        await until(lambda: g.sample("deltamux_uploads_open") == 2)
        await asyncio.sleep(0.05)  # time for the second to come as far as it may
        backend.signals[0].set()
        done, _ = await asyncio.wait(uploads, return_when=asyncio.FIRST_COMPLETED)
        assert [upload.result().status_code for upload in done] == [429]
        backend.signals[1].set()
        assert sorted([(await upload).status_code for upload in uploads]) == [201, 429]
        assert set(g.store.iter_digests()) == {digest()}


async def test_uploads_beyond_the_bound_are_refused_at_once(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with gateway(tmp_path, FakeBackend(admit_gate=gate), max_open_uploads=2) as g:
        first = [asyncio.create_task(g.push(f"d{seed}", seed=seed)) for seed in (1, 2)]
        await until(lambda: len(g.backend.admitted) == 2)
        reply = await g.push("d3", seed=3)
        assert_envelope(reply, 429)
        assert reply.headers["retry-after"] == "1"
        gate.set()
        assert [(await upload).status_code for upload in first] == [201, 201]
        assert (await g.push("d3", seed=3)).status_code == 201


async def test_a_body_that_stalls_gives_its_place_back(tmp_path: Path) -> None:
    async with (
        gateway(tmp_path, max_open_uploads=1, request_timeout_s=0.1) as g,
        listening(g.app) as (host, port),
    ):
        _, writer = await asyncio.open_connection(host, port)
        head = f"PUT {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
        writer.write(head.encode() + b"content-type: multipart/form-data; boundary=b\r\n\r\n--b")
        await until(lambda: g.sample("deltamux_uploads_open") == 1)
        await until(lambda: g.sample("deltamux_uploads_open") == 0)
        writer.close()
        assert g.sample("deltamux_uploads_total", outcome="unavailable") == 1


async def test_a_caller_that_goes_away_while_sending_leaves_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g, listening(g.app) as (host, port):
        _, writer = await asyncio.open_connection(host, port)
        head = f"PUT {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
        writer.write(head.encode() + b"content-type: multipart/form-data; boundary=b\r\n\r\n--b")
        await until(lambda: g.sample("deltamux_uploads_open") == 1)
        writer.close()
        await until(lambda: g.sample("deltamux_uploads_total", outcome="client_gone") == 1)
        assert g.sample("deltamux_uploads_open") == 0
        assert left(g) == NOTHING


@pytest.mark.parametrize("proof", [PROOF, ErrorInfo("Overloaded", "No room.")])
async def test_a_cancelled_request_does_not_tear_its_upload_apart(
    tmp_path: Path, proof: AdmissionProof | ErrorInfo
) -> None:
    gate = asyncio.Event()
    async with gateway(tmp_path, FakeBackend(admission=lambda _: proof, admit_gate=gate)) as g:
        upload = asyncio.create_task(
            g.push("delta")
        )  # a caller whose end cancels the application, as Ray's does
        await until(lambda: bool(g.backend.admitted))
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        gate.set()
        await until(lambda: g.sample("deltamux_uploads_open") == 0)
        assert left(g) == (({digest()}, ["delta"], []) if proof is PROOF else NOTHING)


async def test_collection_leaves_an_upload_that_is_being_admitted(tmp_path: Path) -> None:
    backend = FakeBackend(admit_gate=asyncio.Event())
    async with gateway(tmp_path, backend) as g:
        upload = asyncio.create_task(g.push())
        await until(lambda: bool(backend.admitted))
        for _ in range(2):
            done = await asyncio.to_thread(Collector(g.registry, g.store, grace_s=0).collect)
            assert (done.marked, done.swept) == (0, 0)
        assert backend.admit_gate
        backend.admit_gate.set()
        assert (await upload).status_code == 201
        assert list(g.store.iter_digests()) == [digest()]


async def test_a_failed_upload_spares_what_can_still_be_undeleted(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push()
        await g.http.delete("/v1/adapters/delta")
        g.backend.admission = lambda _: ErrorInfo("Overloaded", "full")
        assert (await g.push()).status_code == 429
        assert (await g.http.post("/v1/adapters/delta/versions/1/undelete")).status_code == 200
        assert list(g.store.iter_digests()) == [digest()]


async def test_lineage_becomes_part_of_the_content_and_is_shown(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        lineage = {"initialised_from": f"sha256:{digest(7)}", "dataset": "demo"}
        reply = await g.http.put(PATH, files=peft_files(), data={"lineage": json.dumps(lineage)})
        version = reply.raise_for_status().json()
        assert version["proof"]["lineage"] == lineage | {"format": "peft"}
        blob = g.store.read(version["digest"].removeprefix("sha256:"))
        assert from_canonical(blob.manifest, blob.tensors).lineage == lineage | {"format": "peft"}
        again = (await g.http.put(PATH, files=peft_files())).json()
        assert (again["version"], again["digest"] == version["digest"]) == (2, False)


@pytest.mark.parametrize(
    "lineage", ['{"format": "mine"}', '["a"]', '{"a": 1}', "{", '{"a": "%s"}' % ("x" * 300)]
)
async def test_faulty_lineage(tmp_path: Path, lineage: str) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.put(PATH, files=peft_files(), data={"lineage": lineage})
        assert_envelope(reply, 400, "lineage")
        assert list(g.store.iter_digests()) == []


async def test_a_header_that_is_dear_to_parse_never_reaches_the_parser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = b'{"a":[' + b",".join([b"[]"] * 340_000) + b"]}"
    monkeypatch.setattr("adapters.formats.files.read_json", None)
    async with gateway(tmp_path) as g:
        files = [("file", ("tensors.safetensors", len(header).to_bytes(8, "little") + header))]
        refused = await g.http.put("/v1/adapters/delta/versions", files=[*pair()[:1], *files])
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "payload_too_large"
        assert left(g) == (set(), [], [])


async def test_a_json_body_is_as_short_as_its_fields(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        lists = b'{"file_ids":[' + b"[]," * (MAX_JSON_BYTES // 3) + b"[]]}"
        for content, status in ((lists, 413), (b'{"file_ids":["none"],"labels":{}}', 404)):
            headers = {"content-type": "application/json"}
            reply = await g.http.put("/v1/adapters/delta/versions", content=content, headers=headers)
            assert reply.status_code == status, reply.text
