"""PEFT RoAd -> LinearMap on the module's output, base bias included.

Format: PEFT 0.21.2, `road_theta` and `road_alpha`, [d_out / 2] (`road_1`), [d_out] (`road_2`) or [2·d_out] (`road_4`).
In each group of g columns, column i and column i + g/2 are a plane. With f = alpha cos(theta) and s = alpha sin(theta),
y_i <- f_i y_i - s_i y_j and y_j <- f_j y_j + s_j y_i; the variants differ in which of f_i, f_j, s_i, s_j are shared.
Source: Liao and Monz "3-in-1: 2D rotary adaptation"; PEFT `RoadLayer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_matrix import ROAD
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import LINEAR_ONLY, Layout, fits, is_whole, read_modules
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import LinearMap, Op

LAYOUT = Layout.of("road_theta", "road_alpha", kinds=LINEAR_ONLY)
HALVES = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Stored parameters per plane."""


def read_road(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a RoAd adapter; what does not fit is added to `problems`."""
    config = check_config(raw, ROAD, problems)
    variant, group = config["variant"], config["group_size"]

    def lower(module: ModuleSpec, found: Mapping[str, Placed]) -> list[Op]:
        if variant is None or group is None or not is_whole(module, problems):
            return []
        width = module.shape.d_out
        if width % group:
            problems.add(f"group_size: {group} does not divide the {width} columns of {quoted(module.path)}.")
            return []
        shape = (width // 2 * HALVES[variant],)
        if not fits(found, dict.fromkeys(LAYOUT.fields, shape), problems):
            return []
        theta, alpha = (found[name].tensor.double() for name in LAYOUT.fields)
        return [_rotation(module, variant, group, theta, alpha)]

    return read_modules(LAYOUT, lower, config, tensors, spec, problems)


def _rotation(module: ModuleSpec, variant: str, group: int, theta: Tensor, alpha: Tensor) -> LinearMap:
    half = group // 2
    cos, sin = alpha * theta.cos(), alpha * theta.sin()
    if variant == "road_4":  # per group: first what stands on the diagonal, then what does not
        cos, sin = cos.view(-1, 2, group)[:, 0], sin.view(-1, 2, group)[:, 1]
    # [groups, first or second half, half]; road_1 has one value for both halves
    f, s = (
        value.reshape(-1, 1 if variant == "road_1" else 2, half).expand(-1, 2, half) for value in (cos, sin)
    )
    blocks = torch.stack([f[:, 0], s[:, 1], -s[:, 0], f[:, 1]], dim=-1).view(1, -1, 2, 2)
    planes = torch.arange(module.shape.d_out, dtype=torch.int32).view(-1, 2, half).transpose(1, 2)
    site = module.writes[0].site
    return LinearMap(
        site=site, side="output", blocks=blocks.float(), order=planes.reshape(1, -1).contiguous()
    )
