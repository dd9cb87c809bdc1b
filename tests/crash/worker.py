"""A client process: does what it chooses, says so before and after each operation, and may be killed in any of them."""

from __future__ import annotations

import asyncio
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
    chooser, digests = random.Random(plan.seed), [content.digest for content in contents]
    with Registry(plan.url) as registry:
        for _ in range(plan.num_operations):
            operation = model.choose(chooser, len(contents))
            tell(start=operation)
            failpoints.enter(operation[0])
            try:
                _perform(operation, plan, registry, store, contents)
            except DeltamuxError as error:
                tell(refused=type(error).__name__, text=str(error), kind=operation[0])
                failpoints.leave()
                continue
            tell(done=operation[0], steps=failpoints.leave())
            model = model.after(operation, digests)


def _perform(
    operation: Operation, plan: Plan, registry: Registry, store: LocalBlobStore, contents: list[Canonical]
) -> None:
    match operation:
        case ("upload", name, content, alias) if plan.http:
            asyncio.run(_upload_over_http(plan, registry, store, name, contents[content], alias))
        case ("upload", name, content, alias):
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
            Collector(registry, store, grace_s=GRACE_S).collect()


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


async def _upload_over_http(
    plan: Plan, registry: Registry, store: LocalBlobStore, name: str, content: Canonical, alias: str | None
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
            spool=Spool(plan.root.parent / "spool"),
            tenancy=tenancy,
            settings=settings,
            metrics=GatewayMetrics(CollectorRegistry()),
        )
        gateway = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=gateway, base_url="http://gateway") as client:
            files = [("file", (file, data)) for file, data in parts.items()]
            fields = {"alias": alias} if alias else {}
            reply = await client.put(f"/v1/adapters/{name}/versions", files=files, data=fields)
    if reply.status_code != 201:
        raise DeltamuxError(reply.text)


HTTP_TENANT = DEFAULT_TENANT
