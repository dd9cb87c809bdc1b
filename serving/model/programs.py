"""Delta programs: for each module of the backbone, what the deltas of one batch do around its base forward.

A `PlacedDelta` holds, per module index, its weights on the device. `compile_programs` turns the segments of a batch
into one `ModuleProgram` per touched module; a module that no delta of the batch touches keeps None and runs at bare
speed. Short segments go through the fused kernels as far as these know a delta's ops; which segments are short is
decided here, once per batch. The order of operations is that of `adapters.normal_form`.
Legend: T tokens, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.normal_form import Site
from adapters.positions import Positions
from adapters.tasks import HeadSpec, Task
from serving.kernels.ops import (
    AffineSegment,
    DeltaKernels,
    FusedBatch,
    FusedSegment,
    Kernels,
    LinearMapSegment,
    LowRankSegment,
    PlacedModule,
    PromptSegment,
    Replacement,
    RowsSegment,
    WeightDeltaSegment,
)
from serving.model.context import ForwardContext
from serving.model.heads import PlacedHead
from serving.model.packed import Forward

NOTHING_MERGED: Mapping[int, Forward] = {}


@dataclass(slots=True, eq=False)
class PlacedDelta:
    """A delta in device memory. `taps`: for each site that is read from afar, the module whose input it is.

    `prefix`: per layer (key, value), each [l, kv_heads, D], in the KV cache's dtype; None without virtual tokens.
    `encoded`: the modules that are not in `general_modules`, in the form of the fused kernels.
    `forms`: for a delta of which parts act on some tokens only, what acts there, and under None what acts on the
    others; empty where all of it acts on every token. `encoder_prefix`, `cross_prefix`: on an encoder-decoder what its
    encoder and its cross-attention attend to beside the prompt; there `prefix` is the decoder's own. `head`: what
    reads the final hidden states, None for a delta that generates. `virtual_tokens` [l, d]: on an encoder they are
    tokens of every row, since they see what follows.
    """

    digest: str
    modules: Mapping[int, PlacedModule]
    taps: Mapping[Site, int]
    prefix: list[tuple[Tensor, Tensor]] | None
    position_offset: int
    device_bytes: int
    encoded: Any
    general_modules: frozenset[int]
    forms: Mapping[Positions | None, PlacedDelta] = field(default_factory=dict)
    head: PlacedHead | None = None
    virtual_tokens: Tensor | None = None
    encoder_prefix: list[tuple[Tensor, Tensor]] | None = None
    cross_prefix: list[tuple[Tensor, Tensor]] | None = None

    @property
    def task(self) -> Task:
        """What the delta was trained to answer."""
        return Task.CAUSAL_LM if self.head is None else self.head.task

    @property
    def head_spec(self) -> HeadSpec | None:
        """How its head is fed."""
        return None if self.head is None else self.head.spec

    @property
    def prefix_len(self) -> int:
        """Key-value entries in front of every request of this delta."""
        return 0 if self.prefix is None else int(self.prefix[0][0].shape[0])

    @property
    def cross_prefix_len(self) -> int:
        """Key-value entries in front of what the encoder read."""
        return 0 if self.cross_prefix is None else int(self.cross_prefix[0][0].shape[0])

    @property
    def positions(self) -> frozenset[Positions]:
        """On what tokens some of its ops act; empty where all act on every one."""
        return frozenset(positions for positions in self.forms if positions is not None)

    def form_at(self, positions: Positions | None) -> PlacedDelta:
        """What acts on tokens under `positions`."""
        return self.forms[positions] if self.forms else self

    @property
    def num_inserted(self) -> int:
        """Virtual tokens that run with every row."""
        return 0 if self.virtual_tokens is None else len(self.virtual_tokens)


class DeltaSegment(NamedTuple):
    """Tokens [start, stop) of the batch belong to `delta`."""

    start: int
    stop: int
    delta: PlacedDelta


class ModuleProgram:
    """What the deltas of one batch do at one module."""

    __slots__ = (
        "again",
        "capture",
        "embeddings",
        "fused",
        "has_general_output",
        "index",
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

    def __init__(self, index: int, kernels: DeltaKernels, fused: FusedBatch | None) -> None:
        self.index = index
        self.kernels = kernels
        self.fused = fused
        self.has_general_output = False
        self.capture: Site | None = None
        self.prompts: list[PromptSegment] = []
        self.inputs: list[AffineSegment] = []
        self.input_maps: list[LinearMapSegment] = []
        self.reflections: list[LowRankSegment] = []
        self.replacements: list[tuple[int, int, Replacement]] = []
        self.again: list[LowRankSegment] = []
        self.embeddings: list[RowsSegment] = []
        self.logits: list[RowsSegment] = []
        self.weight_deltas: list[WeightDeltaSegment] = []
        self.parallel: list[LowRankSegment] = []
        self.remote: dict[Site, list[LowRankSegment]] = {}
        self.outputs: list[AffineSegment] = []
        self.output_maps: list[LinearMapSegment] = []
        self.sequential: list[LowRankSegment] = []

    def add(self, start: int, stop: int, ops: PlacedModule) -> None:
        """Let tokens [start, stop) run through `ops` by the general kernels."""
        self.prompts += [PromptSegment(start, stop, w) for w in ops.prompts]
        self.inputs += [AffineSegment(start, stop, w) for w in ops.inputs]
        self.input_maps += [LinearMapSegment(start, stop, w) for w in ops.input_maps]
        self.reflections += [LowRankSegment(start, stop, w) for w in ops.reflections]
        if ops.replacement is not None:
            self.replacements.append((start, stop, ops.replacement))
        self.again += [LowRankSegment(start, stop, w) for w in ops.again]
        self.embeddings += [RowsSegment(start, stop, w) for w in ops.embeddings]
        self.logits += [RowsSegment(start, stop, w) for w in ops.logits]
        self.weight_deltas += [WeightDeltaSegment(start, stop, w) for w in ops.weight_deltas]
        self.parallel += [LowRankSegment(start, stop, w) for w in ops.parallel]
        for site, w in ops.remote:
            self.remote.setdefault(site, []).append(LowRankSegment(start, stop, w))
        self.outputs += [AffineSegment(start, stop, w) for w in ops.outputs]
        self.output_maps += [LinearMapSegment(start, stop, w) for w in ops.output_maps]
        self.sequential += [LowRankSegment(start, stop, w) for w in ops.sequential]
        self.has_general_output = bool(
            self.replacements
            or self.again
            or self.embeddings
            or self.logits
            or self.weight_deltas
            or self.parallel
            or self.remote
            or self.outputs
            or self.output_maps
            or self.sequential
        )

    def run(
        self, context: ForwardContext, base: Callable[..., Any], x: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """The module's output with this batch's deltas.

        Shapes: x [1, T, I], or [T, I] in blocks that flatten (token ids [1, T] at `embed`) -> the same with O.
        Branches are computed and summed in fp32 and rounded once, as PEFT does on a half-precision base.
        """
        fused = self.fused
        x_TI = x.reshape(-1, x.shape[-1])
        if self.capture is not None:
            context.captured[self.capture] = x_TI
        if fused is not None and self.index in fused.taps:
            fused.capture(self.index, x_TI)
        base_x = self._input(context, x)
        y: Tensor = base(base_x, *args, **kwargs)
        acts = fused is not None and fused.changes_output[self.index]
        if self.has_general_output:
            out = self._general_output(context, base, base_x, x_TI, y)
            if fused is not None and acts:
                fused.run_output(self.index, out, x_TI)
            return out.to(y.dtype).view(y.shape)
        if fused is not None and acts:  # in y itself: modules return fresh tensors
            out = y.reshape(-1, y.shape[-1]).contiguous()
            fused.run_output(self.index, out, x_TI)
            return out.view(y.shape)  # another tensor than y: that one says that nothing acted
        return y

    def _general_output(
        self, context: ForwardContext, base: Callable[..., Any], base_x: Tensor, x_TI: Tensor, y: Tensor
    ) -> Tensor:
        # y itself where it is fp32 already
        out = y.reshape(-1, y.shape[-1]).to(torch.float32)
        base_TI = base_x.reshape(-1, base_x.shape[-1])
        for start, stop, replacement in self.replacements:
            out[start:stop] = replacement(base_TI[start:stop])
        if self.again:
            changed = base_TI.to(torch.float32, copy=True)
            self.kernels.add_low_rank(changed, out, self.again)
            for start, stop, _ in self.again:
                out[start:stop] = base(changed[start:stop].to(base_x.dtype))
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
        return out

    def _input(self, context: ForwardContext, x: Tensor) -> Tensor:
        """What the base module reads: x with attention to prompts added, scaled and mapped, rounded to x's dtype."""
        fused = self.fused if self.fused is not None and self.fused.changes_input[self.index] else None
        general = bool(self.prompts or self.inputs or self.input_maps or self.reflections)
        if fused is None and not general:
            return x
        changed = x.reshape(-1, x.shape[-1]).to(torch.float32 if general else x.dtype, copy=True)
        if self.prompts:
            assert context.query is not None, "no attention ran before its heads are read"
            self.kernels.add_prompt_attention(changed, context.query, context.scaling, self.prompts)
        if self.inputs:
            self.kernels.apply_affine(changed, self.inputs)
        if self.input_maps:
            self.kernels.apply_linear_map(changed, self.input_maps)
        if self.reflections:
            self.kernels.add_low_rank(changed, changed, self.reflections)
        if fused is not None:
            fused.run_input(self.index, changed)
        return changed.to(x.dtype).view(x.shape)


