"""Placing a delta: from the normal form on the host to weights on the device, folds done.

Whatever depends on the base weights is computed here, in fp32, from the weights that are served.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapters.backbone_spec import ModuleSpec, Slice
from adapters.errors import InvalidDelta
from adapters.normal_form import (
    SCORES,
    Affine,
    AttnPrefix,
    Delta,
    Head,
    LinearMap,
    LowRank,
    Rows,
    Site,
    VirtualTokens,
    WeightDelta,
)
from adapters.positions import Positions
from serving.kernels.ops import AffineWeights, LowRankWeights, PlacedModule
from serving.model.backbone import Backbone
from serving.model.heads import place_head_of
from serving.model.place_matrices import (
    Copy,
    place_blocks,
    place_head,
    place_reflections,
    place_replaced_norm,
    place_rows,
    place_weight_delta,
)
from serving.model.place_prefix import base_parameter, place_prefix, place_prompt, stack_prefix
from serving.model.placed_size import weight_bytes
from serving.model.programs import PlacedDelta
from serving.model.weight_block import WeightBlock


def place(delta: Delta, digest: str, backbone: Backbone) -> PlacedDelta:
    """Put `delta` on the backbone's device, ready to run.

    Runs one forward pass where the delta has virtual tokens: on a causal model their keys and values never change.
    Raises InvalidDelta when the delta is bound to another backbone.
    """
    if delta.backbone_digest != backbone.spec.digest:
        raise InvalidDelta(
            [
                f"The delta is bound to backbone {delta.backbone_digest[:12]}, not to"
                f" {backbone.spec.digest[:12]}, which this server runs."
            ]
        )
    placer = _Placer(backbone, weight_bytes(delta, backbone))
    for op in delta.ops:
        if isinstance(op, LowRank) and (norm := backbone.spec.norm_around(op.write, op.read)) is not None:
            placer.again[norm.path].append(op)
        elif isinstance(op, LowRank):
            placer.low_ranks[backbone.spec.writer[op.write][0].path].append(op)
        elif isinstance(op, Affine):
            placer.affines[op.site, op.side].append(op)
        elif isinstance(op, AttnPrefix) and op.merge == "separate":
            placer.prompts.append(op)
        elif isinstance(op, LinearMap | WeightDelta | Rows | Head) and op.site != SCORES:
            placer.matrices.append(op)
    modules = placer.modules()
    placed = _placed(delta, digest, modules, placer)
    placed.head = place_head_of(delta, placer.to_device)
    placed.device_bytes = placer.device_bytes
    placed.forms = {
        positions: _placed(delta, digest, _acting(modules, placer.positions, positions), placer)
        for positions in (*delta.positions, None)
        if delta.positions
    }
    virtual = next((op for op in delta.ops if isinstance(op, VirtualTokens)), None)
    if virtual is not None and backbone.spec.kind != "decoder":
        placed.virtual_tokens = virtual.embeddings.to(backbone.device, torch.float32, copy=True)
        placed.device_bytes += placed.virtual_tokens.nbytes
    if (prefix := place_prefix(delta, placed, backbone)) is not None:
        placed.prefix = prefix
    if backbone.spec.kind == "encoder-decoder":
        placed.prefix = stack_prefix(delta, "dec", backbone)
        placed.encoder_prefix = stack_prefix(delta, "enc", backbone)
        placed.cross_prefix = stack_prefix(delta, "dec.cross", backbone)
    for found in (placed.prefix, placed.encoder_prefix, placed.cross_prefix):
        placed.device_bytes += sum(key.nbytes + value.nbytes for key, value in found or ())
    return placed


def _placed(delta: Delta, digest: str, modules: Mapping[int, PlacedModule], placer: _Placer) -> PlacedDelta:
    backbone = placer.backbone
    general = _general_modules(modules, backbone)
    encoded = None
    if (fused := backbone.kernels.fused) is not None:
        rest = {index: ops for index, ops in modules.items() if index not in general}
        encoded = fused.encode(rest, placer.taps, len(backbone.spec.modules))
    return PlacedDelta(
        digest=digest,
        modules=modules,
        taps=placer.taps,
        prefix=None,
        position_offset=delta.position_offset,
        device_bytes=0,
        encoded=encoded,
        general_modules=general,
    )


def _acting(
    modules: Mapping[int, PlacedModule], positions_of: Mapping[int, Positions], positions: Positions | None
) -> dict[int, PlacedModule]:
    """`modules` with what acts everywhere or at `positions`; what is left of none is left out."""

    def acts(weights: LowRankWeights) -> bool:
        return positions_of.get(id(weights), positions) == positions

    kept = {
        index: replace(
            ops,
            again=[w for w in ops.again if acts(w)],
            parallel=[w for w in ops.parallel if acts(w)],
            remote=[(site, w) for site, w in ops.remote if acts(w)],
            sequential=[w for w in ops.sequential if acts(w)],
        )
        for index, ops in modules.items()
    }
    return {index: ops for index, ops in kept.items() if ops != PlacedModule()}


def _general_modules(modules: Mapping[int, PlacedModule], backbone: Backbone) -> frozenset[int]:
    """Where the fused kernels can't go: other ops, token ids for input, or rows of logits instead of tokens."""
    if backbone.kernels.fused is None:
        return frozenset(modules)
    others = {index for index, ops in modules.items() if not ops.is_row_wise}
    others |= {i for i, m in enumerate(backbone.spec.modules) if m.shape.kind == "embedding"} & modules.keys()
    return frozenset(others | (backbone.logit_modules & modules.keys()))


