"""The route that finds prompts like another one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query

from adapters.diff import StoredDelta
from adapters.errors import ErrorInfo, InvalidRequest
from adapters.registry import MAX_PAGE, Registry, VersionRecord
from adapters.similarity import mean_cosine, overlap, read_prompt, token_cosine
from adapters.store import BlobStore
from serving.http.access import Read
from serving.http.adapters import own_delta
from serving.http.errors import JsonObject
from serving.http.services import Services
from serving.http.threads import in_thread
from serving.tenancy.principal import Principal

MAX_COMPARED = 500
"""Prompts that one search reads from the store."""
MAX_TOP = 20
_PROMPTS = {"concatenation", "gated addition"}  # how prompts are integrated, in the typology of the proof


@dataclass(frozen=True, slots=True)
class _Found:
    version: VersionRecord
    mean: float
    tokens: float | None


def similar_router(services: Services) -> APIRouter:
    """`/v1/adapters/{name}/versions/{version}/similar`."""
    router = APIRouter(route_class=services.route_class, tags=["adapters"])
    searching = asyncio.Semaphore(1)

    @router.get("/v1/adapters/{name}/versions/{version}/similar")
    async def similar(
        name: str,
        version: int,
        caller: Read,
        top: Annotated[int, Query(ge=1, le=MAX_TOP)] = 10,
        activations: bool = True,
    ) -> JsonObject:
        """The caller's prompts that are most like a version, the nearest first, among the latest of each delta.

        `activations`: also compare, for those `top`, the neurons that each activates; each is loaded for it.
        """
        with own_delta(caller, name):
            mine = await in_thread(services.registry.get_version, caller.tenant, name, version)
        async with searching:
            found, num_compared, complete = await in_thread(
                _nearest, services.registry, services.store, caller, mine, top
            )
            bits = await _activated(services, mine) if activations and found else b""
            data = [
                {
                    "object": "adapter.similarity",
                    "id": f"{item.version.name}@v{item.version.version}",
                    "digest": f"sha256:{item.version.digest}",
                    "mean_cosine": item.mean,
                    "token_cosine": item.tokens,
                    "activation_overlap": overlap(bits, await _activated(services, item.version))
                    if bits
                    else None,
                }
                for item in found
            ]
        return {"object": "list", "data": data, "num_compared": num_compared, "has_more": not complete}

    return router


async def _activated(services: Services, version: VersionRecord) -> bytes:
    """Empty where the delta can't be loaded now: the cosines are worth an answer all the same."""
    found = await services.backend.activations(version.digest)
    return b"" if isinstance(found, ErrorInfo) else found


def _nearest(
    registry: Registry, store: BlobStore, caller: Principal, mine: VersionRecord, top: int
) -> tuple[list[_Found], int, bool]:
    """(the nearest, how many were compared, whether these were all). Raises InvalidRequest for what is no prompt."""
    prompt = read_prompt(StoredDelta(store, mine.digest)) if _is_prompt(mine) else None
    if prompt is None:
        raise InvalidRequest(
            f"Version {mine.version} of {mine.name!r} is {mine.method}, which has no prompt to compare.",
            param="version",
            remedy="Search with prompt or prefix tuning; compare others with `deltamux adapters diff`.",
        )
    candidates, complete = _candidates(registry, caller, mine)
    found = []
    for version in candidates:
        other = read_prompt(StoredDelta(store, version.digest))
        if other is not None and other.form == prompt.form:
            found.append(_Found(version, mean_cosine(prompt, other), token_cosine(prompt, other)))
    found.sort(key=lambda item: (-item.mean, item.version.name))
    return found[:top], len(found), complete


def _candidates(
    registry: Registry, caller: Principal, mine: VersionRecord
) -> tuple[list[VersionRecord], bool]:
    found: list[VersionRecord] = []
    after: str | None = None
    while True:
        page = registry.list_adapters(caller.tenant, limit=MAX_PAGE, after=after)
        latest = [item.latest for item in page.items if caller.reaches(item.tenant, item.name)]
        found += [
            version
            for version in latest
            if version is not None
            and version.backbone_digest == mine.backbone_digest
            and (version.name, version.version) != (mine.name, mine.version)
            and _is_prompt(version)
        ]
        after = page.next_after
        if after is None or len(found) > MAX_COMPARED:
            return found[:MAX_COMPARED], len(found) <= MAX_COMPARED


def _is_prompt(version: VersionRecord) -> bool:
    typology = version.proof.get("typology", {})
    return bool(_PROMPTS & set(typology.get("integration_form", ())))
