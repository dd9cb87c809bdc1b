"""Health and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response

from adapters.errors import DeltamuxError, Unavailable
from serving.http.errors import JsonObject
from serving.http.services import Services
from serving.http.threads import in_thread
from serving.metrics import families, render

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def operations_router(services: Services) -> APIRouter:
    """`/health/live`, `/health/ready` and `/metrics`."""
    router = APIRouter(route_class=services.route_class, tags=["operations"])

    @router.get("/health/live")
    async def live() -> JsonObject:
        """This process answers."""
        return {"status": "live"}

    @router.get("/health/ready")
    async def ready() -> JsonObject:
        """The registry answers and the engine turns; 503 otherwise."""
        await in_thread(services.registry.ping)
        age_s = await services.backend.heartbeat_age_s()
        limit_s = services.settings.limits.max_heartbeat_age_s
        if not age_s <= limit_s:
            raise Unavailable(f"The engine last turned {age_s:.0f} s ago; the limit is {limit_s:g} s.")
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """The gateway's and every replica's metrics in the Prometheus text format."""
        try:
            replicas = await services.backend.scrape()
        except DeltamuxError:  # the gateway's own part matters most when the replicas are gone
            services.metrics.scrape_failures.inc()
            replicas = []
        own = families(services.metrics.registry)
        return Response(render([({}, own), *replicas]), media_type=METRICS_TYPE)

    return router
