"""The routes of the registry: upload, read, promote and delete deltas."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from adapters.errors import DeltamuxError, NotFound
from adapters.migrations.queries import not_found
from adapters.names import ModelReference
from adapters.registry import AdapterPage, AdapterRecord, AliasRecord, Registry, VersionRecord
from serving.http.access import Manage, Read, Upload
from serving.http.edge import set_adapter_digest
from serving.http.errors import JsonObject
from serving.http.services import Services
from serving.http.threads import in_thread
from serving.http.uploads import Uploads
from serving.tenancy.principal import Principal

log = logging.getLogger("deltamux.http")

_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "description": "One part per file, whose file name says what it is; optional fields "
        "`labels` and `lineage` (JSON objects of strings; the lineage becomes part of the content, as "
        '`{"initialised_from": "sha256:..."}`), `backbone_digest`, `alias`, `parity` (what `deltamux verify` '
        "wrote; kept in the admission proof) and `signature` (Ed25519 over the digest, in base64).",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "labels": {"type": "string"},
                        "lineage": {"type": "string"},
                        "backbone_digest": {"type": "string"},
                        "alias": {"type": "string"},
                        "parity": {"type": "string"},
                        "signature": {"type": "string"},
                    },
                }
            }
        },
    }
}


def adapters_router(services: Services) -> APIRouter:
    """`/v1/adapters` and below."""
    registry = services.registry
    uploads = Uploads(services)
    router = APIRouter(route_class=services.route_class, tags=["adapters"])

    @router.put("/v1/adapters/{name}/versions", status_code=201, openapi_extra=_UPLOAD_BODY)
    async def upload(name: str, request: Request, caller: Upload) -> JSONResponse:
        """Publish the next version of a delta; the answer is its admission proof."""
        record = await uploads.accept(request, caller, name)
        set_adapter_digest(request, record.digest)
        return JSONResponse(version_object(record), 201)

    @router.get("/v1/adapters")
    async def list_adapters(caller: Read, limit: int = 100, after: str | None = None) -> JsonObject:
        """A page of the caller's deltas by name, beginning behind `after`."""
        page = await in_thread(_visible_page, registry, caller, limit, after)
        data = [adapter_object(adapter) for adapter in page.items]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": page.next_after is not None,
        }

    @router.get("/v1/adapters/{name}")
    async def get_adapter(name: str, caller: Read) -> JsonObject:
        """One delta: its latest version and its aliases."""
        with own_delta(caller, name):
            return adapter_object(await in_thread(registry.get_adapter, caller.tenant, name))

    @router.get("/v1/adapters/{name}/versions")
    async def list_versions(
        name: str, caller: Read, limit: int = 100, before: int | None = None
    ) -> JsonObject:
        """A page of a delta's versions, newest first, beginning below `before`."""
        with own_delta(caller, name):
            found = await in_thread(registry.list_versions, caller.tenant, name, limit=limit, before=before)
        return {"object": "list", "data": [version_object(version) for version in found]}

    @router.get("/v1/adapters/{name}/versions/{version}")
    async def get_version(name: str, version: int, caller: Read) -> JsonObject:
        """One version and its admission proof."""
        with own_delta(caller, name):
            return version_object(await in_thread(registry.get_version, caller.tenant, name, version))

    @router.delete("/v1/adapters/{name}")
    async def delete_adapter(name: str, caller: Manage) -> JsonObject:
        """Delete a delta with all its versions and aliases, and free its memory. Each version can be undeleted."""
        with own_delta(caller, name):
            gone = await in_thread(registry.delete_adapter, caller.tenant, name, actor=caller.actor)
        freed = await _release(services, {version.digest for version in gone})
        versions = [version.version for version in gone]
        return {**_deleted(name, "adapter", freed), "versions": versions}

    @router.delete("/v1/adapters/{name}/versions/{version}")
    async def delete_version(name: str, version: int, caller: Manage) -> JsonObject:
        """Delete one version, and free its memory where no other version has the same content."""
        with own_delta(caller, name):
            gone = await in_thread(registry.delete_version, caller.tenant, name, version, actor=caller.actor)
        return _deleted(f"{name}@v{version}", "adapter.version", await _release(services, {gone.digest}))

    @router.post("/v1/adapters/{name}/versions/{version}/undelete")
    async def undelete_version(name: str, version: int, caller: Manage) -> JsonObject:
        """Undo the deletion of a version whose bytes are not collected yet."""
        with own_delta(caller, name):
            back = await in_thread(
                registry.undelete_version, caller.tenant, name, version, actor=caller.actor
            )
        return version_object(back)

    return router


