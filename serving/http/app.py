"""The gateway as one ASGI application. Stateless: everything lasting is in the registry and the store."""

from __future__ import annotations

from fastapi import FastAPI

from adapters.registry import Registry
from adapters.spool import Spool
from adapters.store import BlobStore
from serving.config import Settings
from serving.core import Backend
from serving.http.access import Access, require_declared
from serving.http.adapters import adapters_router
from serving.http.admin import admin_router
from serving.http.aliases import aliases_router
from serving.http.bodies import json_route
from serving.http.contents import contents_router
from serving.http.edge import Edge
from serving.http.errors import install_handlers
from serving.http.files import files_router
from serving.http.generation import generation_router
from serving.http.grants import grants_router
from serving.http.models import models_router
from serving.http.openapi import DescribedApp
from serving.http.operations import operations_router
from serving.http.pooling import pooling_router
from serving.http.services import Services
from serving.http.signers import signers_router
from serving.http.similar import similar_router
from serving.http.usage import usage_router
from serving.metrics import GatewayMetrics
from serving.tenancy.tenancy import Tenancy


def create_app(
    *,
    backend: Backend,
    registry: Registry,
    store: BlobStore,
    spool: Spool,
    tenancy: Tenancy,
    settings: Settings,
    metrics: GatewayMetrics,
) -> FastAPI:
    """The application over these parts, which the caller opens and closes. It runs on one event loop.

    Administrators' routes are among its own unless the settings give them a port.
    """
    services = Services(
        backend=backend,
        registry=registry,
        store=store,
        spool=spool,
        tenancy=tenancy,
        settings=settings,
        metrics=metrics,
    )
    app = _application(metrics)
    routers = (
        models_router,
        generation_router,
        pooling_router,
        adapters_router,
        files_router,
        aliases_router,
        contents_router,
        similar_router,
        grants_router,
        signers_router,
        usage_router,
        operations_router,
    )
    for make_router in routers:
        app.include_router(make_router(services))
    if settings.server.admin_port is None:  # else `create_admin_app` has them
        app.include_router(admin_router(tenancy, services.route_class))
    require_declared(app)
    return app


def create_admin_app(*, tenancy: Tenancy, settings: Settings, metrics: GatewayMetrics) -> FastAPI:
    """The routes of administrators alone, for a port of their own. Runs on one event loop."""
    app = _application(metrics)
    route_class = json_route(settings.limits, Access(tenancy).gate)
    app.include_router(admin_router(tenancy, route_class))
    require_declared(app)
    return app


def _application(metrics: GatewayMetrics) -> FastAPI:
    # no redirects: a path that is not a route is answered in the envelope
    app = DescribedApp(
        title="deltamux",
        summary="Many PEFT deltas over one frozen backbone",
        redirect_slashes=False,
    )
    app.add_middleware(Edge, metrics=metrics)
    install_handlers(app)
    return app
