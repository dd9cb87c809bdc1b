"""What every route works with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from adapters.file_uploads import FileUploads
from adapters.quotas import Quota
from adapters.registry import Registry
from adapters.spool import Spool
from adapters.store import BlobStore
from serving.config import Settings, linger_s
from serving.core import BackboneInfo, Backend
from serving.http.access import Access
from serving.http.admission import Admission
from serving.http.bodies import json_route
from serving.http.idempotency import Idempotency
from serving.http.slots import UploadSlots
from serving.metrics import GatewayMetrics
from serving.tenancy.principal import Principal
from serving.tenancy.tenancy import Tenancy


class Services:
    """The parts that the gateway stands on. Use from one event loop."""

    def __init__(
        self,
        *,
        backend: Backend,
        registry: Registry,
        store: BlobStore,
        spool: Spool,
        tenancy: Tenancy,
        settings: Settings,
        metrics: GatewayMetrics,
    ) -> None:
        self.backend = backend
        self.registry = registry
        self.store = store
        self.tenancy = tenancy
        self.admission = Admission(tenancy.buckets, tenancy.places, tenancy.ledger)
        limits, gate = settings.limits, Access(tenancy).gate
        self.files = FileUploads(
            registry.uploads, spool, lifetime_s=limits.file_lifetime_s, linger_s=linger_s(settings)
        )
        self.slots = UploadSlots(limits.max_open_uploads, metrics.uploads_open)
        self.idempotency = Idempotency(registry.idempotency, settings)
        self.route_class = json_route(limits, gate)
        self.mutation_class = json_route(limits, gate, around=self.idempotency.around)
        self.settings = settings
        self.metrics = metrics
        self._backbone: BackboneInfo | None = None
        self._digest_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def quota(self, caller: Principal) -> Quota:
        """What the caller's tenant may keep: its own limits, where it has them, before the settings'."""
        own, common = caller.limits, self.settings.limits
        return Quota(
            max_stored_bytes=own.max_stored_bytes or common.max_stored_bytes,
            max_adapters=own.max_adapters or common.max_adapters,
            max_versions=own.max_versions or common.max_versions,
            max_files=own.max_files or common.max_files,
        )

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
