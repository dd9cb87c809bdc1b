"""AdapterHub prefix tuning -> AttnPrefix.

Format: `adapters` 1.3.0. Keys `prefix_tuning.prefix_tunings.{n}.self_prefix.` and either `control_trans`, the flat
vector [l·2L·H·D], or `wte.weight` [l, d], `control_trans.0.*` [b, d] and `control_trans.2.*` [2L·H·D, b], whose product
is that vector: per token and layer first the key, then the value, [H, D] each. The library keeps the whole under every
layer (`<attention>.prefix_tuning.pool.prefix_tunings.{n}.`) once more, so it can't save it as safetensors itself; a
copy may be absent. Encoder-decoders have such a group for each attention, `encoder_prefix.`, `self_prefix.` and
`cross_prefix.`, under every attention of the model. Keys are used as they are, after rotary, and real tokens are
positioned from 0: unlike PEFT's. T5's keys are nevertheless counted from the prefix on, so that every two tokens are
further apart than in the backbone.
Source: `PrefixTuning`, `FlatPrefixTuning`, `PrefixTuningLayer` there; Li and Liang "Prefix-Tuning".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from adapters.activations import FUNCTIONS
from adapters.backbone_spec import BackboneSpec
from adapters.formats.adapterhub_config import ACTIVATIONS, PREFIX_TUNING
from adapters.formats.adapterhub_stored import Part, Stored
from adapters.formats.schema import check_config
from adapters.normal_form import AttnPrefix, Stack

GROUP = "self_prefix."
GROUPS: Mapping[str, str] = {"distilbert": "self."}
POOL = "prefix_tuning.prefix_tunings"
COPY = "prefix_tuning.pool.prefix_tunings"


def read_prefix(raw: Mapping[str, Any], path: str, stored: Stored) -> Part | None:
    """One AttnPrefix per layer; what does not fit is noted."""
    config = check_config(raw, PREFIX_TUNING, stored.problems, prefix=path)
    if any(value is None for value in config.values()) or raw.get("use_gating"):
        return None
    spec = stored.spec
    if any(layer < spec.num_layers + spec.num_encoder_layers for layer in config["leave_out"]):
        stored.problems.add(
            f"adapter_config.json: {path}leave_out: a prefix is served in all layers or in none, since they share its "
            "place in the cache.",
            param="leave_out",
        )
        return None
    ops = [op for group in _groups(config, spec) for op in _read_group(group, config, stored)]
    return "prefix_tuning", tuple(ops)


def _groups(config: Mapping[str, Any], spec: BackboneSpec) -> list[tuple[str, Stack]]:
    """The groups of a file and the attention to which each belongs."""
    if spec.kind != "encoder-decoder":
        return [(GROUPS.get(spec.model_type, GROUP), "")]
    switched: list[tuple[str, Stack]] = [("encoder_prefix", "enc"), ("cross_prefix", "dec.cross")]
    return [(GROUP, "dec"), *((f"{name}.", stack) for name, stack in switched if config[name])]


def _read_group(place: tuple[str, Stack], config: Mapping[str, Any], stored: Stored) -> Iterator[AttnPrefix]:
    """The prefixes of one attention."""
    spec, (group, stack) = stored.spec, place
    layers = spec.layers_of(stack)
    width = 2 * layers * spec.num_kv_heads * spec.head_dim
    length, inner = config["prefix_length"], config["bottleneck_size"]
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
        return
    flat, *rest = (found[key] for key in shapes)
    if rest:
        first, first_bias, last, last_bias = (tensor.float() for tensor in rest)
        inside = FUNCTIONS[ACTIVATIONS[config["non_linearity"].lower()]](
            F.linear(flat.float(), first, first_bias)
        )
        flat = F.linear(inside, last, last_bias)
    by_layer = flat.reshape(length, layers, 2, spec.num_kv_heads, spec.head_dim)
    for layer in range(layers):
        yield AttnPrefix(layer=layer, key=by_layer[:, layer, 0], value=by_layer[:, layer, 1], stack=stack)


def _take(stored: Stored, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """The tensors from the first place that has them all; those of the others must be the same."""
    spec = stored.spec
    attentions = [
        module.path.rpartition(".")[0]
        for module in spec.modules
        if {part.site.local for part in module.writes} & {"v.out", "qkv.out"}
    ]
    stems = [stored.shared(POOL), *(stored.at(path, COPY) for path in attentions)]
    whole = [stem for stem in stems if all(stem + name in stored.tensors for name in shapes)]
    first = whole[0] if whole else stems[0]
    found = stored.take(first, shapes)
    for stem in stems:
        for name in found or ():
            stored.take_copy(stem + name, first + name)
    return found