def version_object(record: VersionRecord) -> JsonObject:
    """A version as callers see it."""
    return {
        "id": f"{record.name}@v{record.version}",
        "object": "adapter.version",
        "name": record.name,
        "version": record.version,
        "digest": f"sha256:{record.digest}",
        "status": record.status,
        "method": record.method,
        "task": record.task,
        "backbone_digest": record.backbone_digest,
        "size_bytes": record.size_bytes,
        "labels": dict(record.labels),
        "proof": dict(record.proof),
        "created": int(record.created_at),
    }


def alias_object(record: AliasRecord) -> JsonObject:
    """An alias as callers see it; `revision` is what the next compare-and-swap has to name.

    `weights`: the share of each version in percent, the main one's first.
    """
    return {
        "id": f"{record.name}:{record.alias}",
        "object": "adapter.alias",
        "alias": record.alias,
        "version": record.version,
        "weights": {str(version): percent for version, percent in record.weights.items()},
        "revision": record.revision,
        "updated": int(record.updated_at),
    }


def adapter_object(record: AdapterRecord) -> JsonObject:
    """A delta as callers see it."""
    return {
        "id": record.name,
        "object": "adapter",
        "name": record.name,
        "owned_by": record.tenant,
        "created": int(record.created_at),
        "latest": version_object(record.latest) if record.latest else None,
        "aliases": [alias_object(alias) for alias in record.aliases],
    }


def _deleted(item: str, kind: str, bytes_freed: int | None) -> JsonObject:
    return {"id": item, "object": kind, "deleted": True, "bytes_freed": bytes_freed}


async def _release(services: Services, digests: Iterable[str]) -> int | None:
    """Drain and free contents that no live version has; returns the device bytes freed.

    None where the backend did not say: the deletion stands all the same, and the memory is evicted on demand.
    """
    total = 0
    try:
        for digest in sorted(digests):
            async with services.digest_lock(digest):
                if digest not in await in_thread(services.registry.live_digests):
                    total += await services.backend.release(digest)
    except DeltamuxError as error:
        log.warning("a deleted delta was not released: %s", type(error).__name__)
        return None
    return total


@contextmanager
def own_delta(caller: Principal, name: str) -> Iterator[None]:
    """Work on a delta of the caller's, which is not found where the key does not reach it.

    Says `name` where the registry says `model`: these routes have no such field.
    """
    try:
        if not caller.reaches(caller.tenant, name):
            raise not_found(ModelReference(caller.tenant, name))
        yield
    except NotFound as error:
        raise NotFound(
            error.message, param="name" if error.param == "model" else error.param, remedy=error.remedy
        ) from None


def _visible_page(registry: Registry, caller: Principal, limit: int, after: str | None) -> AdapterPage:
    """A page of what the caller's key reaches, which is as full as if there were nothing else."""
    found: list[AdapterRecord] = []
    while True:
        page = registry.list_adapters(caller.tenant, limit=limit, after=after)
        found += [item for item in page.items if caller.reaches(item.tenant, item.name)]
        after = page.next_after
        if after is None or len(found) >= limit:
            more = after is not None or len(found) > limit
            return AdapterPage(tuple(found[:limit]), found[limit - 1].name if more else None)
