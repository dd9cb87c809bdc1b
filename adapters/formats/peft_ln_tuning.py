"""PEFT LN tuning -> Affine that replaces a norm's parameters.

Format: PEFT 0.21.2, `ln_tuning_layers.weight` [d] and, where the norm has one, `ln_tuning_layers.bias` [d].
Source: Zhao et al. "Tuning LayerNorm in attention"; PEFT `LNTuningLayer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_matrix import LN_TUNING
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import Layout, fits, read_modules
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Affine, Op

WEIGHT, BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"
LAYOUT = Layout.of(WEIGHT, optional=(BIAS,), kinds=("norm",))


def read_ln_tuning(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of an LN tuning adapter; what does not fit is added to `problems`."""
    config = check_config(raw, LN_TUNING, problems)

    def lower(module: ModuleSpec, found: Mapping[str, Placed]) -> list[Op]:
        if (BIAS in found) != module.shape.has_bias:
            wrong = "a bias that the norm does not have" if BIAS in found else f"no {BIAS}"
            problems.add(f"A site without a tensor: {quoted(module.path)} has {wrong}.")
            return []
        if not fits(found, dict.fromkeys(LAYOUT.fields, (module.shape.d_out,)), problems):
            return []
        bias = found[BIAS].tensor if BIAS in found else None
        return [Affine(site=module.writes[0].site, weight=found[WEIGHT].tensor, bias=bias)]

    return read_modules(LAYOUT, lower, config, tensors, spec, problems)
