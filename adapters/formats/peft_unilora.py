"""PEFT Uni-LoRA with saved indices -> LowRank.

Format: PEFT 0.21.2, keys `base_model.unilora_theta_d` [d] and, per module `base_model.model.<module>.`,
`unilora_indices_A` `unilora_scales_A` [r, d_in] · `unilora_indices_B` `unilora_scales_B` [d_out, r], indices integers.

A = theta_d[indices_A] ⊙ scales_A, B likewise; y = W x + B A x.
Source: Li et al. "Uni-LoRA" section 3; PEFT `unilora.layer.Linear._get_lora_matrices`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_linear import UNILORA
from adapters.formats.peft_keys import Placed, check_indices, check_shape, take_shared
from adapters.formats.peft_modules import Layout, fits, parallel, read_modules
from adapters.formats.problems import Problems
from adapters.formats.schema import check_config
from adapters.normal_form import Op

THETA = "unilora_theta_d"
LAYOUT = Layout.of("unilora_indices_A", "unilora_scales_A", "unilora_indices_B", "unilora_scales_B")


def read_unilora(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a Uni-LoRA adapter; what does not fit is added to `problems`."""
    config = check_config(raw, UNILORA, problems)
    if config["save_indices"] is None:
        return ()  # refused: the file can't have what is looked for below
    shared, rest = take_shared(tensors, (THETA,), problems)
    theta = None
    if (
        shared
        and config["theta_d_length"]
        and check_shape(shared[THETA], (config["theta_d_length"],), problems)
    ):
        theta = shared[THETA].tensor.float()
    lower = partial(_lower, rank=config["r"], theta=theta, problems=problems)
    return read_modules(LAYOUT, lower, config, rest, spec, problems)


def _lower(
    module: ModuleSpec,
    found: Mapping[str, Placed],
    rank: int | None,
    theta: Tensor | None,
    problems: Problems,
) -> Iterable[Op]:
    if rank is None or theta is None:  # refused already
        return []
    shapes = {"A": (rank, module.shape.d_in), "B": (module.shape.d_out, rank)}
    named = {
        f"unilora_{what}_{side}": shape for what in ("indices", "scales") for side, shape in shapes.items()
    }
    if not fits(found, named, problems):
        return []
    in_range = [check_indices(found[f"unilora_indices_{side}"], len(theta), problems) for side in shapes]
    if not all(in_range):
        return []
    A, B = (
        theta[found[f"unilora_indices_{side}"].tensor.long()] * found[f"unilora_scales_{side}"].tensor.float()
        for side in shapes
    )
    return parallel(module, A, B)
