"""The gateway deployment: the HTTP application, built in the replica, over a `RayBackend`. Stateless."""

from __future__ import annotations

import fcntl
import os
from dataclasses import asdict
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from ray.serve.handle import DeploymentHandle

from serving.config import Settings, linger_s
from serving.deployments.interpreter import settle, take_turns
from serving.deployments.logs import write_to_serves_file

_LOCK = "gateway.lock"
ABANDONED_AFTER_S = 3600.0
"""Age from which staging and open rows of the ledger are taken for abandoned while there are other gateways."""


class Gateway:
    """Deployed through `serve.ingress()`, which asks it for its application."""

    def __init__(self, settings: Settings, backbone: DeploymentHandle) -> None:
        self._settings = settings
        self._backbone = backbone

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP application."""
        write_to_serves_file()
        # here, not above: the driver imports this module to deploy the class and must stay light
        from adapters.collector import Collector  # noqa: PLC0415
        from adapters.file_uploads import FileUploads  # noqa: PLC0415
        from adapters.registry import Registry  # noqa: PLC0415
        from adapters.spool import Spool  # noqa: PLC0415
        from adapters.store import LocalBlobStore, open_store  # noqa: PLC0415
        from serving.deployments.collection import start_collecting  # noqa: PLC0415
        from serving.deployments.handle import RayBackend  # noqa: PLC0415
        from serving.deployments.housekeeping import start_keeping  # noqa: PLC0415
        from serving.http.app import create_app  # noqa: PLC0415
        from serving.metrics import GatewayMetrics  # noqa: PLC0415
        from serving.tenancy.tenancy import Tenancy  # noqa: PLC0415

        store = open_store(self._settings.store.path)
        alone = False  # whether no other gateway runs: known of a directory, which is one machine's
        if isinstance(store, LocalBlobStore):
            self._lock, alone = _share_store(Path(self._settings.store.path))
            # what a killed server left; with other gateways on the store, only what is old
            store.sweep_staging(0.0 if alone else ABANDONED_AFTER_S)
        registry = Registry(self._settings.database.url)
        metrics = GatewayMetrics(CollectorRegistry())
        spool = Spool(self._settings.store.spool_path)
        files = FileUploads(
            registry.uploads,
            spool,
            lifetime_s=self._settings.limits.file_lifetime_s,
            linger_s=linger_s(self._settings),
        )
        collector = Collector(registry, store, grace_s=self._settings.store.grace_s, files=files)
        start_collecting(collector, metrics, self._settings.store.collect_every_s)
        timeout_s = self._settings.limits.request_timeout_s
        tenancy = Tenancy(
            self._settings, on_closed=lambda outcome, tokens: metrics.count_usage(outcome, asdict(tokens))
        )
        if alone:  # requests that a killed gateway left open
            tenancy.ledger.recover(older_than_s=0.0)
        start_keeping(
            tenancy.ledger,
            keep_days=self._settings.ledger.keep_days,
            abandoned_after_s=timeout_s + ABANDONED_AFTER_S,  # they can't be a living gateway's any more
        )
        app = create_app(
            backend=RayBackend(self._backbone, timeout_s=timeout_s),
            registry=registry,
            store=store,
            spool=spool,
            tenancy=tenancy,
            settings=self._settings,
            metrics=metrics,
        )
        settle()
        take_turns()
        return app


def _share_store(root: Path) -> tuple[int, bool]:
    """(descriptor of a lock held for as long as this process lives, whether no other process held one)."""
    lock = os.open(root / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except BlockingIOError:
        alone = False
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock, alone
