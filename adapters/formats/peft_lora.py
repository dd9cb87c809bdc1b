"""PEFT LoRA, rsLoRA, aLoRA and DoRA -> LowRank and Affine.

Format: PEFT 0.21.2, adapter_model.safetensors, keys `base_model.model.<module>.` and
`lora_A.weight` [r, d_in] · `lora_B.weight` [d_out, r] (BD-LoRA: one of them as the blocks of a block-diagonal matrix,
stacked: [r, d_in/n] or [d_out, r/n]) · `lora_B.bias` [d_out] · `lora_magnitude_vector` [d_out] ·
`base_layer.bias` or `bias` [d_out].

y = W x + s·(B A x + b_B) + bias, s = alpha/r or alpha/sqrt(r), of aLoRA only from its invocation tokens on;
DoRA: y = m/‖W + s·B·A‖ ⊙ (W x + s·B A x) + bias.
Source: Hu et al. "LoRA" section 4.1; Liu et al. "DoRA" section 4; PEFT `LoraLayer`, `DoraLinearLayer`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config import BDLORA, LORA
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import Layout, fits, read_modules
from adapters.formats.peft_targets import pattern_value
from adapters.formats.peft_tokens import read_lora_tokens
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Affine, LowRank, Op
from adapters.positions import FromInvocation

FIELDS: Mapping[str, str] = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "b_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


def read_lora(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a LoRA adapter; what does not fit is added to `problems`."""
    config = check_config(raw, LORA, problems)
    if config["use_dora"] and config["lora_bias"]:
        problems.add("adapter_config.json: lora_bias: PEFT has no DoRA with lora_bias.", param="lora_bias")
    blocks = None
    if isinstance(config["use_bdlora"], dict):
        blocks = check_config(config["use_bdlora"], BDLORA, problems, prefix="use_bdlora.")
        if config["use_dora"]:
            problems.add("adapter_config.json: use_bdlora: PEFT has no DoRA with it.", param="use_bdlora")
    if config["alora_invocation_tokens"] and (config["use_dora"] or blocks is not None):
        problems.add(
            "adapter_config.json: alora_invocation_tokens: PEFT has no aLoRA with use_dora or use_bdlora.",
            param="alora_invocation_tokens",
        )
    ops, tensors = read_lora_tokens(config["trainable_token_indices"], tensors, spec, problems)
    wanted = {"A", "B"}
    wanted |= {"b_bias"} if config["lora_bias"] else set()
    wanted |= {"magnitude"} if config["use_dora"] else set()
    lower = partial(_lower_linear, config=config, blocks=blocks, problems=problems)
    return (*ops, *read_modules(Layout(FIELDS, frozenset(wanted)), lower, config, tensors, spec, problems))


def _lower_linear(
    module: ModuleSpec,
    found: Mapping[str, Placed],
    config: Mapping[str, Any],
    blocks: Mapping[str, Any] | None,
    problems: Problems,
) -> list[Op]:
    rank = _rank(module.path, config, found["A"].tensor)
    cuts = {"A": 1, "B": 1}
    if blocks is not None and (side := _cut_side(module, rank, blocks, problems)):
        cuts[side] = blocks["nblocks"]
    shapes: dict[str, tuple[int, ...]] = {
        "A": (rank, module.shape.d_in // cuts["A"]),
        "B": (module.shape.d_out, rank // cuts["B"]),
        "b_bias": (module.shape.d_out,),
        "magnitude": (module.shape.d_out,),
    }
    if not fits(found, shapes, problems):
        return []
    A, B = (_whole(found[side].tensor, cuts[side]) for side in ("A", "B"))
    assert module.read is not None, module.path
    scaling = _scaling(module.path, rank, config)
    invocation = config["alora_invocation_tokens"]
    ops: list[Op] = []
    for part in module.writes:
        rows = slice(part.start, part.stop)
        ops.append(
            LowRank(
                read=module.read,
                write=part.site,
                A=A,
                B=B[rows],
                b_bias=found["b_bias"].tensor[rows] if "b_bias" in found else None,
                scaling=scaling,
                positions=FromInvocation(tuple(invocation)) if invocation else None,
            )
        )
        if "magnitude" in found:
            scale = found["magnitude"].tensor[rows]
            ops.append(Affine(site=part.site, scale=scale, covers_bias=False, weight_normalized=True))
    return ops


def _cut_side(module: ModuleSpec, rank: int, blocks: Mapping[str, Any], problems: Problems) -> str | None:
    """Which factor BD-LoRA keeps as the blocks of a block-diagonal matrix, stacked: A, B or neither."""
    if None in (blocks["nblocks"], blocks["match_strict"]):  # refused already
        return None
    sides = [
        side
        for side, key in (("A", "target_modules_bd_a"), ("B", "target_modules_bd_b"))
        if any(part in module.path for part in blocks[key] or ())
    ]
    if len(sides) == 2 or (not sides and blocks["match_strict"]):
        problems.add(
            f"adapter_config.json: use_bdlora: {quoted(module.path)} matches {'both' if sides else 'neither'} of "
            "target_modules_bd_a and target_modules_bd_b.",
            param="use_bdlora",
        )
        return None
    widths = {"A": module.shape.d_in, "B": module.shape.d_out}
    if sides and (rank % blocks["nblocks"] or widths[sides[0]] % blocks["nblocks"]):
        problems.add(
            f"adapter_config.json: use_bdlora: nblocks = {blocks['nblocks']} does not divide rank {rank} and width "
            f"{widths[sides[0]]} of {quoted(module.path)}.",
            param="use_bdlora",
        )
        return None
    return sides[0] if sides else None


def _whole(stacked: Tensor, count: int) -> Tensor:
    """The block-diagonal matrix of `count` blocks that are stacked by rows."""
    if count == 1:
        return stacked
    blocks = stacked.view(count, -1, stacked.shape[1])
    whole = stacked.new_zeros(count, blocks.shape[1], count, blocks.shape[2])
    for index, block in enumerate(blocks):
        whole[index, :, index] = block
    return whole.view(len(stacked), -1)


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
