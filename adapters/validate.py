"""Everything that is wrong with a delta for one backbone: sites, shapes, dtypes, values and how the ops combine.

Readers promise nothing about the delta they return; what passes here can be placed and executed. Fields may hold
anything (the canonical manifest is user input too), so types are checked before they are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec, Slice
from adapters.normal_form import Activation, Affine, AttnPrefix, Delta, LowRank, Op, Site, VirtualTokens

MAX_RANK = 4096
MAX_SCALING = 1e9
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TASKS = ("causal-lm",)
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

# Where a layer's data passes: a site may be read remotely only by ops that write further down.
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
SCALED_KINDS = ("linear", "conv1d", "norm", "layer")
LINEAR_KINDS = ("linear", "conv1d")


def check(delta: Delta, spec: BackboneSpec) -> list[str]:
    """Every problem of `delta` on the backbone `spec`, one sentence each; empty where it can be served."""
    checker = _Checker(delta, spec)
    checker.run()
    return checker.problems


@dataclass
class _Checker:
    delta: Delta
    spec: BackboneSpec
    problems: list[str] = field(default_factory=list)
    where: str = ""  # the op being checked

    def run(self) -> None:
        """Check the delta's own fields, each op, then what the ops are together."""
        self._check_delta()
        for index, op in enumerate(self.delta.ops):
            self.where = f"op {index} ({op.kind.value} at {_place(op)})"
            check_op: Callable[[_Checker, Any], None] = _CHECKS[type(op)]
            check_op(self, op)
        self.where = "delta"
        for text in (*_duplicates(self.delta, self.spec), *_virtual(self.delta, self.spec)):
            self.add(text)

    def add(self, text: str) -> None:
        self.problems.append(f"{self.where}: {text}")

    def _check_delta(self) -> None:
        delta, self.where = self.delta, "delta"
        if delta.backbone_digest != self.spec.digest:
            self.add(
                f"backbone_digest: it is bound to another backbone than {self.spec.digest}; upload it to the server "
                "of its own backbone."
            )
        if delta.task not in TASKS:
            self.add(f"task: not served yet; expected {', '.join(TASKS)}.")
        if not (0 < len(delta.method) <= 64 and delta.method.isascii() and delta.method.isprintable()):
            self.add("method: expected 1 to 64 printable ASCII characters.")
        if not delta.ops:
            self.add("it has no ops, so it would change nothing.")

    def low_rank(self, op: LowRank) -> None:
        """Check one LowRank."""
        target = self.target(op.write, LOW_RANK_KINDS)
        read_width = self.read_width(op, target)
        rank = op.A.shape[0] if isinstance(op.A, Tensor) and op.A.dim() else 0
        if not 1 <= rank <= MAX_RANK:
            self.add(f"A: rank {rank}, expected 1 to {MAX_RANK}.")
        self.tensor("A", op.A, (rank, read_width))
        self.tensor("B", op.B, (_width(target), rank))
        if op.a_bias is not None:
            self.tensor("a_bias", op.a_bias, (rank,))
        if op.b_bias is not None:
            self.tensor("b_bias", op.b_bias, (_width(target),))
        if op.activation not in ACTIVATIONS:
            self.add(f"activation: expected one of {', '.join(ACTIVATIONS)}.")
        if type(op.scaling) not in (int, float) or not abs(op.scaling) <= MAX_SCALING:  # also false for NaN
            self.add(f"scaling: expected a number of size at most {MAX_SCALING:g}.")

    def affine(self, op: Affine) -> None:
        """Check one Affine."""
        target = self.target(op.site, LINEAR_KINDS if op.side == "input" else SCALED_KINDS)
        if op.side not in ("input", "output"):
            self.add("side: expected 'input' or 'output'.")
        for name in ("covers_bias", "weight_normalized"):
            if type(getattr(op, name)) is not bool:
                self.add(f"{name}: expected true or false.")
        given = {name: getattr(op, name) for name in ("scale", "shift", "bias")}
        width = _width(target) if op.side == "output" or target is None else target[0].shape.d_in
        for name, tensor in given.items():
            if tensor is not None:
                self.tensor(name, tensor, (width,))
        if all(tensor is None for tensor in given.values()):
            self.add("it has neither scale nor shift nor bias, so it would change nothing.")
        if op.bias is not None and (
            op.side == "input" or (target is not None and not target[0].shape.has_bias)
        ):
            self.add("bias: there is no bias to replace.")
        if op.weight_normalized and (op.scale is None or op.side == "input"):
            self.add("weight_normalized: only an output scale can be divided by the norms of weight rows.")
        elif op.weight_normalized and target is not None and target[0].shape.kind not in LINEAR_KINDS:
            self.add("weight_normalized: the module has no weight matrix.")

    def attn_prefix(self, op: AttnPrefix) -> None:
        """Check one AttnPrefix."""
        if type(op.layer) is not int or not 0 <= op.layer < self.spec.num_layers:
            self.add(f"layer: expected an integer from 0 to {self.spec.num_layers - 1}.")
        length = op.key.shape[0] if isinstance(op.key, Tensor) and op.key.dim() else 0
        expected = (length, self.spec.num_kv_heads, self.spec.head_dim)
        self.tensor("key", op.key, expected)
        self.tensor("value", op.value, expected)

    def virtual_tokens(self, op: VirtualTokens) -> None:
        """Check one VirtualTokens."""
        length = op.embeddings.shape[0] if isinstance(op.embeddings, Tensor) and op.embeddings.dim() else 0
        self.tensor("embeddings", op.embeddings, (length, self.spec.hidden_size))

    def target(self, site: Site, kinds: tuple[str, ...]) -> tuple[ModuleSpec, Slice] | None:
        """The module and columns that write `site`; None, with the problem noted, where an op can't write there."""
        if 0 <= site.layer >= self.spec.num_layers:
            self.add(f"layer {site.layer} is out of range: the backbone has {self.spec.num_layers} layers.")
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

    def read_width(self, op: LowRank, target: tuple[ModuleSpec, Slice] | None) -> int | None:
        """Width of what `op` reads; None where that is wrong, with the problem noted, or unknown."""
        if op.sequential:
            return _width(target)
        if target is not None and op.read == target[0].read:
            return target[0].shape.d_in
        readers = [module for module in self.spec.modules if module.read == op.read]
        if not readers:
            self.add(f"read: {_shown(op.read)} is not a site that a module of the backbone reads.")
            return None
        upstream = (
            op.read.layer == op.write.layer
            and op.read.name in DEPTH
            and op.write.name in DEPTH
            and DEPTH[op.read.name] < DEPTH[op.write.name]
        )
        if not upstream:
            self.add(f"read: {_shown(op.read)} is not upstream of the written site in the same layer.")
        return readers[0].shape.d_in

    def tensor(self, name: str, tensor: object, expected: tuple[int | None, ...]) -> None:
        """Check type, dtype, shape (None: any size) and values of one tensor."""
        if not isinstance(tensor, Tensor):
            self.add(f"{name}: expected a tensor.")
            return
        shape = tuple(tensor.shape)
        if tensor.dtype not in DTYPES:
            self.add(f"{name}: dtype {tensor.dtype}, expected float32, float16 or bfloat16.")
        if len(shape) != len(expected) or any(
            want is not None and got != want for got, want in zip(shape, expected, strict=False)
        ):
            self.add(
                f"{name}: shape {list(shape)}, expected {['any' if n is None else n for n in expected]}."
            )
        if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
            self.add(f"{name}: {bad} non-finite value{'s' * (bad > 1)}.")


