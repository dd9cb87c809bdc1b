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
from serving.kernels.ops import (
    AffineSegment,
    AffineWeights,
    DeltaKernels,
    LinearMapSegment,
    LinearMapWeights,
    LowRankSegment,
    LowRankWeights,
    PromptSegment,
    PromptWeights,
    RowsSegment,
    RowsWeights,
    WeightDeltaSegment,
    WeightDeltaWeights,
)
from serving.model.context import ForwardContext

Replacement = Callable[[Tensor], Tensor]
"""A module's forward with a delta's own parameters, rows [t, I] -> [t, O]."""


@dataclass(slots=True)
class PlacedModule:
    """One delta's ops at one module. `remote` LowRanks read a site that another module sees.

    `prompts` are attended to by the attention whose heads (`ctx`) the module reads. `reflections` are LowRanks that act
    on the module's input, in place. `replacement` takes the place of the base module's own forward.
    """

    prompts: list[PromptWeights] = field(default_factory=list)
    inputs: list[AffineWeights] = field(default_factory=list)
    input_maps: list[LinearMapWeights] = field(default_factory=list)
    reflections: list[LowRankWeights] = field(default_factory=list)
    replacement: Replacement | None = None
    embeddings: list[RowsWeights] = field(default_factory=list)
    logits: list[RowsWeights] = field(default_factory=list)
    weight_deltas: list[WeightDeltaWeights] = field(default_factory=list)
    parallel: list[LowRankWeights] = field(default_factory=list)
    remote: list[tuple[Site, LowRankWeights]] = field(default_factory=list)
    outputs: list[AffineWeights] = field(default_factory=list)
    output_maps: list[LinearMapWeights] = field(default_factory=list)
    sequential: list[LowRankWeights] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class PlacedDelta:
    """A delta in device memory. `taps`: for each site that is read from afar, the module whose input it is.

    `prefix`: per layer (key, value), each [l, kv_heads, D], in the KV cache's dtype; None without virtual tokens.
    `invoked`: what acts beside `modules` from the last `invocation` in a request's prompt on.
    """

    digest: str
    modules: Mapping[int, PlacedModule]
    taps: Mapping[Site, int]
    prefix: list[tuple[Tensor, Tensor]] | None
    position_offset: int
    device_bytes: int
    invoked: Mapping[int, PlacedModule] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()

    @property
    def prefix_len(self) -> int:
        """Key-value entries in front of every request of this delta."""
        return 0 if self.prefix is None else int(self.prefix[0][0].shape[0])


class DeltaSegment(NamedTuple):
    """Tokens [start, stop) of the batch belong to `delta`; not `invoked`: they come before its invocation."""

    start: int
    stop: int
    delta: PlacedDelta
    invoked: bool = True


