"""PEFT LoRA, rsLoRA and DoRA -> LowRank and Affine.

Format: PEFT 0.21.2, adapter_model.safetensors, keys `base_model.model.<module>.` and
`lora_A.weight` [r, d_in] · `lora_B.weight` [d_out, r] · `lora_B.bias` [d_out] · `lora_magnitude_vector` [d_out] ·
`base_layer.bias` or `bias` [d_out].

y = W x + s·(B A x + b_B) + bias, s = alpha/r or alpha/sqrt(r); DoRA: y = m/‖W + s·B·A‖ ⊙ (W x + s·B A x) + bias.
Source: Hu et al. "LoRA" section 4.1; Liu et al. "DoRA" section 4; PEFT `LoraLayer`, `DoraLinearLayer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config import LORA
from adapters.formats.peft_keys import Placed, check_shape, place
from adapters.formats.peft_targets import expected_paths, pattern_value
from adapters.formats.peft_tokens import read_lora_tokens
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Affine, LowRank, Op

FIELDS: Mapping[str, str] = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "b_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.bias": "bias",
    "bias": "bias",
}


def read_lora(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a LoRA adapter; what does not fit is added to `problems`."""
    config = check_config(raw, LORA, problems)
    if config["use_dora"] and config["lora_bias"]:
        problems.add("adapter_config.json: lora_bias: PEFT has no DoRA with lora_bias.", param="lora_bias")
    ops, tensors = read_lora_tokens(config["trainable_token_indices"], tensors, spec, problems)
    placed = place(tensors, FIELDS, spec, problems)
    adapted = {path for path, found in placed.items() if found.keys() - {"bias"}}
    expected = expected_paths(config, spec, adapted, problems)
    biased = _biased_paths(config["bias"], spec, expected | adapted)
    for module in spec.modules:
        found = placed.get(module.path, {})
        wanted = _wanted_fields(config) if module.path in expected else set()
        wanted |= {"bias"} if module.path in biased else set()
        for name in sorted(wanted - found.keys()):
            problems.add(f"A site without a tensor: {quoted(module.path)} has no {_KEY_OF[name]}.")
        for name in sorted(found.keys() - wanted):
            problems.add(
                f"A tensor without a site: {quoted(found[name].key)} is in the file, but the config does not adapt it."
            )
        if found.keys() >= wanted - {"bias"} and module.path in expected:
            ops += _lower_linear(module, found, config, problems)
        if "bias" in found and "bias" in wanted:
            ops += _lower_bias(module, found["bias"], problems)
    return tuple(ops)


_KEY_OF = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "b_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
    "bias": "base_layer.bias or bias",
}


def _wanted_fields(config: Mapping[str, Any]) -> set[str]:
    wanted = {"A", "B"}
    wanted |= {"b_bias"} if config["lora_bias"] else set()
    return wanted | ({"magnitude"} if config["use_dora"] else set())


def _biased_paths(bias: str | None, spec: BackboneSpec, targeted: set[str]) -> set[str]:
    """Modules whose bias the adapter replaces."""
    if bias in (None, "none"):
        return set()
    return {
        module.path
        for module in spec.modules
        if module.shape.has_bias and (bias == "all" or module.path in targeted)
    }


def _lower_linear(
    module: ModuleSpec, found: Mapping[str, Placed], config: Mapping[str, Any], problems: Problems
) -> list[Op]:
    rank = _rank(module.path, config, found["A"].tensor)
    shapes: dict[str, tuple[int, ...]] = {
        "A": (rank, module.shape.d_in),
        "B": (module.shape.d_out, rank),
        "b_bias": (module.shape.d_out,),
        "magnitude": (module.shape.d_out,),
    }
    fits = [check_shape(found[name], shape, problems) for name, shape in shapes.items() if name in found]
    if not all(fits):
        return []
    assert module.read is not None, module.path
    scaling = _scaling(module.path, rank, config)
    ops: list[Op] = []
    for part in module.writes:
        rows = slice(part.start, part.stop)
        ops.append(
            LowRank(
                read=module.read,
                write=part.site,
                A=found["A"].tensor,
                B=found["B"].tensor[rows],
                b_bias=found["b_bias"].tensor[rows] if "b_bias" in found else None,
                scaling=scaling,
            )
        )
        if "magnitude" in found:
            scale = found["magnitude"].tensor[rows]
            ops.append(Affine(site=part.site, scale=scale, covers_bias=False, weight_normalized=True))
    return ops


def _lower_bias(module: ModuleSpec, bias: Placed, problems: Problems) -> list[Op]:
    if not check_shape(bias, (module.shape.d_out,), problems):
        return []
    return [Affine(site=part.site, bias=bias.tensor[part.start : part.stop]) for part in module.writes]


def _rank(path: str, config: Mapping[str, Any], A: Tensor) -> int:
    """The configured rank; the tensor's own where the config was refused, so that one mistake is reported once."""
    if config["r"] is None or config["rank_pattern"] is None:
        return A.shape[0] if A.dim() else 0
    rank: int = pattern_value(config["rank_pattern"], path, config["r"])
    return rank


def _scaling(path: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = pattern_value(config["alpha_pattern"] or {}, path, config["lora_alpha"])
    if alpha is None or rank == 0:  # refused already: the value is never used
        return 1.0
    return float(alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank)
