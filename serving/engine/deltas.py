"""Deltas as the engine sees them: host cache, placement and leases in one place.

A lease is granted from device memory. A digest that is not there is loaded by the host cache's threads; when it has
arrived and there is room, another thread places it, and the engine thread only takes it over between two steps. A delta
that is small beside the backbone is placed between two steps: waiting for a thread would cost it a whole step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from adapters.errors import DeltamuxError, Overloaded, StoreError
from adapters.normal_form import Affine, AttnPrefix, Delta, LinearMap, LowRank, Op, VirtualTokens
from serving.core import AdmissionProof
from serving.engine.effect import Prober
from serving.engine.leases import NotYet
from serving.engine.runner import Runner
from serving.memory.budget import MemoryBudget
from serving.memory.host_cache import HostCache
from serving.memory.residency import Residency
from serving.metrics import EngineMetrics
from serving.model.placed_size import max_device_bytes
from serving.model.placement import place
from serving.model.programs import PlacedDelta

log = logging.getLogger(__name__)


class _Probe(NamedTuple):
    """Something to measure on a delta in device memory, and who waits for it; `measure` is told the load's seconds."""

    measure: Callable[[PlacedDelta, float], Any]
    answer: Future[Any]


AT_ONCE_SHARE = 1 / 64
"""Bytes of deltas that are placed between two steps, as a share of the backbone's, all of which a step reads: a few
percent of a step's time. On CPU the other rows lose no less to a thread that places them beside the step."""


class _Placing(NamedTuple):
    """A delta on its way to the device: room is reserved, `probes` wait for it."""

    reserved_bytes: int
    probes: list[_Probe]


