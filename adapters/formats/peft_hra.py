"""PEFT HRA -> LinearMap of reflections on the module's input.

Format: PEFT 0.21.2, `hra_u` [d_in, r]. y = W H_1 ... H_r x + bias with H_i = I - 2 u_i u_iᵀ and u_i of norm 1, so x
meets u_r first. With `apply_GS` the u_i are made orthogonal first, and their order does not matter.
Source: Yuan et al. "Bridging the gap between low-rank and orthogonal adaptation via Householder reflection";
PEFT `HRALayer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_matrix import HRA
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import LINEAR_ONLY, Layout, fits, read_modules
from adapters.formats.problems import Problems
from adapters.formats.schema import check_config
from adapters.normal_form import LinearMap, Op

LAYOUT = Layout.of("hra_u", kinds=LINEAR_ONLY)


def read_hra(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of an HRA adapter; what does not fit is added to `problems`."""
    config = check_config(raw, HRA, problems)

    def lower(module: ModuleSpec, found: Mapping[str, Placed]) -> list[Op]:
        if config["r"] is None or not fits(found, {"hra_u": (module.shape.d_in, config["r"])}, problems):
            return []
        rows = found["hra_u"].tensor.double().t()
        if config["apply_GS"]:
            rows = _orthogonal(rows)
        rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return [LinearMap(site=module.writes[0].site, reflections=rows.flip(0).float())]

    return read_modules(LAYOUT, lower, config, tensors, spec, problems)


def _orthogonal(rows: Tensor) -> Tensor:
    """Gram-Schmidt, each row against those before it."""
    done: list[Tensor] = []
    for row in rows:
        for other in done:
            row = row - (other @ row) * other  # noqa: PLW2901
        done.append(row / torch.linalg.vector_norm(row))
    return torch.stack(done)