class _Placer:
    """Collects the ops of one delta by module and copies their tensors, shared ones once.

    On CPU into one block of `weight_bytes`, those of a module side by side.
    """

    def __init__(self, backbone: Backbone, weight_bytes: int) -> None:
        self.backbone = backbone
        self.spec = backbone.spec
        self.index = {module.path: i for i, module in enumerate(self.spec.modules)}
        self.low_ranks: dict[str, list[LowRank]] = defaultdict(list)
        self.again: dict[str, list[LowRank]] = defaultdict(list)
        self.affines: dict[tuple[Site, str], list[Affine]] = defaultdict(list)
        self.matrices: list[LinearMap | WeightDelta | Rows | Head] = []
        self.prompts: list[AttnPrefix] = []
        self.taps: dict[Site, int] = {}
        self.positions: dict[int, Positions] = {}  # id of the weights -> the only tokens on which they act
        self._block = WeightBlock(weight_bytes) if backbone.device.type == "cpu" else None
        self._copies: dict[tuple[int, torch.dtype, bool], tuple[Tensor, Tensor]] = {}

    def to_device(
        self, tensor: Tensor, dtype: torch.dtype = torch.float32, *, transpose: bool = False
    ) -> Tensor:
        """A contiguous copy on the device, transposed or not; the same tensor is copied once."""
        key = (id(tensor), dtype, transpose)
        if key not in self._copies:
            source = tensor.t() if transpose else tensor
            if self._block is not None:
                copy = self._block.take(source.shape, dtype)
            else:
                copy = torch.empty(source.shape, dtype=dtype, device=self.backbone.device)
            copy.copy_(
                source
            )  # straight into its place: `to` would keep a transposed layout, and be copied again
            self._copies[key] = (tensor, copy)  # the source too: a freed tensor's id comes back
        return self._copies[key][1]

    @property
    def device_bytes(self) -> int:
        """Bytes of memory that the copies take."""
        if self._block is not None:
            return self._block.taken_bytes
        return sum(copy.nbytes for _, copy in self._copies.values())

    def modules(self) -> dict[int, PlacedModule]:
        """What was collected, each kind placed in the order in which the modules run."""
        placed: dict[int, PlacedModule] = defaultdict(PlacedModule)
        for path, ops in sorted(self.low_ranks.items(), key=lambda item: self.index[item[0]]):
            module = self.spec.by_path[path]
            for op, part in _join_fused(ops, module):
                self._place_low_rank(placed[self.index[path]], op, part, module)
        for path, ops in sorted(self.again.items(), key=lambda item: self.index[item[0]]):
            module = self.spec.by_path[path]
            for op in ops:
                placed[self.index[path]].again.append(self._low_rank(op, module.writes[0]))
        for (site, side), affines in sorted(self.affines.items(), key=lambda item: self._writer(item[0][0])):
            module, part = self.spec.writer[site]
            target = placed[self.index[module.path]]
            if side == "input":
                scale = _product([op.scale for op in affines])
                shift = _sum([op.shift for op in affines])
                target.inputs.append(self._affine(scale, shift, 0, module.shape.d_in))
            else:
                self._place_output_affines(target, affines, module, part)
        for matrix in sorted(self.matrices, key=lambda op: self._writer(op.site)):
            module, part = self.spec.writer[matrix.site]
            self._place_matrix(placed[self.index[module.path]], matrix, part, module)
        for prompt in self.prompts:
            module, _ = self.spec.writer[Site("o.out", prompt.layer)]
            placed[self.index[module.path]].prompts.append(
                place_prompt(prompt, self.backbone, self.to_device)
            )
        return dict(placed)

    def _writer(self, site: Site) -> int:
        return self.index[self.spec.writer[site][0].path]

    def _place_matrix(
        self, target: PlacedModule, op: LinearMap | WeightDelta | Rows | Head, part: Slice, module: ModuleSpec
    ) -> None:
        copy: Copy = self.to_device
        if isinstance(op, WeightDelta):
            target.weight_deltas.append(
                place_weight_delta(op, part.start, part.stop, module.shape.d_in, copy)
            )
        elif isinstance(op, Rows):
            rows = place_rows(op, self.backbone.model.get_submodule(module.path), copy)
            (target.logits if op.site.name == "logits" else target.embeddings).append(rows)
        elif isinstance(op, Head):
            target.replacement = place_head(op, copy)
        elif op.reflections is not None:
            target.reflections.append(place_reflections(op.reflections, copy))
        elif op.side == "input":
            target.input_maps.append(place_blocks(op, 0, module.shape.d_in, copy))
        else:
            target.output_maps.append(place_blocks(op, part.start, part.stop, copy))

    def _place_output_affines(
        self, target: PlacedModule, ops: Sequence[Affine], module: ModuleSpec, part: Slice
    ) -> None:
        """A replaced norm weight makes the norm itself anew, bias included; the rest acts on its output."""
        weight = next((op.weight for op in ops if op.weight is not None), None)
        bias = next((op.bias for op in ops if op.bias is not None), None)
        if weight is not None:
            base = self.backbone.model.get_submodule(module.path)
            target.replacement = place_replaced_norm(base, weight, bias, self.to_device)
            bias = None if bias is None else bias.float()
        if weight is None or any(op.scale is not None or op.shift is not None for op in ops):
            target.outputs.append(
                self._output_affine(ops, module, part, bias if weight is not None else None)
            )

    def _low_rank(self, op: LowRank, part: Slice) -> LowRankWeights:
        weights = LowRankWeights(
            A=self.to_device(op.A),
            B=self.to_device(op.B, transpose=True),
            scaling=op.scaling,
            activation=op.activation,
            a_bias=None if op.a_bias is None else self.to_device(op.a_bias),
            b_bias=None if op.b_bias is None else self.to_device(op.b_bias),
            start=part.start,
            stop=part.stop,
        )
        if op.positions is not None:
            self.positions[id(weights)] = op.positions
        return weights

    def _place_low_rank(self, target: PlacedModule, op: LowRank, part: Slice, module: ModuleSpec) -> None:
        weights = self._low_rank(op, part)
        if op.sequential:
            target.sequential.append(weights)
        elif op.read == module.read:
            target.parallel.append(weights)
        else:
            self.taps[op.read] = next(i for i, m in enumerate(self.spec.modules) if m.read == op.read)
            target.remote.append((op.read, weights))

    def _output_affine(
        self, ops: Sequence[Affine], module: ModuleSpec, part: Slice, replaced: Tensor | None
    ) -> AffineWeights:
        """Fold scale, bias replacement and shift of one site into y * scale + shift over the base output W x + b.

        `replaced`: the bias that a replaced module has in its output already.
        """
        columns = slice(part.start, part.stop)
        old = (
            base_parameter(self.backbone, module, "bias")[columns]
            if module.shape.has_bias
            else torch.zeros(part.stop - part.start)
        )
        new = next((op.bias.float() for op in ops if op.bias is not None), old)
        old = old if replaced is None else replaced
        scales = [op for op in ops if op.scale is not None]
        shift = _sum([op.shift for op in ops])
        if not scales:
            return self._affine(None, _sum([new - old, shift]), part.start, part.stop)
        factors = []
        for op in scales:
            assert op.scale is not None
            norm = self._row_norms(module, part, op.norm_scaling) if op.weight_normalized else 1.0
            factors.append(op.scale.float() / norm)
        scale = _product(factors)
        assert scale is not None
        covered = all(op.covers_bias for op in scales)
        moved = scale * (new - old) if covered else new - scale * old
        return self._affine(scale, _sum([moved, shift]), part.start, part.stop)

    def _row_norms(self, module: ModuleSpec, part: Slice, scaling: float | None) -> Tensor:
        """Norms of the rows of W + s·B·A in fp32, from the served weights (DoRA). `scaling`: in place of each s."""
        weight = base_parameter(self.backbone, module, "weight")
        rows = (weight.t() if module.shape.kind == "conv1d" else weight)[part.start : part.stop].clone()
        for op in self.low_ranks[module.path]:
            if op.write == part.site and not op.sequential:
                rows += (op.scaling if scaling is None else scaling) * (op.B.float() @ op.A.float())
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms

    def _affine(self, scale: Tensor | None, shift: Tensor | None, start: int, stop: int) -> AffineWeights:
        moves = shift is not None and bool(shift.count_nonzero())
        return AffineWeights(
            scale=None if scale is None else self.to_device(scale.float()),
            shift=self.to_device(shift.float()) if shift is not None and moves else None,
            start=start,
            stop=stop,
        )