class DeltaManager:
    """`DeltaLeases` over a host cache and the shared memory budget. Engine thread only, but for `host`.

    `post` runs something on the engine thread between two steps.
    """

    def __init__(
        self,
        runner: Runner,
        host: HostCache,
        *,
        budget: MemoryBudget,
        metrics: EngineMetrics,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self.runner = runner
        self.host = host
        self.residency: Residency[PlacedDelta] = Residency(budget, self._evicted)
        self._metrics = metrics
        self._post = post
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="delta-place")
        self._loading: dict[str, Future[Delta]] = {}
        self._placing: dict[str, _Placing] = {}
        self._failed: dict[str, DeltamuxError] = {}
        self._releasing: set[str] = set()
        self._prober = Prober(runner.backbone)
        self._at_once_bytes = 0

    def start_step(self) -> None:
        """A step begins: some deltas may be placed at once again."""
        shapes = (module.shape for module in self.runner.backbone.spec.modules)
        weights = sum(shape.d_in * shape.d_out for shape in shapes) * self.runner.backbone.dtype.itemsize
        self._at_once_bytes = int(weights * AT_ONCE_SHARE)

    def try_lease(self, digest: str) -> PlacedDelta | NotYet:
        """See `DeltaLeases`. Raises the load's own error, or Overloaded for a delta larger than the whole budget."""
        placed = self.residency.lease(digest)
        if placed is not None:
            return placed
        if digest in self._placing:
            return NotYet.LOADING
        if digest in self._failed:
            raise self._failed.pop(digest)
        future = self._loading.get(digest)
        if future is None:
            future = self._loading[digest] = self.host.request(digest)
            future.add_done_callback(lambda _: self._post(_nothing))  # wakes the engine
        if not future.done():
            return NotYet.LOADING
        try:
            if not self._start_placing(future.result(), digest):
                return NotYet.CROWDED
        except Exception as error:
            del self._loading[digest]
            raise load_error(error, digest) from error
        del self._loading[digest]
        return self.residency.lease(digest) or NotYet.LOADING

    def end_lease(self, digest: str) -> None:
        """See `DeltaLeases`."""
        self.residency.end_lease(digest)

    def is_resident(self, digest: str) -> bool:
        """See `DeltaLeases`."""
        return digest in self.residency

    def prefetch(self, digest: str) -> None:
        """See `DeltaLeases`. It comes into host memory only, which its own budget bounds."""
        if digest not in self.residency and digest not in self._placing:
            self.host.request(digest)

    def abandon(self, digest: str) -> None:
        """Nobody waits for `digest` any more: do not hold on to what its load brings."""
        self._loading.pop(digest, None)
        self._failed.pop(digest, None)

    def close(self) -> None:
        """Stop the loader threads; what is under way is abandoned."""
        self.host.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start_placing(self, delta: Delta, digest: str) -> bool:
        """Reserve room and place `delta`, on a thread of its own or at once; False while what is in use leaves no room.

        Virtual tokens need a forward pass, which the engine thread alone may run: such a delta is there at once.
        """
        needed, capacity = max_device_bytes(delta, self.runner.backbone), self.residency.budget.capacity_bytes
        if needed > capacity:
            raise Overloaded(
                f"The delta needs {needed} bytes of device memory, the budget is {capacity}.",
                param="model",
                remedy="Raise engine.memory_bytes.",
            )
        if not self.residency.reserve(needed):
            return False
        self._placing[digest] = _Placing(needed, [])

        def work() -> tuple[PlacedDelta, float]:
            started = time.perf_counter()
            placed = place(delta, digest, self.runner.backbone)
            return placed, time.perf_counter() - started

        copied = needed <= self._at_once_bytes and all(_is_copied(op) for op in delta.ops)
        if copied or any(isinstance(op, VirtualTokens) for op in delta.ops):
            self._at_once_bytes -= needed
            done: Future[tuple[PlacedDelta, float]] = Future()
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            self._settle(digest, done)
            if digest in self._failed:
                raise self._failed.pop(digest)
        else:
            future = self._pool.submit(work)
            future.add_done_callback(lambda done: self._post(lambda: self._settle(digest, done)))
        return True

    def _settle(self, digest: str, done: Future[tuple[PlacedDelta, float]]) -> None:
        """Take over what was placed, and the seconds it took, or give the room back; answer who waits for a probe."""
        reserved_bytes, probes = self._placing.pop(digest)
        error = done.exception()
        if error is not None:
            self.residency.cancel(reserved_bytes)
            self._failed[digest] = load_error(error, digest)
            for probe in probes:
                probe.answer.set_exception(self._failed[digest])
            if probes:  # they have been told
                del self._failed[digest]
            return
        placed, load_s = done.result()
        self.residency.insert(placed, reserved_bytes=reserved_bytes, load_s=load_s)
        if digest in self._releasing:
            self.residency.start_release(digest)
        self._metrics.adapter_load_seconds.observe(load_s)
        self._metrics.adapter_loads.inc()
        self._report()
        for probe in probes:
            self._measure(digest, load_s, probe)

    def _evicted(self, digest: str) -> None:
        self._forget(digest)
        self._metrics.adapter_evictions.inc()
        self._report()

    def admit(self, delta: Delta, digest: str, proof: Future[AdmissionProof]) -> None:
        """Place `delta`, measure what it does, and tell `proof`.

        It gets InvalidDelta for one without effect, Overloaded while there is no room for it.
        """

        def prove(placed: PlacedDelta, load_s: float) -> AdmissionProof:
            effect, scale = self._prober.effect(placed)
            return AdmissionProof(
                effect=effect,
                reference_scale=scale,
                load_s=load_s,
                host_bytes=delta.size_bytes,
                device_bytes=placed.device_bytes,
            )

        self._probe(delta, digest, _Probe(prove, proof))

    def find_activations(self, delta: Delta, digest: str, found: Future[bytes]) -> None:
        """Place `delta` if need be, and tell `found` which neurons it activates; see `activations`."""
        self._probe(delta, digest, _Probe(lambda placed, _: self._prober.activations(placed), found))

    def _probe(self, delta: Delta, digest: str, probe: _Probe) -> None:
        try:
            if digest not in self.residency and digest not in self._placing:
                self._place_for_probe(delta, digest)
        except DeltamuxError as error:
            probe.answer.set_exception(error)
            return
        if digest in self._placing:
            self._placing[digest].probes.append(probe)
        else:
            self._measure(digest, 0.0, probe)

    def _place_for_probe(self, delta: Delta, digest: str) -> None:
        if not self._start_placing(delta, digest):
            raise Overloaded(
                "What is in use leaves no device memory for the admission probe.", remedy="Try again later."
            )

    def _measure(self, digest: str, load_s: float, probe: _Probe) -> None:
        """Answer `probe` about a resident delta; one that is refused leaves the device."""
        try:
            placed = self.residency.lease(digest)
            assert placed is not None
            try:
                measured = probe.measure(placed, load_s)
            except DeltamuxError:
                self.start_release(digest)
                raise
            finally:
                self.residency.end_lease(digest)
                if self.residency.draining(digest):
                    self.finish_release(digest)
        except Exception as error:
            probe.answer.set_exception(error)
            return
        probe.answer.set_result(measured)

    def start_release(self, digest: str) -> None:
        """Admit no new request to `digest`."""
        self.residency.start_release(digest)
        self.host.drop(digest)
        if digest in self._placing:
            self._releasing.add(digest)

    def finish_release(self, digest: str) -> int | None:
        """Bytes freed, or None while requests still run or the delta is just being placed."""
        if digest in self._placing:
            return None
        freed = self.residency.finish_release(digest)
        if freed is not None:
            self._forget(digest)
            self._loading.pop(digest, None)
            self._releasing.discard(digest)
            self._report()
        return freed

    def _forget(self, digest: str) -> None:
        """Let go of what the runner made of a delta's weights."""
        self.runner.forget_programs()
        if self.runner.merging is not None:
            self.runner.merging.evict(digest)

    def _report(self) -> None:
        self._metrics.adapters_resident.set(len(self.residency))
        self._metrics.adapter_bytes.set(self.residency.used_bytes)


def _nothing() -> None:
    """What is posted to the engine only to wake it."""


def load_error(error: BaseException, digest: str) -> DeltamuxError:
    """What a caller is told of a load that failed."""
    if isinstance(error, DeltamuxError):
        return error
    log.error("delta %s can't be loaded", digest[:12], exc_info=error)
    return StoreError("The delta can't be loaded.", param="model", remedy="Upload it again.")


def _is_copied(op: Op) -> bool:
    """True where placing is no more than a copy: nothing is computed from the base weights, or from its own."""
    match op:
        case LowRank() | VirtualTokens():
            return True
        case Affine():
            return not op.weight_normalized
        case AttnPrefix():
            return op.merge == "joint"
        case LinearMap():
            return op.reflections is None
        case _:
            return False
