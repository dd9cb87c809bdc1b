"""PEFT DeLoRA -> LowRank.

Format: PEFT 0.21.2, keys `base_model.model.<module>.` and `delora_A` [r, d_in] · `delora_B` [d_out, r] ·
`delora_lambda` [1] · `delora_w_norm` [d_in] (norms of the base weight's columns when training began; PEFT reads them
from the file too, so the served weights are not asked).

y = W x + B diag(lambda/r / (‖A_i‖·‖B_i‖)) A (w_norm ⊙ x), norms clamped at 1e-4.
Source: Bini et al. "DeLoRA" section 3; PEFT `DeloraLinear.forward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_linear import DELORA
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import LINEAR_ONLY, Layout, fits, parallel, read_modules
from adapters.formats.peft_targets import pattern_value
from adapters.formats.problems import Problems
from adapters.formats.schema import check_config
from adapters.normal_form import Op

LAYOUT = Layout.of("delora_A", "delora_B", "delora_lambda", "delora_w_norm", kinds=LINEAR_ONLY)
MIN_NORM = 1e-4


def read_delora(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a DeLoRA adapter; what does not fit is added to `problems`."""
    config = check_config(raw, DELORA, problems)
    return read_modules(
        LAYOUT, partial(_lower, config=config, problems=problems), config, tensors, spec, problems
    )


def _lower(
    module: ModuleSpec, found: Mapping[str, Placed], config: Mapping[str, Any], problems: Problems
) -> Iterable[Op]:
    if config["r"] is None or config["rank_pattern"] is None:
        return []
    rank = pattern_value(config["rank_pattern"], module.path, config["r"])
    shapes = {
        "delora_A": (rank, module.shape.d_in),
        "delora_B": (module.shape.d_out, rank),
        "delora_lambda": (1,),
        "delora_w_norm": (module.shape.d_in,),
    }
    if not fits(found, shapes, problems):
        return []
    A, B, bound, w_norm = (found[name].tensor.float() for name in shapes)
    norms = A.norm(dim=1).clamp(min=MIN_NORM) * B.norm(dim=0).clamp(min=MIN_NORM)
    return parallel(module, (bound / rank / norms)[:, None] * A * w_norm, found["delora_B"].tensor)
