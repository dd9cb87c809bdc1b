"""A client process: does what it chooses, says so before and after each operation, and may be killed in any of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry

from adapters.canonical import Canonical
from adapters.collector import Collector
from adapters.errors import DeltamuxError
from adapters.file_uploads import FileUploads
from adapters.quotas import UNLIMITED
from adapters.registry import DEFAULT_TENANT, Registry
from adapters.spool import Spool
from adapters.store import LocalBlobStore
from serving.config import Auth, Backbone, Database, Settings
from serving.http.app import create_app
from serving.metrics import GatewayMetrics
from serving.tenancy.tenancy import Tenancy
from tests.crash.failpoints import Failpoints
from tests.crash.model import Model, Operation
from tests.unit.serving.http_support import BACKBONE, FakeBackend

GRACE_S = 0.05
HOLD_S = 5.0
LIFETIME_S = 3600.0
SPOOL = "uploads"
"""Below the store's directory, where the failpoints see it."""


@dataclass(frozen=True)
class Plan:
    """What a worker does. `kill`: (kind of operation, step in it), or None to live."""

    url: str
    root: Path
    tenant: str
    seed: int
    num_operations: int
    kill: tuple[str, int] | None
    http: bool


def work(plan: Plan, model: Model, contents: list[Canonical], pipe: int) -> None:
    """Run in a process of its own. Writes JSON lines to `pipe`: "start", then "done" or "refused"."""

    def tell(**message: Any) -> None:
        os.write(pipe, json.dumps(message).encode() + b"\n")

    failpoints = Failpoints(plan.root, lambda name: tell(killed=name))
    if plan.kill:
        failpoints.arm(*plan.kill)
    store = LocalBlobStore(plan.root, fsync=failpoints.fsync)
    spool = Spool(plan.root / SPOOL, fsync=failpoints.fsync)
    chooser, digests = random.Random(plan.seed), [content.digest for content in contents]
    with Registry(plan.url) as registry:
        files = FileUploads(registry.uploads, spool, lifetime_s=LIFETIME_S, linger_s=LIFETIME_S)
        for _ in range(plan.num_operations):
            operation = model.choose(chooser, len(contents))
            tell(start=operation)
            failpoints.enter(operation[0])
            try:
                _perform(operation, plan, registry, store, files, contents)
            except DeltamuxError as error:
                tell(refused=type(error).__name__, text=str(error), kind=operation[0])
                failpoints.leave()
                continue
            tell(done=operation[0], steps=failpoints.leave())
            model = model.after(operation, digests)


def _perform(
    operation: Operation,
    plan: Plan,
    registry: Registry,
    store: LocalBlobStore,
    files: FileUploads,
    contents: list[Canonical],
) -> None:
    match operation:
        case ("upload", name, content, alias) if plan.http:
            in_parts = content % 2 == 1
            asyncio.run(_upload_over_http(plan, registry, store, name, contents[content], alias, in_parts))
        case ("upload", name, content, alias):
            if content % 2 == 1:
                _send_in_parts(files, plan.tenant, contents[content].tensors)
            _upload(registry, store, plan.tenant, name, contents[content], alias)
        case ("alias", name, alias, version):
            registry.set_alias(plan.tenant, name, alias, version, expected_revision=None)
        case ("delete_version", name, version):
            registry.delete_version(plan.tenant, name, version)
        case ("delete_adapter", name):
            registry.delete_adapter(plan.tenant, name)
        case ("undelete", name, version):
            registry.undelete_version(plan.tenant, name, version)
        case ("collect",):
            Collector(registry, store, grace_s=GRACE_S, files=files).collect()


