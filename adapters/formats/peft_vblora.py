"""PEFT VB-LoRA -> LowRank.

Format: PEFT 0.21.2, keys `base_model.vblora_vector_bank` [h, b] and, per module `base_model.model.<module>.`,
`vblora_logits_A` [r, d_in/b, h] · `vblora_logits_B` [d_out/b, r, h]; with save_only_topk_weights instead of each its
`_topk_indices` [.., k] (integers) and `_topk_weights` [.., k-1], the last weight being what is missing to 1.

Each piece of b entries of A's rows and B's columns is the mean of k vectors of the bank, weighted by the softmax of
the k largest logits; y = W x + B A x.
Source: Li et al. "VB-LoRA" section 3; PEFT `vblora.layer.Linear._get_lora_matrices`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_linear import VBLORA
from adapters.formats.peft_keys import Placed, check_indices, check_shape, take_shared
from adapters.formats.peft_modules import Layout, fits, parallel, read_modules
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Op

BANK = "vblora_vector_bank"
SIDES = ("vblora_logits_A", "vblora_logits_B")
LOGITS = Layout.of(*SIDES)
TOP_K = Layout.of(*(f"{side}_topk_{what}" for side in SIDES for what in ("indices", "weights")))


def read_vblora(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a VB-LoRA adapter; what does not fit is added to `problems`."""
    config = check_config(raw, VBLORA, problems)
    shared, rest = take_shared(tensors, (BANK,), problems)
    layout = TOP_K if config["save_only_topk_weights"] else LOGITS
    bank = None
    if all(config[key] is not None for key in ("r", "num_vectors", "vector_length", "topk")):
        if config["topk"] > config["num_vectors"]:
            problems.add(
                f"adapter_config.json: topk: {config['topk']} of num_vectors = {config['num_vectors']} vectors.",
                param="topk",
            )
        elif shared and check_shape(shared[BANK], (config["num_vectors"], config["vector_length"]), problems):
            bank = shared[BANK].tensor.float()
    lower = partial(_lower, config=config, bank=bank, problems=problems)
    return read_modules(layout, lower, config, rest, spec, problems)


def _lower(
    module: ModuleSpec,
    found: Mapping[str, Placed],
    config: Mapping[str, Any],
    bank: Tensor | None,
    problems: Problems,
) -> Iterable[Op]:
    if bank is None:  # refused already
        return []
    rank, length = config["r"], config["vector_length"]
    d_in, d_out = module.shape.d_in, module.shape.d_out
    if d_in % length or d_out % length:
        problems.add(
            f"adapter_config.json: vector_length: {length} does not divide the {d_in} inputs and {d_out} outputs of "
            f"{quoted(module.path)}.",
            param="vector_length",
        )
        return []
    pieces = {SIDES[0]: (rank, d_in // length), SIDES[1]: (d_out // length, rank)}
    mixed = [_mix(side, shape, found, config["topk"], bank, problems) for side, shape in pieces.items()]
    A, B = mixed
    if A is None or B is None:
        return []
    return parallel(module, A.reshape(rank, d_in), B.transpose(1, 2).reshape(d_out, rank))


def _mix(
    side: str,
    shape: tuple[int, int],
    found: Mapping[str, Placed],
    topk: int,
    bank: Tensor,
    problems: Problems,
) -> Tensor | None:
    """Each piece as a weighted mean of bank vectors, [*shape, b]; None where a tensor does not fit."""
    if side in found:
        if not check_shape(found[side], (*shape, len(bank)), problems):
            return None
        logits, indices = found[side].tensor.float().topk(topk, dim=-1)
        weights = logits.softmax(-1)
    else:
        named = f"{side}_topk_indices", f"{side}_topk_weights"
        if not fits(found, {named[0]: (*shape, topk), named[1]: (*shape, topk - 1)}, problems):
            return None
        if not check_indices(found[named[0]], len(bank), problems):
            return None
        indices, first = found[named[0]].tensor.long(), found[named[1]].tensor.float()
        ordered = indices.sort(-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            problems.add(f"{quoted(found[named[0]].key)}: the same vector twice in one place.")
            return None
        weights = torch.cat([first, 1 - first.sum(-1, keepdim=True)], dim=-1)
    return (weights[..., None] * bank[indices]).sum(-2)
