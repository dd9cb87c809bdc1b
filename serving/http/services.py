"""What every route works with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from adapters.registry import Registry
from adapters.store import BlobStore
from serving.config import Settings
from serving.core import BackboneInfo, Backend
from serving.http.access import Access
from serving.http.admission import Admission
from serving.http.bodies import json_route
from serving.metrics import GatewayMetrics
from serving.tenancy.tenancy import Tenancy


class Services:
    """The parts that the gateway stands on. Use from one event loop."""

    def __init__(
        self,
        *,
        backend: Backend,
        registry: Registry,
        store: BlobStore,
        tenancy: Tenancy,
        settings: Settings,
        metrics: GatewayMetrics,
    ) -> None:
        self.backend = backend
        self.registry = registry
        self.store = store
        self.tenancy = tenancy
        self.admission = Admission(tenancy.buckets, tenancy.places, tenancy.ledger)
        self.route_class = json_route(settings.limits.max_body_bytes, Access(tenancy).gate)
        self.settings = settings
        self.metrics = metrics
        self._backbone: BackboneInfo | None = None
        self._digest_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def backbone(self) -> BackboneInfo:
        """The backbone behind `backend`, asked for once: it never changes while this gateway lives."""
        if self._backbone is None:
            self._backbone = await self.backend.describe()
        return self._backbone

    @asynccontextmanager
    async def digest_lock(self, digest: str) -> AsyncIterator[None]:
        """Hold what becomes of one content: two uploads of it, or an upload and a delete, must not cross."""
        lock = self._digest_locks.get(digest)
        if lock is None:
            lock = self._digest_locks[digest] = asyncio.Lock()
        async with lock:
            yield
