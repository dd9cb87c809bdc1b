"""The routes of aliases: move, divide among versions, roll back, and look back."""

from __future__ import annotations

from fastapi import APIRouter

from adapters.registry import AliasMove
from serving.http.access import Manage, Read
from serving.http.adapters import alias_object, own_delta
from serving.http.errors import JsonObject
from serving.http.schemas import AliasBody, RollbackBody
from serving.http.services import Services
from serving.http.threads import in_thread


def aliases_router(services: Services) -> APIRouter:
    """`/v1/adapters/{name}/aliases/{alias}` and below."""
    registry = services.registry
    router = APIRouter(route_class=services.route_class, tags=["adapters"])

    @router.put("/v1/adapters/{name}/aliases/{alias}")
    async def set_alias(name: str, alias: str, body: AliasBody, caller: Manage) -> JsonObject:
        """Point an alias at a version, and a share of its requests at others, if it still is as the caller saw it."""
        with own_delta(caller, name):
            moved = await in_thread(
                registry.set_alias,
                caller.tenant,
                name,
                alias,
                body.version,
                canaries=body.shares(),
                expected_revision=body.expected_revision,
                actor=caller.actor,
            )
        return alias_object(moved)

    @router.post("/v1/adapters/{name}/aliases/{alias}/rollback")
    async def roll_back(name: str, alias: str, body: RollbackBody, caller: Manage) -> JsonObject:
        """End an alias's canary, or else return it to the version that it pointed at before."""
        with own_delta(caller, name):
            moved = await in_thread(
                registry.roll_back_alias,
                caller.tenant,
                name,
                alias,
                expected_revision=body.expected_revision,
                actor=caller.actor,
            )
        return alias_object(moved)

    @router.get("/v1/adapters/{name}/aliases/{alias}/history")
    async def history(name: str, alias: str, caller: Read, limit: int = 100) -> JsonObject:
        """Where an alias has pointed, newest first."""
        with own_delta(caller, name):
            moves = await in_thread(registry.alias_history, caller.tenant, name, alias, limit=limit)
        return {"object": "list", "data": [_move_object(name, move) for move in moves]}

    return router


def _move_object(name: str, move: AliasMove) -> JsonObject:
    return {
        "id": f"{name}:{move.alias}#{move.revision}",
        "object": "adapter.alias.move",
        "alias": move.alias,
        "revision": move.revision,
        "version": move.version,
        "canaries": {str(version): percent for version, percent in move.canaries.items()},
        "created": int(move.at),
    }
