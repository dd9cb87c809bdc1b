"""Administrators' routes on a port of their own, served by the process that started everything, not by a gateway.

Serve's proxies listen on one address and know no routes apart, so a second port has to be somebody else's. These
routes need the database alone, and so they also answer while no gateway does.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from prometheus_client import CollectorRegistry

from serving.config import Settings
from serving.http.app import create_admin_app
from serving.metrics import GatewayMetrics
from serving.tenancy.tenancy import Tenancy

GRACE_S = 5
"""How long requests may take to end with the server."""


@contextmanager
def answering(settings: Settings, bound: socket.socket) -> Iterator[None]:
    """Answer on `bound` from a thread while the body runs. Raises RegistryUnavailable."""
    with Tenancy(settings) as tenancy:
        metrics = GatewayMetrics(CollectorRegistry())
        config = uvicorn.Config(
            create_admin_app(tenancy=tenancy, settings=settings, metrics=metrics),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([bound],), name="administration", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join()
