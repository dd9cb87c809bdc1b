"""What every route works with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from anyio import to_thread

from adapters.registry import DEFAULT_TENANT, Registry
from adapters.store import BlobStore
from serving.config import Settings
from serving.core import BackboneInfo, Backend
from serving.metrics import GatewayMetrics

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work(*args, **kwargs)` off the event loop. Cancelling the wait does not stop the thread."""
    return await to_thread.run_sync(partial(work, *args, **kwargs))


class Services:
    """The parts that the gateway stands on. Use from one event loop."""

    def __init__(
        self,
        *,
        backend: Backend,
        registry: Registry,
        store: BlobStore,
        settings: Settings,
        metrics: GatewayMetrics,
    ) -> None:
        self.backend = backend
        self.registry = registry
        self.store = store
        self.settings = settings
        self.metrics = metrics
        self.tenant = DEFAULT_TENANT  # single-tenant mode: every caller is this one
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