class MergedModule:
    """A module whose matrix has the ops of the batch's only delta in it."""

    __slots__ = ("forward",)

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def run(
        self, context: ForwardContext, base: Callable[..., Any], x: Tensor, args: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """The merged forward in place of `base`. Shapes: x [..., I] -> [..., O]."""
        del context, base, args, kwargs  # those of `ModuleProgram.run`; linear layers take x alone
        return self.forward(x)


Program = ModuleProgram | MergedModule


def compile_programs(
    num_modules: int,
    kernels: Kernels,
    token_segments: Sequence[DeltaSegment],
    logit_segments: Sequence[DeltaSegment],
    logit_modules: frozenset[int],
    merged: Mapping[int, Forward] = NOTHING_MERGED,
) -> list[Program | None]:
    """One program per module that a delta of the batch touches.

    `logit_modules` see one row per sampled position instead of one per token, hence their own segments; the general
    kernels run them. `merged` modules run so for every token of the batch: only for a batch of one delta.
    """
    fused = kernels.fused
    most = 0 if fused is None else fused.max_segment_tokens
    short = [segment for segment in token_segments if segment.stop - segment.start <= most]
    long = [segment for segment in token_segments if segment.stop - segment.start > most]
    bound = (
        fused.bind([FusedSegment(a, b, delta.encoded) for a, b, delta in short]) if fused and short else None
    )
    programs: list[ModuleProgram | None] = [None] * num_modules
    assert not merged or len({id(segment.delta) for segment in token_segments}) == 1, (
        "merged weights are one delta's"
    )
    if bound is not None:
        for index in range(num_modules):
            if bound.changes_input[index] or bound.changes_output[index] or index in bound.taps:
                programs[index] = ModuleProgram(index, kernels.general, bound)

    def program(index: int) -> ModuleProgram:
        found = programs[index]
        if found is None:
            found = programs[index] = ModuleProgram(index, kernels.general, None)
        return found

    for segments, by_fused in ((short, True), (long, False)):
        for start, stop, delta in segments:
            for index in delta.general_modules if by_fused else delta.modules:
                if index not in logit_modules:
                    program(index).add(start, stop, delta.modules[index])
            for site, index in delta.taps.items():
                program(index).capture = site
    for start, stop, delta in logit_segments:
        for index in logit_modules & delta.modules.keys():
            program(index).add(start, stop, delta.modules[index])
    return [MergedModule(merged[index]) if index in merged else found for index, found in enumerate(programs)]
