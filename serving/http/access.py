"""Who may call a route. Default deny: a route that declares neither scopes nor that it is public can't be made.

A route declares its scopes by a parameter of type `Infer`, `Upload`, ... which is also how its handler learns who
calls. They are checked before the body is read: a caller without a key costs a look at its headers and nothing more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.dependencies.models import Dependant
from fastapi.openapi.models import HTTPBearer as HTTPBearerModel
from fastapi.routing import APIRoute, iter_route_contexts
from fastapi.security.base import SecurityBase
from starlette.routing import BaseRoute

from adapters.errors import Forbidden
from serving.http.threads import in_thread
from serving.tenancy.principal import Principal, Scope
from serving.tenancy.tenancy import Tenancy

PUBLIC = {
    "/health/live": "probes of orchestrators have no key; it says that the process answers",
    "/health/ready": "the same; it says that the parts are there",
    "/metrics": "Prometheus scrapes without a key; labels are bounded sets without tenants, deltas or keys",
    "/openapi.json": "describes the interface, the same for every server of a release",
    "/docs": "shows /openapi.json",
    "/docs/oauth2-redirect": "part of /docs",
    "/redoc": "shows /openapi.json",
}
"""The routes that take no key, and why."""

Gate = Callable[[Request], Awaitable[None]]


class Requires(SecurityBase):
    """A dependency that gives the caller, and by which a route says which scopes it takes: any one of them."""

    def __init__(self, *scopes: Scope) -> None:
        self.scopes = scopes
        # what /docs shows, and asks for
        self.scheme_name = "API key"
        self.model = HTTPBearerModel(description="A key of this server; none while it has no keys.")

    def __call__(self, request: Request) -> Principal:
        """The caller, whom the route's gate has let in."""
        caller: Principal = request.state.caller
        return caller


Infer = Annotated[Principal, Depends(Requires(Scope.INFER))]
Upload = Annotated[Principal, Depends(Requires(Scope.UPLOAD))]
Manage = Annotated[Principal, Depends(Requires(Scope.MANAGE))]
Admin = Annotated[Principal, Depends(Requires(Scope.ADMIN))]
# what a delta does can be had with a key for inference, the weights themselves can not
Download = Annotated[Principal, Depends(Requires(Scope.UPLOAD, Scope.MANAGE))]
Read = Annotated[Principal, Depends(Requires(Scope.INFER, Scope.UPLOAD, Scope.MANAGE))]


class Access:
    """Lets callers in, route by route."""

    def __init__(self, tenancy: Tenancy) -> None:
        self._tenancy = tenancy

    def gate(self, route: APIRoute) -> Gate:
        """What `route` awaits before it reads a body. Raises ValueError where the route declares nothing."""
        scopes = declared_scopes(route)
        if scopes is None:
            raise ValueError(f"{route.path}: a route without scopes, which is not listed as public either")

        async def check(request: Request) -> None:
            if scopes:
                request.state.caller = await self._admit(request, scopes)

        return check

    async def _admit(self, request: Request, scopes: tuple[Scope, ...]) -> Principal:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        caller = await in_thread(self._tenancy.caller, key.strip() if kind.lower() == "bearer" else None)
        if not any(caller.may(scope) for scope in scopes):
            raise Forbidden(
                f"This API key lacks the scope {' or '.join(scopes)}; it has {', '.join(sorted(caller.scopes))}.",
                remedy="Ask the operator for a key that has it.",
            )
        return caller


class GatedRoute(APIRoute):
    """A route whose handler awaits its gate before anything else. The only kind that may hold a route with scopes."""


def require_declared(app: FastAPI) -> None:
    """Raises ValueError naming every route of `app` that neither a gate guards nor PUBLIC lists."""
    contexts = list(iter_route_contexts(app.routes))
    open_routes = [
        f"{sorted(context.methods or ())} {context.path}"
        for context in contexts
        if context.path not in PUBLIC
        and not (isinstance(context.original_route, GatedRoute) and declared_scopes(context.original_route))
    ]
    if open_routes:
        raise ValueError(f"routes without a declared scope: {', '.join(open_routes)}")


def declared_scopes(route: BaseRoute) -> tuple[Scope, ...] | None:
    """The scopes that `route` takes, any one of them; empty for a public route, None where it declares nothing."""
    found = [item for item in _dependencies(route) if isinstance(item, Requires)]
    if found:
        assert len(found) == 1, f"{route}: scopes are declared twice"
        return found[0].scopes
    return () if getattr(route, "path", None) in PUBLIC else None


def _dependencies(route: BaseRoute) -> Iterator[object]:
    def walk(dependants: Iterable[Dependant]) -> Iterator[Any]:
        for dependant in dependants:
            yield dependant.call
            yield from walk(dependant.dependencies)

    return walk([route.dependant]) if isinstance(route, APIRoute) else iter(())
