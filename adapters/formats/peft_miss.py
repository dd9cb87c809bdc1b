"""PEFT MiSS -> LowRank of rank r.

Format: PEFT 0.21.2, keys `base_model.model.<module>.miss_block` [r, d_out], or [r, mini_r] repeated along d_out where
init_weights is 'mini'.

y = W x + (sum over the blocks of r inputs) @ miss_block: A holds a 1 where input i falls on i mod r, the last block
being as short as the input leaves it.
Source: Kang and Yin "MiSS" section 3; PEFT `MissLinear.forward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_linear import MISS
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import LINEAR_ONLY, Layout, fits, parallel, read_modules
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Op

LAYOUT = Layout.of("miss_block", kinds=LINEAR_ONLY)


def read_miss(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a MiSS adapter; what does not fit is added to `problems`."""
    config = check_config(raw, MISS, problems)
    lower = partial(_lower, config=config, block_sums={}, problems=problems)
    return read_modules(LAYOUT, lower, config, tensors, spec, problems)


def _lower(
    module: ModuleSpec,
    found: Mapping[str, Placed],
    config: Mapping[str, Any],
    block_sums: dict[int, Tensor],
    problems: Problems,
) -> Iterable[Op]:
    rank, mini, init = config["r"], config["mini_r"], config["init_weights"]
    if rank is None or mini is None or init is None:
        return []
    d_in, d_out = module.shape.d_in, module.shape.d_out
    if rank > d_in:
        problems.add(
            f"adapter_config.json: r: {rank} is more than the {d_in} inputs of {quoted(module.path)}.",
            param="r",
        )
        return []
    if init == "mini" and d_out % mini:
        problems.add(
            f"adapter_config.json: mini_r: {mini} does not divide the {d_out} outputs of {quoted(module.path)}.",
            param="mini_r",
        )
        return []
    if not fits(found, {"miss_block": (rank, mini if init == "mini" else d_out)}, problems):
        return []
    # modules of one width share A
    A = block_sums.setdefault(d_in, torch.eye(rank).repeat(1, -(-d_in // rank))[:, :d_in].contiguous())
    block = found["miss_block"].tensor
    return parallel(module, A, block.T.repeat(d_out // block.shape[1], 1))
