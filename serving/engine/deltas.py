"""Deltas as the engine sees them: host cache, placement and leases in one place.

A lease is granted from device memory. A digest that is not there is loaded by the host cache's threads; the engine
thread places it when it has arrived and there is room.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch

from adapters.errors import DeltamuxError, InvalidDelta, Overloaded, StoreError
from adapters.normal_form import AttnPrefix, Delta, LinearMap, Op, VirtualTokens, WeightDelta
from serving.core import AdmissionProof
from serving.engine.runner import Runner
from serving.memory.host_cache import HostCache
from serving.memory.residency import Residency
from serving.metrics import EngineMetrics
from serving.model.context import ForwardContext
from serving.model.kv_cache import RowSpan
from serving.model.placement import place
from serving.model.programs import DeltaSegment, PlacedDelta, compile_programs

log = logging.getLogger(__name__)

PROBE_TOKENS = 16
"""Length of the fixed random prompt on which a delta's effect is measured."""


class DeltaManager:
    """`DeltaLeases` over a host cache and a device budget. Engine thread only, but for `host`."""

    def __init__(
        self,
        runner: Runner,
        host: HostCache,
        *,
        capacity_bytes: int,
        metrics: EngineMetrics,
        on_loaded: Callable[[], None],
    ) -> None:
        self.runner = runner
        self.host = host
        self.residency: Residency[PlacedDelta] = Residency(capacity_bytes)
        self._metrics = metrics
        self._on_loaded = on_loaded
        self._loading: dict[str, Future[Delta]] = {}

    def try_lease(self, digest: str) -> PlacedDelta | None:
        """See `DeltaLeases`. Raises the load's own error, or Overloaded for a delta larger than the whole budget."""
        placed = self.residency.lease(digest)
        if placed is not None:
            return placed
        future = self._loading.get(digest)
        if future is None:
            future = self._loading[digest] = self.host.request(digest)
            future.add_done_callback(lambda _: self._on_loaded())
        if not future.done():
            return None
        try:
            if not self._insert(future.result(), digest):
                return None
        except Exception as error:
            del self._loading[digest]
            if isinstance(error, DeltamuxError):
                raise
            log.exception("delta %s can't be loaded", digest[:12])
            raise StoreError(
                "The delta can't be loaded.", param="model", remedy="Upload it again."
            ) from error
        del self._loading[digest]
        return self.residency.lease(digest)

    def end_lease(self, digest: str) -> None:
        """See `DeltaLeases`."""
        self.residency.end_lease(digest)

    def abandon(self, digest: str) -> None:
        """Nobody waits for `digest` any more: do not hold on to what its load brings."""
        self._loading.pop(digest, None)

    def _insert(self, delta: Delta, digest: str) -> bool:
        """Place `delta`; False while leased deltas leave no room."""
        needed = self._device_bytes(delta)
        if needed > self.residency.capacity_bytes:
            raise Overloaded(
                f"The delta needs {needed} bytes of device memory, the budget is {self.residency.capacity_bytes}.",
                param="model",
                remedy="Raise engine.adapter_memory_bytes.",
            )
        before = self.residency.num_evictions
        if not self.residency.make_room(needed):
            return False
        if evicted := self.residency.num_evictions - before:
            self.runner.forget_programs()
            self._metrics.adapter_evictions.inc(evicted)
        started = time.perf_counter()
        self.residency.insert(place(delta, digest, self.runner.backbone))
        self._metrics.adapter_load_seconds.observe(time.perf_counter() - started)
        self._metrics.adapter_loads.inc()
        self._report()
        return True

    def _device_bytes(self, delta: Delta) -> int:
        """What `place` will take: fp32 weights, and keys and values in the backbone's dtype."""
        spec, width = self.runner.backbone.spec, self.runner.backbone.dtype.itemsize
        prefixes = [op for op in delta.ops if isinstance(op, VirtualTokens) or _is_joint(op)]
        entries = delta.num_virtual_tokens * spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim
        in_prefixes = sum(t.numel() for i, _, t in delta.tensors() if delta.ops[i] in prefixes)
        # places become int64, kernels spectra, reflections a pair of factors: at most twice their size
        doubled = sum(
            t.numel()
            for i, name, t in delta.tensors()
            if name == "ids" or isinstance(delta.ops[i], LinearMap | WeightDelta | AttnPrefix)
        )
        return 4 * (delta.num_parameters - in_prefixes + doubled) + (entries * width if prefixes else 0)

    def admit(self, delta: Delta, digest: str) -> AdmissionProof:
        """Place `delta` and measure what it does.

        Raises InvalidDelta for one without effect, Overloaded while there is no room for it.
        """
        started = time.perf_counter()
        if digest not in self.residency and not self._insert(delta, digest):
            raise Overloaded(
                "Deltas in use leave no device memory for the admission probe.", remedy="Try again later."
            )
        load_s = time.perf_counter() - started
        placed = self.residency.lease(digest)
        assert placed is not None
        try:
            effect, scale = self._effect(placed)
        except DeltamuxError:
            self.start_release(digest)
            raise
        finally:
            self.residency.end_lease(digest)
            if self.residency.draining(digest):
                self.finish_release(digest)
        return AdmissionProof(
            effect=effect,
            reference_scale=scale,
            load_s=load_s,
            host_bytes=delta.size_bytes,
            device_bytes=placed.device_bytes,
        )

    def _effect(self, placed: PlacedDelta) -> tuple[float, float]:
        """(max |logit change|, max |bare logit|) on the probe prompt, bare row and delta row in one batch.

        Raises InvalidDelta for a delta that changes nothing or overflows.
        """
        backbone, prefix = self.runner.backbone, placed.prefix_len
        draw = torch.Generator().manual_seed(0)
        row = torch.randint(0, backbone.spec.vocab_size, (PROBE_TOKENS,), generator=draw)
        for weights in (w for ops in placed.modules.values() for w in ops.embeddings):
            row[::2] = weights.ids.cpu()[torch.arange(PROBE_TOKENS // 2) % len(weights.ids)]
        cache = backbone.new_cache(2, prefix + PROBE_TOKENS)
        if placed.prefix is not None:
            cache.write_prefix(1, placed.prefix)
        segments = [DeltaSegment(PROBE_TOKENS, 2 * PROBE_TOKENS, placed)]
        programs = compile_programs(
            len(backbone.spec.modules), backbone.kernels, segments, segments, backbone.logit_modules
        )
        spans = [RowSpan(0, PROBE_TOKENS, 0, 0), RowSpan(PROBE_TOKENS, 2 * PROBE_TOKENS, 1, prefix)]
        positions = torch.arange(PROBE_TOKENS)
        logits = backbone.forward(
            torch.cat([row, row]).to(backbone.device),
            torch.cat([positions, positions + placed.position_offset]).to(backbone.device),
            ForwardContext(programs, cache.plan(spans)),
            torch.arange(2 * PROBE_TOKENS, device=backbone.device),
        )
        bare, changed = torch.split(logits, PROBE_TOKENS)
        if not torch.isfinite(changed).all():
            raise InvalidDelta(["The delta makes non-finite logits on the probe tokens."])
        effect = float((changed - bare).abs().max())
        if not effect > 0.0:  # also true for NaN
            raise InvalidDelta(
                [
                    f"The delta has no effect: its logits equal the bare backbone's on {PROBE_TOKENS} probe tokens."
                ],
                remedy="Check that the trained weights were saved; a freshly initialised adapter changes nothing.",
            )
        return effect, float(bare.abs().max())

    def start_release(self, digest: str) -> None:
        """Admit no new request to `digest`."""
        self.residency.start_release(digest)
        self.host.drop(digest)

    def finish_release(self, digest: str) -> int | None:
        """Bytes freed, or None while requests still run."""
        freed = self.residency.finish_release(digest)
        if freed is not None:
            self.runner.forget_programs()
            self._loading.pop(digest, None)
            self._report()
        return freed

    def _report(self) -> None:
        self._metrics.adapters_resident.set(len(self.residency))
        self._metrics.adapter_bytes.set(self.residency.used_bytes)


def _is_joint(op: Op) -> bool:
    return isinstance(op, AttnPrefix) and op.merge == "joint"