def _join_fused(ops: Sequence[LowRank], module: ModuleSpec) -> list[tuple[LowRank, Slice]]:
    """Undo the split of a fused projection: LowRanks that share A and write neighbouring columns become one."""
    parts = {part.site: part for part in module.writes}
    joined: list[tuple[LowRank, Slice]] = []
    # sequential ones act in their own order and are not joined
    for op in sorted(ops, key=lambda op: (0, 0) if op.sequential else (id(op.A), parts[op.write].start)):
        part = parts[op.write]
        if joined:
            last, span = joined[-1]
            same = (
                last.A is op.A
                and last.read == op.read
                and last.scaling == op.scaling
                and last.activation == op.activation
                and last.positions == op.positions
                and last.a_bias is op.a_bias
                and (last.b_bias is None) == (op.b_bias is None)
            )
            if same and span.stop == part.start and not last.sequential and not op.sequential:
                b_bias = None
                if last.b_bias is not None and op.b_bias is not None:
                    b_bias = torch.cat([last.b_bias, op.b_bias])
                wider = LowRank(
                    read=op.read,
                    write=last.write,
                    A=op.A,
                    B=torch.cat([last.B, op.B]),
                    scaling=op.scaling,
                    activation=op.activation,
                    a_bias=op.a_bias,
                    b_bias=b_bias,
                    positions=op.positions,
                )
                joined[-1] = (wider, Slice(span.site, span.start, part.stop))
                continue
        joined.append((op, part))
    return joined


def _product(factors: Sequence[Tensor | None]) -> Tensor | None:
    given = [factor.float() for factor in factors if factor is not None]
    return torch.stack(given).prod(dim=0) if given else None


def _sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    given = [term.float() for term in terms if term is not None]
    return torch.stack(given).sum(dim=0) if given else None
