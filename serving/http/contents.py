"""The routes that read what versions hold: their files, and how two of them differ."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from adapters.diff import StoredDelta, compare
from adapters.errors import NotFound
from adapters.migrations.queries import not_found
from adapters.names import ModelReference
from adapters.registry import VersionRecord
from adapters.store import FILES, BlobStore, FileName
from serving.http.access import Download, Read
from serving.http.adapters import own_delta
from serving.http.edge import set_adapter_digest
from serving.http.errors import JsonObject
from serving.http.services import Services
from serving.http.threads import in_thread
from serving.tenancy.principal import Principal

PIECE_BYTES = 1 << 20


def contents_router(services: Services) -> APIRouter:
    """`/v1/adapters/{name}/versions/{version}/files/{file}` and `.../diff`."""
    registry = services.registry
    router = APIRouter(route_class=services.route_class, tags=["adapters"])
    comparing = asyncio.Semaphore(1)  # each may hold two deltas in memory

    @router.get("/v1/adapters/{name}/versions/{version}/files/{file}", response_class=StreamingResponse)
    async def get_file(
        name: str, version: int, file: str, request: Request, caller: Download
    ) -> StreamingResponse:
        """One file of a version's canonical pair, `manifest.json` or `tensors.safetensors`, byte for byte."""
        with own_delta(caller, name):
            record = await in_thread(registry.get_version, caller.tenant, name, version)
        wanted = next((known for known in FILES if known == file), None)
        if wanted is None:
            raise NotFound(f"A version has the files {' and '.join(FILES)}.", param="file")
        size = (await in_thread(services.store.sizes, record.digest))[wanted]
        set_adapter_digest(request, record.digest)
        return StreamingResponse(
            _pieces(services.store, record.digest, wanted, size),
            media_type="application/octet-stream",
            headers={"content-length": str(size)},
        )

    @router.get("/v1/adapters/{name}/versions/{version}/diff")
    async def diff(name: str, version: int, against: str, caller: Read) -> JsonObject:
        """How a version differs from another: manifest, ops, and norms. `against`: a reference to an own delta."""
        with own_delta(caller, name):
            mine = await in_thread(registry.get_version, caller.tenant, name, version)
        theirs = await _own_version(services, caller, against)
        async with comparing:
            found = await in_thread(_compared, services.store, mine, theirs)
        return {"object": "adapter.diff", "between": [_summary(mine), _summary(theirs)], **found}

    return router


async def _own_version(services: Services, caller: Principal, text: str) -> VersionRecord:
    """The version that a reference to a delta of the caller's means. Raises NotFound, InvalidReference."""
    reference = ModelReference.parse(text)
    if reference.tenant not in (None, caller.tenant) or not caller.reaches(caller.tenant, reference.name):
        raise not_found(reference)
    return await in_thread(services.registry.resolve, reference, default_tenant=caller.tenant)


def _pieces(store: BlobStore, digest: str, file: FileName, size: int) -> Iterator[bytes]:
    for start in range(0, size, PIECE_BYTES):
        yield store.read_range(digest, file, start, min(start + PIECE_BYTES, size))


def _compared(store: BlobStore, mine: VersionRecord, theirs: VersionRecord) -> dict[str, Any]:
    return compare(StoredDelta(store, mine.digest), StoredDelta(store, theirs.digest))


def _summary(record: VersionRecord) -> JsonObject:
    return {
        "id": f"{record.name}@v{record.version}",
        "digest": f"sha256:{record.digest}",
        "size_bytes": record.size_bytes,
    }