_CHECKS: Mapping[type[Op], Callable[[_Checker, Any], None]] = {
    LowRank: _Checker.low_rank,
    Affine: _Checker.affine,
    AttnPrefix: _Checker.attn_prefix,
    VirtualTokens: _Checker.virtual_tokens,
}


def _duplicates(delta: Delta, spec: BackboneSpec) -> Iterator[str]:
    """Ops of which there can be one: which of two would win is not defined."""
    seen: Counter[str] = Counter()
    for op in delta.ops:
        if isinstance(op, Affine):
            place = f"{_shown(op.site)}, output side"
            if (
                op.side == "input" and op.site in spec.writer
            ):  # a fused module has one input for all its sites
                place = f"{spec.writer[op.site][0].path}, input side"
            for name in ("scale", "bias"):
                seen[f"Affine ops with a {name} at {place}"] += getattr(op, name) is not None
        elif isinstance(op, AttnPrefix):
            seen[f"AttnPrefix ops in {_place(op)}"] += 1
        elif isinstance(op, VirtualTokens):
            seen["VirtualTokens ops"] += 1
    for what, count in seen.items():
        if count > 1:
            yield f"{count} {what}, expected one."


def _virtual(delta: Delta, spec: BackboneSpec) -> Iterator[str]:
    """What prefixes and virtual tokens must satisfy together."""
    prefixes = {op.layer: op for op in delta.ops if isinstance(op, AttnPrefix) and type(op.layer) is int}
    prompts = [op for op in delta.ops if isinstance(op, VirtualTokens)]
    if prefixes and prompts:
        yield "it has both AttnPrefix and VirtualTokens; one set of virtual tokens is served."
    if prefixes and (missing := set(range(spec.num_layers)) - prefixes.keys()):
        yield f"AttnPrefix is missing in layers {', '.join(map(str, sorted(missing)))}; every layer needs one."
    lengths = {tensor.shape[0] for op in prefixes.values() for tensor in (op.key,) if _has_rows(tensor)}
    lengths |= {op.embeddings.shape[0] for op in prompts if _has_rows(op.embeddings)}
    if len(lengths) > 1:
        yield f"virtual tokens differ in number: {', '.join(map(str, sorted(lengths)))}."
    length = max(lengths, default=0)
    if (prefixes or prompts) and not 1 <= length < spec.max_positions:
        yield f"{length} virtual tokens, expected 1 to {spec.max_positions - 1} (the backbone's positions)."
    allowed = {0, length} if prefixes else {length}
    if delta.position_offset not in allowed:
        yield f"position_offset: {delta.position_offset}, expected {' or '.join(map(str, sorted(allowed)))}."


def _has_rows(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() > 0


def _width(target: tuple[ModuleSpec, Slice] | None) -> int | None:
    return None if target is None else target[1].stop - target[1].start


def _place(op: Op) -> str:
    match op:
        case LowRank():
            return _shown(op.write)
        case Affine():
            return _shown(op.site)
        case AttnPrefix():
            return f"layer {op.layer}" if type(op.layer) is int else "an unknown layer"
        case _:
            return "embed"


def _shown(site: Site) -> str:
    """The site as text, short and printable: its name may be anything."""
    return str(site).encode("unicode_escape").decode("ascii")[:64]
