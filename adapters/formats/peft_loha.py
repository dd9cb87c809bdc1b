"""PEFT LoHa -> LowRank of rank r².

Format: PEFT 0.21.2, keys `base_model.model.<module>.` and `hada_w1_a` `hada_w2_a` [d_out, r] · `hada_w1_b` `hada_w2_b`
[r, d_in].

W + alpha/r · (a1 b1) ⊙ (a2 b2), and the product of two rank-r matrices, entry by entry, is the one of rank r² whose
columns (rows) are the products of each column (row) of the one with each of the other (Khatri-Rao).
Source: Hyeon-Woo et al. "FedPara" proposition 1; PEFT `LoHaLayer.get_delta_weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config import MAX_RANK
from adapters.formats.peft_config_linear import LOHA
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import LINEAR_ONLY, Layout, fits, parallel, read_modules
from adapters.formats.peft_targets import pattern_value
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Op

LAYOUT = Layout.of("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", kinds=LINEAR_ONLY)


def read_loha(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a LoHa adapter; what does not fit is added to `problems`."""
    config = check_config(raw, LOHA, problems)
    return read_modules(
        LAYOUT, partial(_lower, config=config, problems=problems), config, tensors, spec, problems
    )


def _lower(
    module: ModuleSpec, found: Mapping[str, Placed], config: Mapping[str, Any], problems: Problems
) -> Iterable[Op]:
    if any(config[key] is None for key in ("r", "alpha", "rank_pattern", "alpha_pattern")):
        return []
    rank = pattern_value(config["rank_pattern"], module.path, config["r"])
    alpha = pattern_value(config["alpha_pattern"], module.path, config["alpha"])
    if rank * rank > MAX_RANK:
        problems.add(
            f"adapter_config.json: r: {rank} at {quoted(module.path)} makes a rank of {rank * rank}, more than "
            f"{MAX_RANK}.",
            param="r",
        )
        return []
    left, right = (module.shape.d_out, rank), (rank, module.shape.d_in)
    shapes = {"hada_w1_a": left, "hada_w1_b": right, "hada_w2_a": left, "hada_w2_b": right}
    if not fits(found, shapes, problems):
        return []
    a1, b1, a2, b2 = (
        found[name].tensor.float() for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    )
    A = (b1[:, None] * b2[None]).reshape(rank * rank, -1)
    B = (a1[:, :, None] * a2[:, None]).reshape(-1, rank * rank)
    return parallel(module, A, B, alpha / rank)
