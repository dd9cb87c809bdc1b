"""The routes by which a tenant says who signs its uploads."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from serving.http.access import Manage
from serving.http.errors import JsonObject
from serving.http.schemas import RequestBody
from serving.http.services import Services
from serving.http.threads import in_thread
from serving.tenancy.signers import Signer


class SignerBody(RequestBody):
    """The body of `POST /v1/signers`: an Ed25519 public key, in PEM or as 64 hex digits."""

    public_key: Annotated[str, Field(max_length=1000)]
    label: str = ""


class PolicyBody(RequestBody):
    """The body of `PUT /v1/signature_policy`."""

    require_signature: bool


def signers_router(services: Services) -> APIRouter:
    """`/v1/signers` and below."""
    signers = services.tenancy.signers
    router = APIRouter(route_class=services.mutation_class, tags=["signers"])

    @router.get("/v1/signers")
    async def list_signers(caller: Manage) -> JsonObject:
        """Whose signatures the caller's tenant accepts, and whether it wants one for every upload."""
        found = await in_thread(signers.list, caller.tenant)
        required = await in_thread(signers.is_required, caller.tenant)
        data = [_signer_object(signer) for signer in found]
        return {"object": "list", "data": data, "require_signature": required}

    @router.post("/v1/signers", status_code=201)
    async def add_signer(body: SignerBody, caller: Manage) -> JsonObject:
        """Accept the signatures of a public key."""
        made = await in_thread(
            signers.add, caller.tenant, body.public_key, label=body.label, actor=caller.actor
        )
        return _signer_object(made)

    @router.put("/v1/signature_policy")
    async def set_policy(body: PolicyBody, caller: Manage) -> JsonObject:
        """Take signed uploads only, or any."""
        await in_thread(signers.require, caller.tenant, body.require_signature, actor=caller.actor)
        return {"object": "signer.policy", "require_signature": body.require_signature}

    @router.delete("/v1/signers/{signer}")
    async def revoke_signer(signer: str, caller: Manage) -> JsonObject:
        """Accept no further signature of a signer; what it has signed stays."""
        await in_thread(signers.revoke, caller.tenant, signer, actor=caller.actor)
        return {"id": signer, "object": "signer", "deleted": True}

    return router


def _signer_object(signer: Signer) -> JsonObject:
    return {
        "id": signer.id,
        "object": "signer",
        "public_key": signer.public_key,
        "label": signer.label,
        "created": int(signer.created_at),
        "revoked": signer.revoked_at,
    }
