"""The routes of administrators: tenants, their limits, and keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import Field

from serving.core import ServiceClass
from serving.http.access import Admin
from serving.http.errors import JsonObject
from serving.http.schemas import RequestBody
from serving.http.threads import in_thread
from serving.tenancy.keyring import KeyRecord
from serving.tenancy.keys import NewKey
from serving.tenancy.principal import Limits, Scope
from serving.tenancy.tenancy import Tenancy
from serving.tenancy.tenants import Tenant

DAY_S = 86400.0
NO_STORE = {"cache-control": "no-store"}
_Name = Annotated[str, Field(min_length=1, max_length=63)]


class LimitsBody(RequestBody):
    """A tenant's limits, all of them: what is left out is unlimited, or the default."""

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    max_concurrency: int | None = None
    weight: float = 1.0
    service_class: Literal["realtime", "standard", "batch"] = "standard"

    def limits(self) -> Limits:
        """These limits. Raises InvalidRequest for what is out of range."""
        return Limits(
            requests_per_min=self.requests_per_min,
            tokens_per_min=self.tokens_per_min,
            max_concurrency=self.max_concurrency,
            weight=self.weight,
            service_class=ServiceClass(self.service_class),
        )


class TenantBody(LimitsBody):
    """The body of `POST /v1/admin/tenants`."""

    name: _Name


class StateBody(RequestBody):
    """The body of `PUT /v1/admin/tenants/{name}/state`."""

    disabled: bool


class KeyBody(RequestBody):
    """The body of `POST /v1/admin/keys`. `adapters`: globs; none is every delta that the tenant may use."""

    tenant: _Name
    scopes: Annotated[list[Literal["infer", "upload", "manage", "admin"]], Field(min_length=1, max_length=4)]
    adapters: Annotated[list[str], Field(max_length=32)] = Field(default_factory=list)
    label: str = ""
    expires_in_s: Annotated[float | None, Field(gt=0, le=100 * 366 * DAY_S)] = None


class RotateBody(RequestBody):
    """The body of `POST /v1/admin/keys/{id}/rotate`: how long the old key stays valid beside the new one."""

    overlap_s: Annotated[float, Field(ge=0, le=90 * DAY_S)] = DAY_S


def admin_router(tenancy: Tenancy, route_class: type[APIRoute]) -> APIRouter:
    """`/v1/admin` and below. `route_class`: one that guards its routes."""
    tenants, keys = tenancy.tenants, tenancy.keys
    router = APIRouter(route_class=route_class, prefix="/v1/admin", tags=["administration"])

    @router.get("/tenants")
    async def list_tenants(caller: Admin) -> JsonObject:  # noqa: ARG001
        """Every tenant and its limits."""
        return {"object": "list", "data": [tenant_object(item) for item in await in_thread(tenants.list)]}

    @router.post("/tenants", status_code=201)
    async def create_tenant(body: TenantBody, caller: Admin) -> JsonObject:
        """Add a tenant."""
        made = await in_thread(tenants.create, body.name, body.limits(), actor=caller.actor)
        return tenant_object(made)

    @router.get("/tenants/{name}")
    async def get_tenant(name: str, caller: Admin) -> JsonObject:  # noqa: ARG001
        """One tenant and its limits."""
        return tenant_object(await in_thread(tenants.get, name))

    @router.put("/tenants/{name}/limits")
    async def set_limits(name: str, body: LimitsBody, caller: Admin) -> JsonObject:
        """Replace a tenant's limits; they hold for its next request."""
        return tenant_object(await in_thread(tenants.set_limits, name, body.limits(), actor=caller.actor))

    @router.put("/tenants/{name}/state")
    async def set_state(name: str, body: StateBody, caller: Admin) -> JsonObject:
        """Refuse, or take again, every key of a tenant. Its deltas stay."""
        changed = await in_thread(tenants.set_disabled, name, body.disabled, actor=caller.actor)
        return tenant_object(changed)

    @router.get("/keys")
    async def list_keys(caller: Admin, tenant: str | None = None) -> JsonObject:  # noqa: ARG001
        """Every key's record, of one tenant or of all; never the keys."""
        return {"object": "list", "data": [key_object(item) for item in await in_thread(keys.list, tenant)]}

    @router.post("/keys", status_code=201)
    async def create_key(body: KeyBody, caller: Admin) -> JSONResponse:
        """Make a key. The answer is the only place where it can ever be read."""
        record, made = await in_thread(
            keys.create,
            body.tenant,
            [Scope(scope) for scope in body.scopes],
            adapters=body.adapters,
            label=body.label,
            lifetime_s=body.expires_in_s,
            actor=caller.actor,
        )
        return _shown_once(record, made)

    @router.post("/keys/{key_id}/rotate", status_code=201)
    async def rotate_key(key_id: str, body: RotateBody, caller: Admin) -> JSONResponse:
        """Make a key in the place of another, which stays valid for a while beside it."""
        record, made = await in_thread(keys.rotate, key_id, overlap_s=body.overlap_s, actor=caller.actor)
        return _shown_once(record, made)

    @router.delete("/keys/{key_id}")
    async def revoke_key(key_id: str, caller: Admin) -> JsonObject:
        """End a key; its next request is refused."""
        return key_object(await in_thread(keys.revoke, key_id, actor=caller.actor))

    return router


def tenant_object(tenant: Tenant) -> JsonObject:
    """A tenant as administrators see it."""
    return {
        "id": tenant.name,
        "object": "tenant",
        "disabled": tenant.disabled_at is not None,
        "created": int(tenant.created_at),
        **asdict(tenant.limits),
    }


def key_object(record: KeyRecord) -> JsonObject:
    """A key's record as administrators see it."""
    return {
        "id": record.id,
        "object": "key",
        "tenant": record.tenant,
        "label": record.label,
        "scopes": list(record.scopes),
        "adapters": list(record.adapters),
        "created": int(record.created_at),
        "expires": record.expires_at,
        "revoked": record.revoked_at,
    }


def _shown_once(record: KeyRecord, made: NewKey) -> JSONResponse:
    return JSONResponse({**key_object(record), "key": made.text}, 201, NO_STORE)
