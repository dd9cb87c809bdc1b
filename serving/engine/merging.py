"""When a batch runs merged weights: all of its rows have used one delta for long enough.

Merging costs as much as some dozen steps and memory like the layers that it copies, so it happens beside the engine's
thread, for one delta at a time, and only as long as the byte budget has room. Engine thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from serving.memory.budget import MemoryBudget
from serving.model.backbone import Backbone
from serving.model.merge import merge, merged_bytes
from serving.model.packed import Forward
from serving.model.programs import NOTHING_MERGED, PlacedDelta

log = logging.getLogger(__name__)

CONSUMER = "merged"


@dataclass(slots=True, eq=False)
class _Merged:
    """One delta's merged weights, or their making. `size_bytes` are reserved until it has ended."""

    delta: PlacedDelta
    size_bytes: int
    weights: Future[Mapping[int, Forward]]
    abandoned: bool = False


class HotMerge:
    """Counts steps of one sole delta and keeps that delta's merged weights; a `Consumer` of the memory budget.

    A delta is the placed one, not its digest: what is placed anew is merged anew. `forget()` is called when merged
    weights go, so that nobody holds on to them.
    """

    def __init__(
        self, backbone: Backbone, budget: MemoryBudget, *, after_steps: int, forget: Callable[[], None]
    ) -> None:
        # merged half-precision weights would round the delta away
        served = backbone.dtype == torch.float32 and backbone.device.type == "cpu"
        self._after_steps = after_steps if served else 0
        self._backbone = backbone
        self._budget = budget
        self._forget = forget
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="delta-merge")
        self._sole: PlacedDelta | None = None
        self._steps = 0
        self._merged: _Merged | None = None
        budget.register(CONSUMER, self)

    def weights_for(self, sole: PlacedDelta | None) -> Mapping[int, Forward]:
        """The merged modules that the next step runs, if any. `sole`: the delta of all its rows, None if mixed."""
        if self._after_steps == 0:
            return NOTHING_MERGED
        self._steps = self._steps + 1 if sole is self._sole else 1
        self._sole = sole
        merged = self._merged
        if merged is None:
            if sole is not None and self._steps == self._after_steps:
                self._start(sole)
            return NOTHING_MERGED
        if merged.delta is sole and not merged.abandoned:
            return self._finished(merged)
        if merged.abandoned or self._steps >= self._after_steps:
            self.drop()
        return NOTHING_MERGED

    def evict(self, digest: str) -> None:
        """The delta leaves the device: its merged weights go with it."""
        if self._sole is not None and self._sole.digest == digest:
            self._sole = None
        if self._merged is not None and self._merged.delta.digest == digest:
            self.drop()

    @property
    def idle_bytes(self) -> int:
        """See `Consumer`: whatever is merged can go, since the base and the delta are still there."""
        merged = self._merged
        return merged.size_bytes if merged is not None and merged.weights.done() else 0

    def least_worth(self) -> float:
        """See `Consumer`. Merged weights only save time, so they go before anything that would have to be loaded."""
        return 0.0

    def drop(self) -> None:
        """See `Consumer`. Give up the merged weights; those of the base were never touched."""
        merged = self._merged
        if merged is None:
            return
        if merged.weights.cancel() or merged.weights.done():
            self._budget.free(CONSUMER, merged.size_bytes)
            self._merged = None
            self._steps = 0
            self._forget()
        else:  # the thread still allocates: its bytes are given back when it has ended
            merged.abandoned = True

    def close(self) -> None:
        """Stop the merging thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, delta: PlacedDelta) -> None:
        size_bytes = merged_bytes(delta, self._backbone)
        if size_bytes and self._budget.reserve(CONSUMER, size_bytes):
            self._merged = _Merged(delta, size_bytes, self._pool.submit(merge, delta, self._backbone))

    def _finished(self, merged: _Merged) -> Mapping[int, Forward]:
        if not merged.weights.done():
            return NOTHING_MERGED
        if (error := merged.weights.exception()) is not None:  # the delta goes on unmerged
            log.error("delta %s can't be merged", merged.delta.digest[:12], exc_info=error)
            self.drop()
            self._after_steps = 0
            return NOTHING_MERGED
        return merged.weights.result()
