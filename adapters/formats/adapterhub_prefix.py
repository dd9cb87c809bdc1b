"""AdapterHub prefix tuning -> AttnPrefix.

Format: `adapters` 1.3.0. Keys `prefix_tuning.prefix_tunings.{n}.self_prefix.` and either `control_trans`, the flat
vector [l·2L·H·D], or `wte.weight` [l, d], `control_trans.0.*` [b, d] and `control_trans.2.*` [2L·H·D, b], whose product
is that vector: per token and layer first the key, then the value, [H, D] each. The library keeps the whole under every
layer (`<attention>.prefix_tuning.pool.prefix_tunings.{n}.`) once more, so it can't save it as safetensors itself; a
copy may be absent. With gates `<attention>.prefix_tuning.prefix_gates.{n}.*` [1 or 2, d]. Keys are used as they are,
after rotary, and real tokens are positioned from 0: unlike PEFT's.
Source: `PrefixTuning`, `FlatPrefixTuning`, `PrefixTuningLayer` there; Li and Liang "Prefix-Tuning".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from adapters.activations import FUNCTIONS
from adapters.backbone_spec import BackboneSpec
from adapters.formats.adapterhub_config import ACTIVATIONS, PREFIX_TUNING
from adapters.formats.adapterhub_stored import Part, Stored
from adapters.formats.schema import check_config
from adapters.normal_form import AttnPrefix, Site

GROUP = "self_prefix."
GROUPS: Mapping[str, str] = {"distilbert": "self."}
POOL = "prefix_tuning.prefix_tunings"
COPY = "prefix_tuning.pool.prefix_tunings"
GATES = "prefix_tuning.prefix_gates"


def read_prefix(raw: Mapping[str, Any], path: str, stored: Stored) -> Part | None:
    """One AttnPrefix per layer; what does not fit is noted."""
    config = check_config(raw, PREFIX_TUNING, stored.problems, prefix=path)
    if any(value is None for value in config.values()):
        return None
    spec = stored.spec
    if stored.refuses_gate(config, path):
        return None
    if any(layer < spec.num_layers for layer in config["leave_out"]):
        stored.problems.add(
            f"adapter_config.json: {path}leave_out: a prefix is served in all layers or in none, since they share its "
            "place in the cache.",
            param="leave_out",
        )
        return None
    width = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    length, inner = config["prefix_length"], config["bottleneck_size"]
    group = GROUPS.get(spec.model_type, GROUP)
    shapes: dict[str, tuple[int, ...]] = {f"{group}control_trans": (length * width,)}
    if not config["flat"]:
        shapes = {
            f"{group}wte.weight": (length, spec.hidden_size),
            f"{group}control_trans.0.weight": (inner, spec.hidden_size),
            f"{group}control_trans.0.bias": (inner,),
            f"{group}control_trans.2.weight": (width, inner),
            f"{group}control_trans.2.bias": (width,),
        }
    found = _take(stored, shapes)
    if found is None:
        return "prefix_tuning", ()
    flat, *rest = (found[key] for key in shapes)
    if rest:
        first, first_bias, last, last_bias = (tensor.float() for tensor in rest)
        inside = FUNCTIONS[ACTIVATIONS[config["non_linearity"].lower()]](
            F.linear(flat.float(), first, first_bias)
        )
        flat = F.linear(inside, last, last_bias)
    by_layer = flat.reshape(length, spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
    ops = []
    for layer in range(spec.num_layers):
        key, value = by_layer[:, layer, 0], by_layer[:, layer, 1]
        gate_weight, gate_bias = _gate(config, layer, stored)
        ops.append(
            AttnPrefix(layer=layer, key=key, value=value, gate_weight=gate_weight, gate_bias=gate_bias)
        )
    return "prefix_tuning", tuple(ops)


def _gate(config: Mapping[str, Any], layer: int, stored: Stored) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The gate of one layer's prefix, shared by its keys and values or one for each; none where there is none."""
    if not config["use_gating"]:
        return None, None
    count = 1 if config["shared_gating"] else 2
    shapes: dict[str, tuple[int, ...]] = {"weight": (count, stored.spec.hidden_size), "bias": (count,)}
    found = stored.take(stored.at(_attention(stored.spec, layer), GATES), shapes)
    return (None, None) if found is None else (found["weight"], found["bias"])


def _attention(spec: BackboneSpec, layer: int) -> str:
    """The path of a layer's attention."""
    projection = next(name for name in ("v.out", "qkv.out") if Site(name, layer) in spec.writer)
    return spec.writer[Site(projection, layer)][0].path.rpartition(".")[0]


def _take(stored: Stored, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """The tensors from the first place that has them all; those of the others must be the same."""
    spec = stored.spec
    attentions = [_attention(spec, layer) for layer in range(spec.num_layers)]
    stems = [stored.shared(POOL), *(stored.at(path, COPY) for path in attentions)]
    whole = [stem for stem in stems if all(stem + name in stored.tensors for name in shapes)]
    first = whole[0] if whole else stems[0]
    found = stored.take(first, shapes)
    for stem in stems:
        for name in found or ():
            stored.take_copy(stem + name, first + name)
    return found
