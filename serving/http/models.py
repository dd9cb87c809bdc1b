"""What a `model` field means, and the routes that list what it may say."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from fastapi import APIRouter, Request

from adapters.errors import InvalidReference, NotFound
from adapters.migrations.queries import not_found
from adapters.names import ModelReference
from adapters.registry import MAX_PAGE, AdapterRecord, Registry, VersionRecord
from serving.core import BASE
from serving.http.access import Infer
from serving.http.edge import set_adapter_digest
from serving.http.errors import JsonObject
from serving.http.services import Services
from serving.http.threads import in_thread
from serving.tenancy.principal import Principal

BACKBONE_OWNER = "deltamux"


@dataclass(frozen=True, slots=True)
class Target:
    """What a reference stands for now: the bare backbone, or one immutable version."""

    version: VersionRecord | None

    @property
    def digest(self) -> str | None:
        """The content digest; BASE for the bare backbone."""
        return self.version.digest if self.version else BASE

    @property
    def name(self) -> str:
        """The delta's name; empty for the bare backbone."""
        return self.version.name if self.version else ""


async def resolve(services: Services, caller: Principal, model: str, *, unit: str | None = None) -> Target:
    """What the caller's `model` means at this moment. Raises NotFound, also for what does not parse.

    `unit`: see `unit_of`; without one an alias with canaries means its main version.

    Nothing is cached: a name's meaning changes, and a stale one would be another delta's answer. What the caller may
    not use is refused before it is looked up, so the answer and its time are those for what does not exist.
    """
    if model == (await services.backbone()).name:
        return Target(None)
    try:
        reference = ModelReference.parse(model)
    except InvalidReference as error:
        raise NotFound(error.message, param="model", remedy=error.remedy) from None
    owner = reference.tenant or caller.tenant
    if not caller.reaches(owner, reference.name):
        raise not_found(reference)
    if owner != caller.tenant and not await in_thread(
        services.tenancy.grants.covers, owner, reference.name, caller.tenant
    ):
        raise not_found(reference)
    version = await in_thread(services.registry.resolve, reference, default_tenant=caller.tenant, unit=unit)
    if version.status != "ready":
        raise not_found(reference)
    return Target(version)


def unit_of(caller: Principal, *, user: str | None, request_id: str) -> str:
    """On whose behalf a request comes, by which an alias with canaries chooses: the user, else the request itself."""
    return f"{caller.tenant}/user/{user}" if user else f"{caller.tenant}/request/{request_id}"


def models_router(services: Services) -> APIRouter:
    """`GET /v1/models` and `GET /v1/models/{id}`."""
    router = APIRouter(route_class=services.route_class, tags=["models"])

    async def backbone_card() -> JsonObject:
        info = await services.backbone()
        return _card(info.name, info.created, owner=BACKBONE_OWNER, parent=None)

    @router.get("/v1/models")
    async def list_models(caller: Infer) -> JsonObject:
        """The backbone, and every delta that the caller can name: its own, then those of others as `tenant/name`."""
        base = await backbone_card()
        own = await in_thread(_ready_adapters, services.registry, caller)
        others = await in_thread(_granted_adapters, services, caller)
        cards = [
            _card(name, delta.created_at, owner=delta.tenant, parent=base["id"])
            for name, delta in [*((delta.name, delta) for delta in own), *others]
        ]
        return {"object": "list", "data": [base, *cards]}

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str, request: Request, caller: Infer) -> JsonObject:
        """One model, by any reference that `model` takes in a request."""
        target = await resolve(services, caller, model)
        set_adapter_digest(request, target.digest)
        base = await backbone_card()
        if target.version is None:
            return base
        version = target.version
        return _card(model, version.created_at, owner=version.tenant, parent=base["id"])

    return router


def _ready_adapters(registry: Registry, caller: Principal) -> list[AdapterRecord]:
    """Every adapter of the caller that its bare name reaches. OpenAI's list of models has no pages."""
    found: list[AdapterRecord] = []
    after: str | None = None
    while True:
        page = registry.list_adapters(caller.tenant, limit=MAX_PAGE, after=after)
        found += [a for a in page.items if a.latest is not None and caller.reaches(a.tenant, a.name)]
        after = page.next_after
        if after is None:
            return found


def _granted_adapters(services: Services, caller: Principal) -> list[tuple[str, AdapterRecord]]:
    """Every adapter of others that the caller may use, by the name it uses it by."""
    found = []
    for owner, name in services.tenancy.grants.to(caller.tenant):
        if caller.reaches(owner, name):
            with suppress(NotFound):  # deleted since
                found.append((f"{owner}/{name}", services.registry.get_adapter(owner, name)))
    return [(name, adapter) for name, adapter in found if adapter.latest is not None]


def _card(model: str, created: float, *, owner: str, parent: str | None) -> JsonObject:
    return {"id": model, "object": "model", "created": int(created), "owned_by": owner, "parent": parent}
