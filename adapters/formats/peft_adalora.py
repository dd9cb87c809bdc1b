"""PEFT AdaLoRA -> LowRank.

Format: PEFT 0.21.2, keys `base_model.model.<module>.` and `lora_A` [r, d_in] · `lora_E` [r, 1] · `lora_B` [d_out, r],
pruned to the directions that `rank_pattern` keeps (none: nothing happens at the module).

y = W x + alpha/(init_r + 1e-5) · B (A ⊙ E) x: the divisor stays init_r, whatever was pruned.
Source: Zhang et al. "AdaLoRA" section 3.1; PEFT `SVDLinear`, `AdaLoraModel.resize_modules_by_rank_pattern`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_linear import ADALORA
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import Layout, fits, parallel, read_modules
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Op

LAYOUT = Layout.of("lora_A", "lora_E", "lora_B")
EPSILON = 1e-5
_PATTERN_KEY = ".lora_E"


def read_adalora(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of an AdaLoRA adapter; what does not fit is added to `problems`."""
    config = check_config(raw, ADALORA, problems)
    kept = config["rank_pattern"] or {}
    for name, mask in kept.items():
        if name.removesuffix(_PATTERN_KEY) not in spec.by_path or not name.endswith(_PATTERN_KEY):
            problems.add(
                f"adapter_config.json: rank_pattern: {quoted(name)} names no module of the backbone.",
                param="rank_pattern",
            )
        elif config["init_r"] not in (None, len(mask)):
            problems.add(
                f"adapter_config.json: rank_pattern: {quoted(name)} has {len(mask)} entries, expected "
                f"init_r = {config['init_r']}.",
                param="rank_pattern",
            )
    return read_modules(
        LAYOUT, partial(_lower, config=config, problems=problems), config, tensors, spec, problems
    )


def _lower(
    module: ModuleSpec, found: Mapping[str, Placed], config: Mapping[str, Any], problems: Problems
) -> Iterable[Op]:
    if config["init_r"] is None or config["lora_alpha"] is None:
        return []
    mask = (config["rank_pattern"] or {}).get(module.path + _PATTERN_KEY)
    rank = config["init_r"] if mask is None else sum(mask)
    shapes = {
        "lora_A": (rank, module.shape.d_in),
        "lora_E": (rank, 1),
        "lora_B": (module.shape.d_out, rank),
    }
    if not fits(found, shapes, problems) or rank == 0:
        return []
    A = found["lora_A"].tensor.float() * found["lora_E"].tensor.float()
    scaling = config["lora_alpha"] / (config["init_r"] + EPSILON)
    return parallel(module, A, found["lora_B"].tensor, scaling)
