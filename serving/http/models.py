"""What a `model` field means, and the routes that list what it may say."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Request

from adapters.errors import InvalidReference, NotFound
from adapters.names import ModelReference
from adapters.registry import MAX_PAGE, AdapterRecord, Registry, VersionRecord
from serving.core import BASE
from serving.http.edge import set_adapter_digest
from serving.http.errors import JsonObject
from serving.http.services import Services, in_thread

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


async def resolve(services: Services, model: str) -> Target:
    """What the caller's `model` means at this moment. Raises NotFound, also for what does not parse.

    Nothing is cached: a name's meaning changes, and a stale one would be another delta's answer.
    """
    if model == (await services.backbone()).name:
        return Target(None)
    try:
        reference = ModelReference.parse(model)
    except InvalidReference as error:
        raise NotFound(error.message, param="model", remedy=error.remedy) from None
    if reference.tenant not in (None, services.tenant):
        raise _unknown(reference)
    version = await in_thread(services.registry.resolve, reference, default_tenant=services.tenant)
    if version.status != "ready":
        raise _unknown(reference)
    return Target(version)


def _unknown(reference: ModelReference) -> NotFound:
    return NotFound(f"The model '{reference}' does not exist.", param="model")


def models_router(services: Services) -> APIRouter:
    """`GET /v1/models` and `GET /v1/models/{id}`."""
    router = APIRouter(tags=["models"])

    async def backbone_card() -> JsonObject:
        info = await services.backbone()
        return _card(info.name, info.created, owner=BACKBONE_OWNER, parent=None)

    @router.get("/v1/models")
    async def list_models() -> JsonObject:
        """The backbone, and every delta that the caller can name."""
        base = await backbone_card()
        deltas = await in_thread(_ready_adapters, services.registry, services.tenant)
        cards = [
            _card(delta.name, delta.created_at, owner=delta.tenant, parent=base["id"]) for delta in deltas
        ]
        return {"object": "list", "data": [base, *cards]}

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str, request: Request) -> JsonObject:
        """One model, by any reference that `model` takes in a request."""
        target = await resolve(services, model)
        set_adapter_digest(request, target.digest)
        base = await backbone_card()
        if target.version is None:
            return base
        version = target.version
        return _card(model, version.created_at, owner=version.tenant, parent=base["id"])

    return router


def _ready_adapters(registry: Registry, tenant: str) -> list[AdapterRecord]:
    """Every adapter that its bare name reaches. OpenAI's list of models has no pages."""
    found: list[AdapterRecord] = []
    after: str | None = None
    while True:
        page = registry.list_adapters(tenant, limit=MAX_PAGE, after=after)
        found += [adapter for adapter in page.items if adapter.latest is not None]
        after = page.next_after
        if after is None:
            return found


def _card(model: str, created: float, *, owner: str, parent: str | None) -> JsonObject:
    return {"id": model, "object": "model", "created": int(created), "owned_by": owner, "parent": parent}