class ModuleProgram:
    """What the deltas of one batch do at one module."""

    __slots__ = (
        "capture",
        "embeddings",
        "input_maps",
        "inputs",
        "kernels",
        "logits",
        "output_maps",
        "outputs",
        "parallel",
        "prompts",
        "reflections",
        "remote",
        "replacements",
        "sequential",
        "weight_deltas",
    )

    def __init__(self, kernels: DeltaKernels) -> None:
        self.kernels = kernels
        self.capture: Site | None = None
        self.prompts: list[PromptSegment] = []
        self.inputs: list[AffineSegment] = []
        self.input_maps: list[LinearMapSegment] = []
        self.reflections: list[LowRankSegment] = []
        self.replacements: list[tuple[int, int, Replacement]] = []
        self.embeddings: list[RowsSegment] = []
        self.logits: list[RowsSegment] = []
        self.weight_deltas: list[WeightDeltaSegment] = []
        self.parallel: list[LowRankSegment] = []
        self.remote: dict[Site, list[LowRankSegment]] = {}
        self.outputs: list[AffineSegment] = []
        self.output_maps: list[LinearMapSegment] = []
        self.sequential: list[LowRankSegment] = []

    def add(self, start: int, stop: int, ops: PlacedModule) -> None:
        """Let tokens [start, stop) run through `ops`."""
        self.prompts += [PromptSegment(start, stop, w) for w in ops.prompts]
        self.inputs += [AffineSegment(start, stop, w) for w in ops.inputs]
        self.input_maps += [LinearMapSegment(start, stop, w) for w in ops.input_maps]
        self.reflections += [LowRankSegment(start, stop, w) for w in ops.reflections]
        if ops.replacement is not None:
            self.replacements.append((start, stop, ops.replacement))
        self.embeddings += [RowsSegment(start, stop, w) for w in ops.embeddings]
        self.logits += [RowsSegment(start, stop, w) for w in ops.logits]
        self.weight_deltas += [WeightDeltaSegment(start, stop, w) for w in ops.weight_deltas]
        self.parallel += [LowRankSegment(start, stop, w) for w in ops.parallel]
        for site, w in ops.remote:
            self.remote.setdefault(site, []).append(LowRankSegment(start, stop, w))
        self.outputs += [AffineSegment(start, stop, w) for w in ops.outputs]
        self.output_maps += [LinearMapSegment(start, stop, w) for w in ops.output_maps]
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
        base_x = self._input(context, x)
        y: Tensor = base(base_x, *args, **kwargs)
        if not self.changes_output:
            return y
        # y itself where it is fp32 already: modules return fresh tensors
        out = y.reshape(-1, y.shape[-1]).to(torch.float32)
        base_TI = base_x.reshape(-1, base_x.shape[-1])
        for start, stop, replacement in self.replacements:
            out[start:stop] = replacement(base_TI[start:stop])
        if self.embeddings:  # there x is token ids
            self.kernels.replace_embeddings(out, base_x.reshape(-1), self.embeddings)
        if self.logits:
            self.kernels.replace_logits(out, base_TI.to(torch.float32), self.logits)
        if self.weight_deltas:
            self.kernels.add_weight_delta(out, base_TI.to(torch.float32), self.weight_deltas)
        if self.parallel:
            self.kernels.add_low_rank(out, x_TI.to(torch.float32), self.parallel)
        for site, segments in self.remote.items():
            self.kernels.add_low_rank(out, context.captured[site].to(torch.float32), segments)
        if self.outputs:
            self.kernels.apply_affine(out, self.outputs)
        if self.output_maps:
            self.kernels.apply_linear_map(out, self.output_maps)
        if self.sequential:
            self.kernels.add_low_rank(out, out, self.sequential)
        return out.to(y.dtype).view(y.shape)

    @property
    def changes_output(self) -> bool:
        """True where anything happens after the module's input."""
        return bool(
            self.replacements
            or self.embeddings
            or self.logits
            or self.weight_deltas
            or self.parallel
            or self.remote
            or self.outputs
            or self.output_maps
            or self.sequential
        )

    def _input(self, context: ForwardContext, x: Tensor) -> Tensor:
        """What the base module reads: x with attention to prompts added, scaled and mapped, rounded to x's dtype."""
        if not (self.prompts or self.inputs or self.input_maps or self.reflections):
            return x
        changed = x.reshape(-1, x.shape[-1]).to(torch.float32, copy=True)
        if self.prompts:
            assert context.query is not None, "no attention ran before its heads are read"
            self.kernels.add_prompt_attention(changed, context.query, context.scaling, self.prompts)
        if self.inputs:
            self.kernels.apply_affine(changed, self.inputs)
        if self.input_maps:
            self.kernels.apply_linear_map(changed, self.input_maps)
        if self.reflections:
            self.kernels.add_low_rank(changed, changed, self.reflections)
        return changed.to(x.dtype).view(x.shape)


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
        for start, stop, delta, invoked in segments:
            for modules in (delta.modules, delta.invoked) if invoked else (delta.modules,):
                for index, ops in modules.items():
                    if (index in logit_modules) == on_logits:
                        program(index).add(start, stop, ops)
            for site, index in delta.taps.items():
                program(index).capture = site
    return programs
