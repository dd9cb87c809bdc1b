"""The backbone deployment: one frozen model, its engine thread and its deltas, per replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from ray import serve

from adapters.errors import ErrorInfo, Unavailable
from serving.config import Settings
from serving.core import AdmissionProof, BackboneInfo, Event, GenerateCall, MetricFamily
from serving.deployments.interpreter import settle
from serving.deployments.logs import write_to_serves_file

if TYPE_CHECKING:
    from serving.engine.backend import LocalBackend

FLUSH_S = 0.03
"""Tokens wait this long for one another after a call's first ones: a message costs more than a token."""


class BackboneReplica:
    """`Backend` as Serve's handle calls it, method by method.

    The engine runs on a thread of its own, so Serve may run these methods on the replica's main loop (throughput
    mode) or on a loop for user code.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        """Load the backbone and start the engine. Raises BackboneRefused, StoreError."""
        write_to_serves_file()
        self._max_heartbeat_age_s = settings.limits.max_heartbeat_age_s
        self._labels = {"replica": str(serve.get_replica_context().rank.rank)}
        self._backend = await asyncio.to_thread(_build, settings)
        settle()
        self._backend.start()

    async def check_health(self) -> None:
        """Serve's probe; a raise has the replica replaced."""
        age_s = await self._backend.heartbeat_age_s()
        if age_s > self._max_heartbeat_age_s:
            raise Unavailable(f"The engine has not turned for {age_s:.0f} s.")

    async def describe(self) -> BackboneInfo:
        """See `Backend`."""
        return await self._backend.describe()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[tuple[Event, ...], None]:
        """See `Backend`. Serve's cancellation arrives at the `await` inside and ends the request."""
        async with aclosing(self._backend.generate(call)) as batches:
            async for batch in batches:
                yield batch

    async def admit(self, digest: str) -> AdmissionProof | ErrorInfo:
        """See `Backend`."""
        return await self._backend.admit(digest)

    async def activations(self, digest: str) -> bytes | ErrorInfo:
        """See `Backend`."""
        return await self._backend.activations(digest)

    async def release(self, digest: str) -> int:
        """See `Backend`."""
        return await self._backend.release(digest)

    async def scrape(self) -> list[tuple[Mapping[str, str], tuple[MetricFamily, ...]]]:
        """See `Backend`. Labelled with the replica's rank, which its successor takes over."""
        return [({**labels, **self._labels}, found) for labels, found in await self._backend.scrape()]

    async def heartbeat_age_s(self) -> float:
        """See `Backend`."""
        return await self._backend.heartbeat_age_s()


def _build(settings: Settings) -> LocalBackend:
    # here, not above: the driver imports this module to deploy the class and must stay free of torch
    from adapters.store import open_store  # noqa: PLC0415
    from serving.engine.backend import LocalBackend  # noqa: PLC0415
    from serving.memory.budget import auto_capacity  # noqa: PLC0415
    from serving.model.backbone import load_backbone  # noqa: PLC0415

    wanted = settings.backbone
    backbone = load_backbone(
        wanted.path,
        name=wanted.served_name,
        device=wanted.device,
        dtype=wanted.dtype,
        kernels=settings.engine.kernels,
    )
    engine = settings.engine
    if engine.memory_bytes is None and backbone.device.type == "cpu":
        engine = engine.model_copy(update={"memory_bytes": auto_capacity() // settings.replicas})
    return LocalBackend(backbone, open_store(settings.store.path), engine, flush_s=FLUSH_S)
