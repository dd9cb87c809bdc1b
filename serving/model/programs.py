"""Delta programs: for each module of the backbone, what the deltas of one batch do around its base forward.

A `PlacedDelta` holds, per module index, its weights on the device. `compile_programs` turns the segments of a batch
into one `ModuleProgram` per touched module; a module that no delta of the batch touches keeps None and runs at bare
speed. The order of operations is that of `adapters.normal_form`.
Legend: T tokens, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.normal_form import Site
from serving.kernels.ops import AffineSegment, AffineWeights, DeltaKernels, LowRankSegment, LowRankWeights
from serving.model.context import ForwardContext


@dataclass(slots=True)
class PlacedModule:
    """One delta's ops at one module. `remote` LowRanks read a site that another module sees."""

    inputs: list[AffineWeights] = field(default_factory=list)
    parallel: list[LowRankWeights] = field(default_factory=list)
    remote: list[tuple[Site, LowRankWeights]] = field(default_factory=list)
    outputs: list[AffineWeights] = field(default_factory=list)
    sequential: list[LowRankWeights] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class PlacedDelta:
    """A delta in device memory. `taps`: for each site that is read from afar, the module whose input it is.

    `prefix`: per layer (key, value), each [l, kv_heads, D], in the KV cache's dtype; None without virtual tokens.
    """

    digest: str
    modules: Mapping[int, PlacedModule]
    taps: Mapping[Site, int]
    prefix: list[tuple[Tensor, Tensor]] | None
    position_offset: int
    device_bytes: int

    @property
    def prefix_len(self) -> int:
        """Key-value entries in front of every request of this delta."""
        return 0 if self.prefix is None else int(self.prefix[0][0].shape[0])


class DeltaSegment(NamedTuple):
    """Tokens [start, stop) of the batch belong to `delta`."""

    start: int
    stop: int
    delta: PlacedDelta


class ModuleProgram:
    """What the deltas of one batch do at one module."""

    __slots__ = ("capture", "inputs", "kernels", "outputs", "parallel", "remote", "sequential")

    def __init__(self, kernels: DeltaKernels) -> None:
        self.kernels = kernels
        self.capture: Site | None = None
        self.inputs: list[AffineSegment] = []
        self.parallel: list[LowRankSegment] = []
        self.remote: dict[Site, list[LowRankSegment]] = {}
        self.outputs: list[AffineSegment] = []
        self.sequential: list[LowRankSegment] = []

    def add(self, start: int, stop: int, ops: PlacedModule) -> None:
        """Let tokens [start, stop) run through `ops`."""
        self.inputs += [AffineSegment(start, stop, w) for w in ops.inputs]
        self.parallel += [LowRankSegment(start, stop, w) for w in ops.parallel]
        for site, w in ops.remote:
            self.remote.setdefault(site, []).append(LowRankSegment(start, stop, w))
        self.outputs += [AffineSegment(start, stop, w) for w in ops.outputs]
        self.sequential += [LowRankSegment(start, stop, w) for w in ops.sequential]

    def run(
        self, context: ForwardContext, base: Callable[..., Any], x: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """The module's output with this batch's deltas.

        Shapes: x [1, T, I], or [T, I] in blocks that flatten (token ids [1, T] at `embed`) -> the same with O.
        Branches are computed and summed in fp32 and rounded once, as PEFT does on a half-precision base.
        """
        x_TI = x.reshape(-1, x.shape[-1])
        if self.capture is not None:
            context.captured[self.capture] = x_TI
        base_x = x
        if self.inputs:
            scaled = x_TI.to(torch.float32, copy=True)
            self.kernels.apply_affine(scaled, self.inputs)
            base_x = scaled.to(x.dtype).view(x.shape)
        y: Tensor = base(base_x, *args, **kwargs)
        if not (self.parallel or self.remote or self.outputs or self.sequential):
            return y
        # y itself where it is fp32 already: modules return fresh tensors
        out = y.reshape(-1, y.shape[-1]).to(torch.float32)
        if self.parallel:
            self.kernels.add_low_rank(out, x_TI.to(torch.float32), self.parallel)
        for site, segments in self.remote.items():
            self.kernels.add_low_rank(out, context.captured[site].to(torch.float32), segments)
        if self.outputs:
            self.kernels.apply_affine(out, self.outputs)
        if self.sequential:
            self.kernels.add_low_rank(out, out, self.sequential)
        return out.to(y.dtype).view(y.shape)


def compile_programs(
    num_modules: int,
    kernels: DeltaKernels,
    token_segments: Sequence[DeltaSegment],
    logit_segments: Sequence[DeltaSegment],
    logit_modules: frozenset[int],
) -> list[ModuleProgram | None]:
    """One program per module that a delta of the batch touches.

    `logit_modules` see one row per sampled position instead of one per token, hence their own segments.
    """
    programs: list[ModuleProgram | None] = [None] * num_modules

    def program(index: int) -> ModuleProgram:
        found = programs[index]
        if found is None:
            found = programs[index] = ModuleProgram(kernels)
        return found

    for segments, on_logits in ((token_segments, False), (logit_segments, True)):
        for start, stop, delta in segments:
            for index, ops in delta.modules.items():
                if (index in logit_modules) == on_logits:
                    program(index).add(start, stop, ops)
            for site, index in delta.taps.items():
                program(index).capture = site
    return programs
