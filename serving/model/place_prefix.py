"""Placing what tokens attend to: prefixes and virtual tokens in the KV cache, prompts with a softmax of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.backbone_spec import ModuleSpec
from adapters.normal_form import AttnPrefix, Delta, Site, Stack, VirtualTokens
from serving.kernels.ops import PromptWeights
from serving.model.backbone import Backbone
from serving.model.context import ForwardContext
from serving.model.kv_cache import RowSpan, SlotKVCache
from serving.model.packed import plain_weight
from serving.model.place_matrices import Copy
from serving.model.programs import DeltaSegment, PlacedDelta, compile_programs


def base_parameter(backbone: Backbone, module: ModuleSpec, name: str) -> Tensor:
    """A parameter of the base module, as served, in fp32 on the host."""
    base = backbone.model.get_submodule(module.path)
    parameter: Tensor = plain_weight(base) if name == "weight" else base.get_parameter(name)
    return parameter.float().cpu()


def place_prompt(op: AttnPrefix, backbone: Backbone, to_device: Copy) -> PromptWeights:
    """Keys and values of a separate prompt, projected in fp32 with the served weights, the gate folded in."""
    assert op.gate is not None
    key = _projected(op.key, "k.out", op, backbone)
    value = _projected(op.value, "v.out", op, backbone) * op.gate.float()
    return PromptWeights(to_device(key.transpose(0, 1)), to_device(value.transpose(0, 1)))


def _projected(rows: Tensor, site: str, op: AttnPrefix, backbone: Backbone) -> Tensor:
    """[l, kv_heads, D] of a prompt at one projection of its layer."""
    if op.projected:
        return rows.float()
    module, part = backbone.spec.writer[Site(site, op.layer)]
    columns = slice(part.start, part.stop)
    weight = base_parameter(backbone, module, "weight")
    out = rows.float() @ (weight if module.shape.kind == "conv1d" else weight.t())[:, columns]
    if module.shape.has_bias:
        out += base_parameter(backbone, module, "bias")[columns]
    return out.view(-1, backbone.spec.num_kv_heads, backbone.spec.head_dim)


def place_prefix(delta: Delta, placed: PlacedDelta, backbone: Backbone) -> list[tuple[Tensor, Tensor]] | None:
    """The keys and values that the delta owns, per layer, or None. Virtual tokens of an encoder own none."""
    virtual = next((op for op in delta.ops if isinstance(op, VirtualTokens)), None)
    if virtual is not None and backbone.spec.kind == "decoder":
        return _run_virtual_tokens(virtual, placed.forms.get(None, placed), backbone)
    return stack_prefix(delta, "", backbone)


def stack_prefix(delta: Delta, stack: Stack, backbone: Backbone) -> list[tuple[Tensor, Tensor]] | None:
    """The keys and values that the delta owns in one of the backbone's attentions, per layer, or None."""
    layers = {
        op.layer: op
        for op in delta.ops
        if isinstance(op, AttnPrefix) and op.merge == "joint" and op.stack == stack
    }
    if not layers:
        return None
    device, dtype = backbone.device, backbone.dtype
    ordered = [layers[layer] for layer in range(backbone.spec.layers_of(stack))]
    return [(op.key.to(device, dtype), op.value.to(device, dtype)) for op in ordered]


def _run_virtual_tokens(
    op: VirtualTokens, placed: PlacedDelta, backbone: Backbone
) -> list[tuple[Tensor, Tensor]]:
    length = op.embeddings.shape[0]
    cache = backbone.new_cache(num_slots=1, max_len=length)
    assert isinstance(cache, SlotKVCache), "an encoder's virtual tokens own no keys and values"
    spec = backbone.spec
    segments = [DeltaSegment(0, length, placed)]
    programs = compile_programs(len(spec.modules), backbone.kernels, segments, [], backbone.logit_modules)
    context = ForwardContext(programs, cache.plan([RowSpan(0, length, slot=0, past=0)]))
    positions = torch.arange(length, device=backbone.device)
    backbone.forward(op.embeddings.to(backbone.device, backbone.dtype), positions, context, logits_rows=None)
    return cache.read(0, length)