def _upload(
    registry: Registry, store: LocalBlobStore, tenant: str, name: str, content: Canonical, alias: str | None
) -> None:
    """As the gateway does it, without admission."""
    hold = registry.blobs.hold(content.digest, HOLD_S)
    try:
        store.put(content.digest, content.manifest, content.tensors)
        registry.publish(
            tenant, name, content.digest, method="LORA", backbone_digest="", task="causal-lm",
            size_bytes=content.size_bytes, labels={}, proof={}, alias=alias, hold=hold,
        )  # fmt: skip
    except DeltamuxError:
        registry.blobs.discard(content.digest, hold, store.delete)
        raise


def _send_in_parts(files: FileUploads, tenant: str, data: bytes) -> None:
    """Send a file as `deltamux push` does: one that a killed worker began is gone on with. It must be whole then."""
    records, half = files.records, len(data) // 2
    sha256 = hashlib.sha256(data).hexdigest()
    upload_id = next((item.id for item in records.pending(tenant) if item.sha256 == sha256), None)
    if upload_id is None:
        made = records.create(
            tenant, filename="tensors.safetensors", purpose="user_data", size_bytes=len(data), sha256=sha256,
            lifetime_s=LIFETIME_S, quota=UNLIMITED,
        )  # fmt: skip
        upload_id = made.id
    known = {part.sha256 for part in records.get(tenant, upload_id)[1]}
    parts = [data[:half], data[half:]]
    for part in parts:
        if hashlib.sha256(part).hexdigest() not in known:
            writer = files.spool.open_part(upload_id)
            writer.write(part)
            files.add_part(tenant, upload_id, writer, sha256=None)
    order = [hashlib.sha256(part).hexdigest() for part in parts]
    done = files.complete(tenant, upload_id, order, md5=None, sha256=sha256)
    for upload in records.files(tenant):  # also those that were completed before a kill
        assert upload.file_id
        _, path = files.open_file(tenant, upload.file_id)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == upload.sha256, "a completed file is not whole"
    assert done.file_id
    records.delete_file(tenant, done.file_id)


async def _upload_over_http(
    plan: Plan,
    registry: Registry,
    store: LocalBlobStore,
    name: str,
    content: Canonical,
    alias: str | None,
    in_parts: bool,
) -> None:
    """Through the gateway, with a backend that admits everything; only for the gateway's own tenant."""
    settings = Settings(
        backbone=Backbone(path=BACKBONE),
        database=Database(url=plan.url),
        auth=Auth(secret_file=plan.root.parent / "secret"),
    )
    parts = {"manifest.json": content.manifest, "tensors.safetensors": content.tensors}
    with Tenancy(settings) as tenancy:
        app = create_app(
            backend=FakeBackend(),
            registry=registry,
            store=store,
            spool=Spool(plan.root / SPOOL),
            tenancy=tenancy,
            settings=settings,
            metrics=GatewayMetrics(CollectorRegistry()),
        )
        gateway = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=gateway, base_url="http://gateway") as client:
            fields = {"alias": alias} if alias else {}
            if in_parts:
                tensors = parts.pop("tensors.safetensors")
                fields["file_ids"] = json.dumps([await _send_over_http(client, tensors)])
            files = [("file", (file, data)) for file, data in parts.items()]
            reply = await client.put(f"/v1/adapters/{name}/versions", files=files, data=fields)
    if reply.status_code != 201:
        raise DeltamuxError(reply.text)


async def _send_over_http(client: httpx.AsyncClient, data: bytes) -> str:
    body = {"bytes": len(data), "filename": "tensors.safetensors", "mime_type": "x", "purpose": "user_data"}
    upload = await client.post("/v1/uploads", json=body)
    path = f"/v1/uploads/{upload.json()['id']}"
    halves = (data[: len(data) // 2], data[len(data) // 2 :])
    ids = [
        (await client.post(f"{path}/parts", files={"data": ("part", half)})).json()["id"] for half in halves
    ]
    done = await client.post(f"{path}/complete", json={"part_ids": ids})
    return str(done.json()["file"]["id"])


HTTP_TENANT = DEFAULT_TENANT
