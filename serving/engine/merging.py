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

from serving.model.backbone import Backbone
from serving.model.merge import merge, merged_bytes
from serving.model.packed import Forward
from serving.model.programs import NOTHING_MERGED, PlacedDelta

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Merged:
    """One delta's merged weights, or their making. `size_bytes` are reserved until it has ended."""

    digest: str
    size_bytes: int
    weights: Future[Mapping[int, Forward]]
    abandoned: bool = False


class HotMerge:
    """Counts steps of one sole delta and keeps that delta's merged weights.

    `reserve(size_bytes)` takes memory from the budget or says False; `free(size_bytes)` gives it back.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        after_steps: int,
        reserve: Callable[[int], bool],
        free: Callable[[int], None],
    ) -> None:
        # merged half-precision weights would round the delta away
        self._after_steps = (
            after_steps if backbone.dtype == torch.float32 and backbone.device.type == "cpu" else 0
        )
        self._backbone = backbone
        self._reserve = reserve
        self._free = free
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="delta-merge")
        self._sole: str | None = None
        self._steps = 0
        self._merged: _Merged | None = None

    def weights_for(self, sole: PlacedDelta | None) -> Mapping[int, Forward]:
        """The merged modules that the next step runs, if any. `sole`: the delta of all its rows, None if mixed."""
        if self._after_steps == 0:
            return NOTHING_MERGED
        digest = None if sole is None else sole.digest
        self._steps = self._steps + 1 if digest == self._sole else 1
        self._sole = digest
        merged = self._merged
        if merged is None:
            if sole is not None and self._steps == self._after_steps:
                self._start(sole)
            return NOTHING_MERGED
        if digest == merged.digest and not merged.abandoned:
            return self._finished(merged)
        if merged.abandoned or self._steps >= self._after_steps:
            self.drop(merged.digest)
        return NOTHING_MERGED

    def drop(self, digest: str) -> None:
        """Give up the merged weights of `digest`; base weights were never touched."""
        merged = self._merged
        if merged is None or merged.digest != digest:
            return
        if merged.weights.cancel() or merged.weights.done():
            self._free(merged.size_bytes)
            self._merged = None
            self._steps = 0
        else:  # the thread still allocates: its bytes are given back when it has ended
            merged.abandoned = True

    def close(self) -> None:
        """Stop the merging thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, delta: PlacedDelta) -> None:
        size_bytes = merged_bytes(delta, self._backbone)
        if size_bytes and self._reserve(size_bytes):
            weights = self._pool.submit(merge, delta, self._backbone)
            self._merged = _Merged(delta.digest, size_bytes, weights)

    def _finished(self, merged: _Merged) -> Mapping[int, Forward]:
        if not merged.weights.done():
            return NOTHING_MERGED
        if (error := merged.weights.exception()) is not None:  # the delta goes on unmerged
            log.error("delta %s can't be merged", merged.digest[:12], exc_info=error)
            self.drop(merged.digest)
            self._after_steps = 0
            return NOTHING_MERGED
        return merged.weights.result()
