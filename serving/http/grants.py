"""The routes by which a tenant shares a delta of its own."""

from __future__ import annotations

from fastapi import APIRouter

from adapters.errors import NotFound
from serving.http.access import Manage
from serving.http.adapters import own_delta
from serving.http.errors import JsonObject
from serving.http.services import Services
from serving.http.threads import in_thread


def grants_router(services: Services) -> APIRouter:
    """`/v1/adapters/{name}/grants` and below. A grantee is a tenant's name, or `*` for every tenant."""
    grants = services.tenancy.grants
    router = APIRouter(route_class=services.mutation_class, tags=["adapters"])

    @router.get("/v1/adapters/{name}/grants")
    async def list_grants(name: str, caller: Manage) -> JsonObject:
        """Who else may use a delta."""
        with own_delta(caller, name):
            found = await in_thread(grants.of, caller.tenant, name)
        return {"object": "list", "data": [_grant(name, grantee) for grantee in found]}

    @router.put("/v1/adapters/{name}/grants/{tenant}")
    async def grant(name: str, tenant: str, caller: Manage) -> JsonObject:
        """Let another tenant, or with `*` every one, use a delta as `owner/name`."""
        with own_delta(caller, name):
            await in_thread(grants.grant, caller.tenant, name, tenant, actor=caller.actor)
        return _grant(name, tenant)

    @router.delete("/v1/adapters/{name}/grants/{tenant}")
    async def withdraw(name: str, tenant: str, caller: Manage) -> JsonObject:
        """Take a grant back; it holds from the next request on."""
        with own_delta(caller, name):
            if not await in_thread(grants.withdraw, caller.tenant, name, tenant, actor=caller.actor):
                raise NotFound("There is no such grant.", param="tenant")
        return {**_grant(name, tenant), "deleted": True}

    return router


def _grant(name: str, grantee: str) -> JsonObject:
    return {"id": f"{name}/{grantee}", "object": "adapter.grant", "name": name, "tenant": grantee}
