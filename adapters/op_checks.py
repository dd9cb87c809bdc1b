"""Checking one op against a backbone: its sites, shapes, dtypes and values.

Fields may hold anything (the canonical manifest is user input too), so types are checked before they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec, Slice
from adapters.normal_form import Activation, Affine, AttnPrefix, LowRank, Site, VirtualTokens
from adapters.positions import FromInvocation, Positions
from adapters.tensor_files import num_non_finite

MAX_RANK = 4096
MAX_SCALING = 1e9
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

# Where a layer's data passes, whatever its stack: a site may be read remotely only by ops that write further down.
# The keys and values of cross-attention are those of the encoder's output, before the decoder's layers.
DEPTH: Mapping[str, int] = {
    name: depth
    for depth, names in enumerate(
        (
            ("attn.r",),
            ("attn.x",),
            ("q.out", "k.out", "v.out", "qkv.out"),
            ("ctx",),
            ("o.out",),
            ("attn.post",),
            ("cross.r",),
            ("cross.x",),
            ("cross.q.out",),
            ("cross.ctx",),
            ("cross.o.out",),
            ("cross.post",),
            ("ffn.r",),
            ("ffn.x",),
            ("gate.out", "up.out"),
            ("ffn.a",),
            ("down.out",),
            ("ffn.post",),
            ("layer.out",),
        )
    )
    for name in names
}

# Kinds of modules whose output an op may write.
LOW_RANK_KINDS = ("linear", "conv1d", "layer")
SEQUENTIAL_KINDS = (*LOW_RANK_KINDS, "norm", "embedding")
SCALED_KINDS = ("linear", "conv1d", "norm", "layer")
LINEAR_KINDS = ("linear", "conv1d")


@dataclass
class OpChecker:
    """Notes what is wrong with the op at hand. `where` names it and stands before every problem."""

    spec: BackboneSpec
    problems: list[str] = field(default_factory=list)
    where: str = ""

    def add(self, text: str) -> None:
        """Note a problem."""
        self.problems.append(f"{self.where}: {text}")

    def low_rank(self, op: LowRank) -> None:
        """Check one LowRank."""
        if (norm := self.spec.norm_around(op.write, op.read)) is not None:
            target: tuple[ModuleSpec, Slice] | None = norm, norm.writes[0]
            read_width: int | None = norm.shape.d_in
        else:
            target = self.target(op.write, SEQUENTIAL_KINDS if op.sequential else LOW_RANK_KINDS)
            read_width = self.readwidth_of(op, target)
        rank = op.A.shape[0] if isinstance(op.A, Tensor) and op.A.dim() else 0
        if not 1 <= rank <= MAX_RANK:
            self.add(f"A: rank {rank}, expected 1 to {MAX_RANK}.")
        self.tensor("A", op.A, (rank, read_width))
        self.tensor("B", op.B, (width_of(target), rank))
        if op.a_bias is not None:
            self.tensor("a_bias", op.a_bias, (rank,))
        if op.b_bias is not None:
            self.tensor("b_bias", op.b_bias, (width_of(target),))
        if op.activation not in ACTIVATIONS:
            self.add(f"activation: expected one of {', '.join(ACTIVATIONS)}.")
        self.scaling(op.scaling)
        if op.positions is not None:
            self.positions(op.positions)

    def positions(self, positions: Positions) -> None:
        """Check on which tokens an op acts."""
        if not isinstance(positions, FromInvocation):
            if type(positions.count) is not int or not 1 <= positions.count <= self.spec.max_positions:
                self.add(f"positions: expected 1 to {self.spec.max_positions} tokens.")
            return
        tokens, known = positions.tokens, range(self.spec.vocab_size)
        if not 1 <= len(tokens) <= self.spec.max_positions:
            self.add(f"positions: {len(tokens)} invocation tokens, expected 1 to {self.spec.max_positions}.")
        if any(type(token) is not int or token not in known for token in tokens):
            self.add(f"positions: the invocation tokens must be ids from 0 to {known[-1]}.")

    def affine(self, op: Affine) -> None:
        """Check one Affine."""
        target = self.target(op.site, LINEAR_KINDS if op.side == "input" else SCALED_KINDS)
        if op.side not in ("input", "output"):
            self.add("side: expected 'input' or 'output'.")
        for name in ("covers_bias", "weight_normalized"):
            if type(getattr(op, name)) is not bool:
                self.add(f"{name}: expected true or false.")
        given = {name: getattr(op, name) for name in ("scale", "shift", "bias", "weight")}
        width = width_of(target) if op.side == "output" or target is None else target[0].shape.d_in
        for name, tensor in given.items():
            if tensor is not None:
                self.tensor(name, tensor, (width,))
        if all(tensor is None for tensor in given.values()):
            self.add("it has neither scale nor shift nor bias nor weight, so it would change nothing.")
        if op.bias is not None and (
            op.side == "input" or (target is not None and not target[0].shape.has_bias)
        ):
            self.add("bias: there is no bias to replace.")
        if op.weight is not None and (
            op.side == "input" or (target is not None and target[0].shape.kind != "norm")
        ):
            self.add("weight: only the weight of a norm can be replaced.")
        if op.norm_scaling is not None:
            self.scaling(op.norm_scaling)
            if op.weight_normalized is not True:
                self.add("norm_scaling: belongs to weight_normalized.")
        if op.weight_normalized and (op.scale is None or op.side == "input"):
            self.add("weight_normalized: only an output scale can be divided by the norms of weight rows.")
        elif op.weight_normalized and target is not None and target[0].shape.kind not in LINEAR_KINDS:
            self.add("weight_normalized: the module has no weight matrix.")

    def attn_prefix(self, op: AttnPrefix) -> None:
        """Check one AttnPrefix."""
        if op.stack not in self.spec.stacks:
            self.add(f"stack: expected one of {', '.join(map(repr, self.spec.stacks))}.")
        layers = self.spec.layers_of(op.stack)
        if type(op.layer) is not int or not 0 <= op.layer < layers:
            self.add(f"layer: expected an integer from 0 to {layers - 1}.")
        if op.merge == "separate" and op.stack:
            self.add("merge: on an encoder-decoder a prefix joins the attention's own softmax.")
        length = op.key.shape[0] if isinstance(op.key, Tensor) and op.key.dim() else 0
        expected: tuple[int, ...] = (length, self.spec.num_kv_heads, self.spec.head_dim)
        if op.merge not in ("joint", "separate"):
            self.add("merge: expected 'joint' or 'separate'.")
        if (op.gate is not None) != (op.merge == "separate"):
            self.add("gate: belongs to a separate softmax, and only there.")
        if op.gate is not None:
            self.tensor("gate", op.gate, (1,))
        if not isinstance(op.projected, bool):
            self.add("projected: expected true or false.")  # type: ignore[unreachable]
        if op.merge == "separate" and not self.spec.sees_queries:
            self.add(
                f"merge: {self.spec.model_type} computes attention in code of its own, which gives no queries for a "
                "softmax of the prompt's own."
            )
        if op.merge == "separate" and not length:
            self.add("key: expected at least one row.")
        if op.projected is False:
            expected = (length, self.spec.hidden_size)
            if op.merge == "joint":
                self.add("projected: a joint prefix is stored projected.")
            elif Site("k.out", 0) not in self.spec.writer:
                self.add("projected: no module of the backbone has keys alone for its output.")
        self.tensor("key", op.key, expected)
        self.tensor("value", op.value, expected)

    def virtual_tokens(self, op: VirtualTokens) -> None:
        """Check one VirtualTokens."""
        length = op.embeddings.shape[0] if isinstance(op.embeddings, Tensor) and op.embeddings.dim() else 0
        self.tensor("embeddings", op.embeddings, (length, self.spec.modules[0].shape.d_out))

    def target(self, site: Site, kinds: tuple[str, ...]) -> tuple[ModuleSpec, Slice] | None:
        """The module and columns that write `site`; None, with the problem noted, where an op can't write there."""
        if 0 <= site.layer >= (layers := self.spec.layers_of(site.stack)):
            self.add(f"layer {site.layer} is out of range: the backbone has {layers} layers.")
            return None
        found = self.spec.writer.get(site)
        if found is None:
            self.add("unknown site: no module of the backbone writes it.")
            return None
        if found[0].shape.kind not in kinds:
            self.add(
                f"{found[0].path} is of kind {found[0].shape.kind}; this op runs only on {', '.join(kinds)}."
            )
            return None
        return found

    def readwidth_of(self, op: LowRank, target: tuple[ModuleSpec, Slice] | None) -> int | None:
        """Width of what `op` reads; None where that is wrong, with the problem noted, or unknown."""
        if op.sequential:
            return width_of(target)
        if target is not None and op.read == target[0].read:
            return target[0].shape.d_in
        readers = [module for module in self.spec.modules if module.read == op.read]
        if not readers:
            self.add(f"read: {shown(op.read)} is not a site that a module of the backbone reads.")
            return None
        if not _upstream(op.read, op.write):
            self.add(f"read: {shown(op.read)} is not upstream of the written site in the same layer.")
        return readers[0].shape.d_in

    def scaling(self, value: object) -> None:
        """Check a factor."""
        if type(value) not in (int, float) or not abs(value) <= MAX_SCALING:  # type: ignore[arg-type]  # also false for NaN
            self.add(f"scaling: expected a number of size at most {MAX_SCALING:g}.")

    def tensor(self, name: str, tensor: object, expected: tuple[int | None, ...]) -> bool:
        """Check type, dtype, shape (None: any size) and values of one tensor; True where type and shape fit."""
        if not isinstance(tensor, Tensor):
            self.add(f"{name}: expected a tensor.")
            return False
        if tensor.dtype not in DTYPES:
            self.add(f"{name}: dtype {tensor.dtype}, expected float32, float16 or bfloat16.")
        fits = self.shape(name, tensor, expected)
        if bad := num_non_finite(tensor):
            self.add(f"{name}: {bad} non-finite value{'s' * (bad > 1)}.")
        return fits

    def shape(self, name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> bool:
        """Check a shape; None stands for any size."""
        shape = tuple(tensor.shape)
        fits = len(shape) == len(expected) and all(
            want is None or got == want for got, want in zip(shape, expected, strict=True)
        )
        if not fits:
            self.add(
                f"{name}: shape {list(shape)}, expected {['any' if n is None else n for n in expected]}."
            )
        return fits


def _upstream(read: Site, write: Site) -> bool:
    depths = [DEPTH.get(site.name.removeprefix("enc.").removeprefix("dec.")) for site in (read, write)]
    same_layer = read.layer == write.layer and (read.stack == "enc") == (write.stack == "enc")
    return same_layer and depths[0] is not None and depths[1] is not None and depths[0] < depths[1]


def width_of(target: tuple[ModuleSpec, Slice] | None) -> int | None:
    return None if target is None else target[1].stop - target[1].start


def shown(site: Site) -> str:
    """The site as text, short and printable: its name may be anything."""
    return str(site).encode("unicode_escape").decode("ascii")[:64]
