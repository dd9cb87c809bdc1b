"""`GET /v1/usage`: what tenants have used, from the ledger."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Literal

from fastapi import APIRouter, Query

from adapters.errors import Forbidden, InvalidRequest
from serving.http.access import Manage
from serving.http.errors import JsonObject
from serving.http.services import Services
from serving.http.threads import in_thread
from serving.tenancy.ledger import BASE, Group
from serving.tenancy.principal import Scope

DAY_S = 86400.0
MAX_ROWS = 10_000
_Time = Annotated[float | None, Query(ge=0, lt=1e11)]


def usage_router(services: Services) -> APIRouter:
    """`/v1/usage`."""
    router = APIRouter(route_class=services.route_class, tags=["usage"])

    @router.get("/v1/usage")
    async def usage(
        caller: Manage,
        group_by: Annotated[
            list[Literal["tenant", "key", "adapter", "hour", "outcome"]] | None, Query(max_length=5)
        ] = None,
        start_time: _Time = None,
        end_time: _Time = None,
        tenant: str | None = None,
        key: str | None = None,
        adapter: str | None = None,
        limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 1000,
    ) -> JsonObject:
        """Requests and tokens of the last day, or from `start_time` to before `end_time`, in groups.

        A tenant sees its own; administrators see all, or the `tenant` that they name. `adapter` is a digest, `base`
        the bare backbone; beside it `versions` are the live versions of that tenant's, or of the caller's, that have
        this content.
        """
        if not caller.may(Scope.ADMIN) and tenant not in (None, caller.tenant):
            raise Forbidden("This API key sees the usage of its own tenant only.", param="tenant")
        seen = tenant if caller.may(Scope.ADMIN) else caller.tenant
        end = time.time() + 1 if end_time is None else end_time
        start = end - DAY_S if start_time is None else start_time
        if not start < end:
            raise InvalidRequest("start_time: expected a time before end_time.", param="start_time")
        wanted = {
            Group.TENANT: seen,
            Group.KEY: key,
            Group.ADAPTER: adapter and adapter.removeprefix("sha256:"),
        }
        rows = await in_thread(
            services.tenancy.usage,
            [Group(group) for group in dict.fromkeys(group_by or ())],
            where={group: value for group, value in wanted.items() if value is not None},
            start=start,
            end=end,
            limit=limit + 1,
        )
        digests = {row["adapter"] for row in rows if "adapter" in row} - {BASE}
        named = await in_thread(services.registry.versions_of, seen or caller.tenant, digests)
        data = [{"object": "usage", **_shown(row, named)} for row in rows[:limit]]
        return {"object": "list", "data": data, "has_more": len(rows) > limit}

    return router


def _shown(row: JsonObject, named: Mapping[str, list[str]]) -> JsonObject:
    if row.get("adapter", BASE) != BASE:
        digest = row["adapter"]
        return {**row, "adapter": f"sha256:{digest}", "versions": named.get(digest, [])}
    return row
