"""How much device memory a delta will take, known before it is placed."""

from __future__ import annotations

from adapters.normal_form import (
    Affine,
    AttnPrefix,
    Delta,
    LinearMap,
    LowRank,
    Op,
    Rows,
    VirtualTokens,
    WeightDelta,
)
from serving.model.backbone import Backbone
from serving.model.weight_block import padded_bytes, whole_pages


def max_device_bytes(delta: Delta, backbone: Backbone) -> int:
    """The most that `placement.place` takes: fp32 weights, and keys and values in the backbone's dtype."""
    spec, entries = backbone.spec, 0
    if spec.kind == "encoder-decoder":
        return whole_pages(weight_bytes(delta, backbone)) + _beside_prompts(delta, backbone)
    if any(isinstance(op, VirtualTokens) or _is_joint(op) for op in delta.ops):
        entries = delta.num_virtual_tokens * spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim
    return whole_pages(weight_bytes(delta, backbone)) + entries * backbone.dtype.itemsize


def _beside_prompts(delta: Delta, backbone: Backbone) -> int:
    """Bytes of an encoder-decoder's prefixes, each of the stacks with its own, and of its encoder's virtual tokens."""
    joint = [op for op in delta.ops if isinstance(op, AttnPrefix) and _is_joint(op)]
    virtual = [op for op in delta.ops if isinstance(op, VirtualTokens)]
    entries = sum(op.key.numel() + op.value.numel() for op in joint) * backbone.dtype.itemsize
    return entries + sum(4 * op.embeddings.numel() for op in virtual)


def weight_bytes(delta: Delta, backbone: Backbone) -> int:
    """Bytes of a block that has room for all but keys and values, whatever the folds make of them."""
    total, shared = 0, set()
    for index, name, tensor in delta.tensors():
        op = delta.ops[index]
        if isinstance(op, VirtualTokens) or _is_joint(op):
            continue
        joins = isinstance(op, LowRank) and name != "A" and _is_fused(op, backbone)
        if isinstance(op, LowRank | LinearMap) and not joins:  # copied once, however many ops share it
            if id(tensor) in shared:
                continue
            shared.add(id(tensor))
        doubled = (
            name in {"ids", "indices", "order", "reflections"}  # int64; a pair of factors
            or isinstance(op, Affine | AttnPrefix)  # scale and shift; projections
            or (isinstance(op, WeightDelta) and op.layout == "circulant")  # spectra
        )
        total += padded_bytes((8 if doubled else 4) * tensor.numel())
        if isinstance(op, Rows) and name == "ids":
            total += padded_bytes(4 * tensor.numel())  # the base head's bias of these rows
    return total


def _is_fused(op: LowRank, backbone: Backbone) -> bool:
    """True where the module that writes `op.write` writes other sites too."""
    found = backbone.spec.writer.get(op.write)
    return found is not None and len(found[0].writes) > 1


def _is_joint(op: Op) -> bool:
    return isinstance(op, AttnPrefix) and op.merge == "joint"
