"""Everything that is wrong with a delta for one backbone: its ops one by one (`op_checks`), and how they combine.

Readers promise nothing about the delta they return; what passes here can be placed and executed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.head_checks import check_task
from adapters.matrix_checks import head, linear_map, rows, weight_delta
from adapters.normal_form import (
    SCORES,
    Affine,
    AttnPrefix,
    Delta,
    Head,
    LinearMap,
    LowRank,
    Op,
    Rows,
    VirtualTokens,
    WeightDelta,
    kv_site,
)
from adapters.op_checks import OpChecker, shown
from adapters.positions import FirstTokens, FromInvocation, LastTokens

_CHECKS: Mapping[type[Op], Callable[[OpChecker, Any], None]] = {
    LowRank: OpChecker.low_rank,
    Affine: OpChecker.affine,
    LinearMap: linear_map,
    WeightDelta: weight_delta,
    AttnPrefix: OpChecker.attn_prefix,
    VirtualTokens: OpChecker.virtual_tokens,
    Rows: rows,
    Head: head,
}


def check(delta: Delta, spec: BackboneSpec, *, between: Callable[[], None] = lambda: None) -> list[str]:
    """Every problem of `delta` on the backbone `spec`, one sentence each; empty where it can be served.

    `between` is called whenever the tensors of one op have been looked at.
    """
    checker = OpChecker(spec, where="delta")
    _check_delta(delta, checker)
    for index, op in enumerate(delta.ops):
        checker.where = f"op {index} ({op.kind.value} at {_place(op)})"
        _CHECKS[type(op)](checker, op)
        between()
    checker.where = "delta"
    check_task(delta, checker)
    checker.where = "delta"
    for text in (
        *_duplicates(delta, spec),
        *_replaced(delta, spec),
        *_positioned(delta, spec),
        *_virtual(delta, spec),
    ):
        checker.add(text)
    return checker.problems


def _check_delta(delta: Delta, checker: OpChecker) -> None:
    if delta.backbone_digest != checker.spec.digest:
        checker.add(
            f"backbone_digest: it is bound to another backbone than {checker.spec.digest}; upload it to the server "
            "of its own backbone."
        )
    if not (0 < len(delta.method) <= 64 and delta.method.isascii() and delta.method.isprintable()):
        checker.add("method: expected 1 to 64 printable ASCII characters.")
    if not delta.ops:
        checker.add("it has no ops, so it would change nothing.")


def _duplicates(delta: Delta, spec: BackboneSpec) -> Iterator[str]:
    """Ops of which there can be one: which of two would win is not defined."""
    seen: Counter[str] = Counter()
    for op in delta.ops:
        if isinstance(op, Affine | LinearMap):
            place = f"{shown(op.site)}, output side"
            if (
                op.side == "input" and op.site in spec.writer
            ):  # a fused module has one input for all its sites
                place = f"{spec.writer[op.site][0].path}, input side"
        if isinstance(op, LinearMap):
            seen[f"LinearMap ops at {place}"] += 1
        elif isinstance(op, Affine):
            for name in ("scale", "bias", "weight"):
                seen[f"Affine ops with a {name} at {place}"] += getattr(op, name) is not None
        elif isinstance(op, AttnPrefix):
            seen[f"AttnPrefix ops in {_place(op)}"] += 1
        elif isinstance(op, Rows):
            seen[f"Rows ops at {shown(op.site)}"] += 1
        elif isinstance(op, Head) and op.site != SCORES:
            seen[f"Head ops at {shown(op.site)}"] += 1
        elif isinstance(op, VirtualTokens):
            seen["VirtualTokens ops"] += 1
    for what, count in seen.items():
        if count > 1:
            yield f"{count} {what}, expected one."


def _replaced(delta: Delta, spec: BackboneSpec) -> Iterator[str]:
    """Ops that act on a module which a Head replaces, or which runs again: on which of the two is not defined."""
    heads = {op.site for op in delta.ops if isinstance(op, Head)}
    renormed = {
        op.read
        for op in delta.ops
        if isinstance(op, LowRank) and spec.norm_around(op.write, op.read) is not None
    }
    for op in delta.ops:
        if isinstance(op, Affine) and op.site in renormed:
            yield f"both an Affine and a LowRank that runs the norm again at {shown(op.site)}."
        if isinstance(op, Affine | Rows) and op.site in heads:
            yield f"both a Head and {type(op).__name__} at {shown(op.site)}; the head is replaced whole."


def _positioned(delta: Delta, spec: BackboneSpec) -> Iterator[str]:
    """What ops that act on some tokens only must satisfy together."""
    positioned = [op for op in delta.ops if isinstance(op, LowRank) and op.positions is not None]
    kinds = [type(positions) for positions in delta.positions]
    if kinds and spec.kind == "encoder-decoder":
        yield "on an encoder-decoder, which of its two rows first tokens and invocations count is not defined."
    if FromInvocation in kinds and spec.kind == "encoder":
        yield "invocation tokens are for models that generate; an encoder's rows are seen whole."
    if kinds and any(isinstance(op, VirtualTokens) for op in delta.ops) and spec.kind == "encoder":
        yield "on an encoder virtual tokens run with each row, and whether first tokens count them is not defined."
    if kinds.count(FromInvocation) > 1:
        yield "its ops name different invocation tokens; a delta is invoked by one sequence."
    elif FromInvocation in kinds and len(kinds) > 1:
        yield "its ops act from an invocation on and on first or last tokens; one of the two is served."
    for kind in (FirstTokens, LastTokens):
        if kinds.count(kind) > 1:
            yield f"its ops name {kinds.count(kind)} numbers of tokens in {kind.__name__}; expected one."
    normalized = {op.site for op in delta.ops if isinstance(op, Affine) and op.weight_normalized}
    for site in sorted({op.write for op in positioned} & normalized):
        yield f"the norms of the weight at {shown(site)} would change inside the prompt (weight_normalized)."


def _virtual(delta: Delta, spec: BackboneSpec) -> Iterator[str]:
    """What prefixes and virtual tokens must satisfy together."""
    prefixes = {
        (op.stack, op.layer): op
        for op in delta.ops
        if isinstance(op, AttnPrefix) and op.merge != "separate" and type(op.layer) is int
    }
    prompts = [op for op in delta.ops if isinstance(op, VirtualTokens)]
    if prefixes and prompts:
        yield "it has both AttnPrefix and VirtualTokens; one set of virtual tokens is served."
    for stack in sorted({stack for stack, _ in prefixes} & set(spec.stacks)):
        if missing := set(range(spec.layers_of(stack))) - {layer for at, layer in prefixes if at == stack}:
            layers = ", ".join(
                str(kv_site(stack, layer)) if stack else str(layer) for layer in sorted(missing)
            )
            yield f"AttnPrefix is missing in layers {layers}; every layer needs one."
    lengths = {tensor.shape[0] for op in prefixes.values() for tensor in (op.key,) if _has_rows(tensor)}
    lengths |= {op.embeddings.shape[0] for op in prompts if _has_rows(op.embeddings)}
    if len(lengths) > 1:
        yield f"virtual tokens differ in number: {', '.join(map(str, sorted(lengths)))}."
    length = max(lengths, default=0)
    if (prefixes or prompts) and not 1 <= length < spec.max_positions:
        yield f"{length} virtual tokens, expected 1 to {spec.max_positions - 1} (the backbone's positions)."
    allowed = {0, length} if prefixes and spec.free_positions else {length}
    if spec.kind == "encoder-decoder" and not any(stack == "dec" for stack, _ in prefixes):
        allowed = {0}  # nothing stands before the decoder's tokens
    if delta.position_offset not in allowed:
        why = "" if spec.free_positions else f"; {spec.model_type} counts positions itself"
        yield f"position_offset: {delta.position_offset}, expected {' or '.join(map(str, sorted(allowed)))}{why}."


def _has_rows(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() > 0


def _place(op: Op) -> str:
    match op:
        case LowRank():
            return shown(op.write)
        case Affine() | LinearMap() | WeightDelta() | Rows() | Head():
            return shown(op.site)
        case AttnPrefix():
            return (
                f"layer {op.layer}{op.stack and f' of {op.stack}'}"
                if type(op.layer) is int
                else "an unknown layer"
            )
        case _:
            return "embed"
