"""PEFT GraLoRA -> LowRank of rank k·r, plus hybrid_r.

Format: PEFT 0.21.2, keys `base_model.model.<module>.` and `gralora_A` [k, d_in/k, r] · `gralora_B` [k, r, d_out/k] ·
with hybrid_r `gralora_A_general.weight` [hybrid_r, d_in] · `gralora_B_general.weight` [d_out, hybrid_r].

The weight is cut into k x k blocks. Input block n gives r values, r/k of them to each output block j:
y_j += s · sum over n of B_j[n·r/k : (n+1)·r/k]ᵀ (A_n[:, j·r/k : (j+1)·r/k]ᵀ x_n), s = alpha/(r + hybrid_r).
Source: Jung et al. "GraLoRA" section 3; PEFT `gralora.layer.Linear.get_delta_weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config import MAX_RANK
from adapters.formats.peft_config_linear import GRALORA
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import Layout, fits, parallel, read_modules
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Op

LAYOUT = Layout.of("gralora_A", "gralora_B")
HYBRID = Layout.of("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight")


def read_gralora(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a GraLoRA adapter; what does not fit is added to `problems`."""
    config = check_config(raw, GRALORA, problems)
    layout = HYBRID if config["hybrid_r"] else LAYOUT
    return read_modules(
        layout, partial(_lower, config=config, problems=problems), config, tensors, spec, problems
    )


def _lower(
    module: ModuleSpec, found: Mapping[str, Placed], config: Mapping[str, Any], problems: Problems
) -> Iterable[Op]:
    if any(config[key] is None for key in ("r", "hybrid_r", "alpha", "gralora_k")):
        return []
    rank, hybrid, k = config["r"], config["hybrid_r"], config["gralora_k"]
    d_in, d_out = module.shape.d_in, module.shape.d_out
    if rank % k or d_in % k or d_out % k:
        problems.add(
            f"adapter_config.json: gralora_k: {k} does not divide r = {rank} and the {d_in} inputs and {d_out} outputs "
            f"of {quoted(module.path)}.",
            param="gralora_k",
        )
        return []
    if k * rank + hybrid > MAX_RANK:
        problems.add(
            f"adapter_config.json: r: {k} blocks of {rank} and hybrid_r make a rank of {k * rank + hybrid}, more than "
            f"{MAX_RANK}.",
            param="r",
        )
        return []
    shapes = {
        "gralora_A": (k, d_in // k, rank),
        "gralora_B": (k, rank, d_out // k),
        "gralora_A_general.weight": (hybrid, d_in),
        "gralora_B_general.weight": (d_out, hybrid),
    }
    if not fits(found, shapes, problems):
        return []
    blocks_A, blocks_B = found["gralora_A"].tensor, found["gralora_B"].tensor
    # row (j, n, i) of A and column (j, n, i) of B belong to input block n and output block j
    A = blocks_A.new_zeros(k, k, rank // k, k, d_in // k)
    B = blocks_B.new_zeros(k, d_out // k, k, k, rank // k)
    for n in range(k):
        A[:, n, :, n] = blocks_A[n].T.reshape(k, rank // k, d_in // k)
        B[n, :, n] = blocks_B[n].T.reshape(d_out // k, k, rank // k)
    wide_A, wide_B = A.reshape(k * rank, d_in), B.reshape(d_out, k * rank)
    if hybrid:
        wide_A = torch.cat([wide_A, found["gralora_A_general.weight"].tensor])
        wide_B = torch.cat([wide_B, found["gralora_B_general.weight"].tensor], dim=1)
    return parallel(module, wide_A, wide_B, config["alpha"] / (rank + hybrid))
