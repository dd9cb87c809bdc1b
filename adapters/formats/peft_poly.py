"""PEFT Poly with one task -> LowRank.

Format: PEFT 0.21.2, keys `base_model.model.<module>.` and `poly_lora_A` [S, K, d_in/S, r] · `poly_lora_B`
[S, K, r, d_out/S] · `poly_router.module_logits` [tasks, S·K], S splits and K skills.

Each split's A and B are the skills' mean under weights sigmoid(logits) / (their sum + 1e-12);
y = W x + (B A x)/r with the splits side by side.
Source: Ponti et al. "Combining Parameter-efficient Modules for Task-level Generalisation"; PEFT `PolyRouter`,
`poly.layer.Linear.forward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_linear import POLY
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import LINEAR_ONLY, Layout, fits, parallel, read_modules
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Op

LAYOUT = Layout.of("poly_lora_A", "poly_lora_B", "poly_router.module_logits", kinds=LINEAR_ONLY)
EPSILON = 1e-12


def read_poly(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a Poly adapter of one task; what does not fit is added to `problems`."""
    config = check_config(raw, POLY, problems)
    return read_modules(
        LAYOUT, partial(_lower, config=config, problems=problems), config, tensors, spec, problems
    )


def _lower(
    module: ModuleSpec, found: Mapping[str, Placed], config: Mapping[str, Any], problems: Problems
) -> Iterable[Op]:
    if any(config[key] is None for key in ("r", "n_tasks", "n_skills", "n_splits")):
        return []
    rank, skills, splits = config["r"], config["n_skills"], config["n_splits"]
    d_in, d_out = module.shape.d_in, module.shape.d_out
    if d_in % splits or d_out % splits:
        problems.add(
            f"adapter_config.json: n_splits: {splits} does not divide the {d_in} inputs and {d_out} outputs of "
            f"{quoted(module.path)}.",
            param="n_splits",
        )
        return []
    shapes = {
        "poly_lora_A": (splits, skills, d_in // splits, rank),
        "poly_lora_B": (splits, skills, rank, d_out // splits),
        "poly_router.module_logits": (1, splits * skills),
    }
    if not fits(found, shapes, problems):
        return []
    logits = found["poly_router.module_logits"].tensor.float().view(splits, skills)
    weights = torch.sigmoid(logits)
    weights = weights / (weights.sum(-1, keepdim=True) + EPSILON)
    A = torch.einsum("qs,qsdr->qdr", weights, found["poly_lora_A"].tensor.float()).reshape(d_in, rank)
    B = torch.einsum("qs,qsrd->qrd", weights, found["poly_lora_B"].tensor.float()).transpose(0, 1)
    return parallel(module, A.T.contiguous(), B.reshape(rank, d_out).T.contiguous(), 1 / rank)
