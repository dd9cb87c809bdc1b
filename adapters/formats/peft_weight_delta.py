"""PEFT SHiRA, LoKr and C3A -> WeightDelta.

Format: PEFT 0.21.2.
SHiRA: `shira_weight` [n] at the places `shira_indices` int32 [2, n], (row, column) of the weight [d_out, d_in].
LoKr: alpha/r · (w1 ⊗ w2), each stored whole (`lokr_w1`) or as a product (`lokr_w1_a` `lokr_w1_b`).
C3A: `c3a_kernel` [d_out/b, d_in/b, b], circular correlation in blocks, divided by d_in.
Source: Bhardwaj et al. "Sparse high rank adapters"; Yeh et al. "Navigating text-to-image customization" (LyCORIS);
Chen et al. "Parameter-efficient fine-tuning via circular convolution"; PEFT `ShiraLayer`, `LoKrLayer`, `C3ALayer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_matrix import C3A, LOKR, SHIRA
from adapters.formats.peft_keys import Placed, check_shape
from adapters.formats.peft_modules import LINEAR_ONLY, Layout, fits, is_whole, read_modules
from adapters.formats.peft_targets import pattern_value
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Op, WeightDelta

SHIRA_LAYOUT = Layout.of("shira_weight", "shira_indices", kinds=LINEAR_ONLY)
LOKR_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
LOKR_LAYOUT = Layout.of(optional=LOKR_PARTS, kinds=LINEAR_ONLY)
C3A_LAYOUT = Layout.of("c3a_kernel", kinds=LINEAR_ONLY)


def read_shira(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a SHiRA adapter; what does not fit is added to `problems`."""
    config = check_config(raw, SHIRA, problems)

    def lower(module: ModuleSpec, found: Mapping[str, Placed]) -> list[Op]:
        shape, values, indices = module.shape, found["shira_weight"], found["shira_indices"]
        if config["r"] is None or not is_whole(module, problems):
            return []
        count = config["r"] * (shape.d_in + shape.d_out)
        fit = fits(found, {"shira_weight": (count,), "shira_indices": (2, count)}, problems)
        if indices.tensor.dtype not in (torch.int32, torch.int64):
            problems.add(f"{quoted(indices.key)}: got {indices.tensor.dtype}, expected int32.")
            return []
        site, where = module.writes[0].site, indices.tensor.to(torch.int32)
        return [WeightDelta(site=site, layout="sparse", values=values.tensor, indices=where)] if fit else []

    return read_modules(SHIRA_LAYOUT, lower, config, tensors, spec, problems)


def read_lokr(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a LoKr adapter; what does not fit is added to `problems`."""
    config = check_config(raw, LOKR, problems)

    def lower(module: ModuleSpec, found: Mapping[str, Placed]) -> list[Op]:
        if any(config[key] is None for key in ("r", "alpha", "rank_pattern", "alpha_pattern")):
            return []
        rank = pattern_value(config["rank_pattern"], module.path, config["r"])
        alpha = pattern_value(config["alpha_pattern"], module.path, config["alpha"])
        left, right = (_factor(name, module, found, rank, problems) for name in ("lokr_w1", "lokr_w2"))
        if left is None or right is None or not is_whole(module, problems):
            return []
        got = [left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]]
        if got != [module.shape.d_out, module.shape.d_in]:
            expected = [module.shape.d_out, module.shape.d_in]
            problems.add(f"{quoted(module.path)}: lokr_w1 ⊗ lokr_w2 is {got}, expected {expected}.")
            return []
        site = module.writes[0].site
        return [WeightDelta(site=site, layout="kron", values=right, left=left, scaling=alpha / rank)]

    return read_modules(LOKR_LAYOUT, lower, config, tensors, spec, problems)


def _factor(
    name: str, module: ModuleSpec, found: Mapping[str, Placed], rank: int, problems: Problems
) -> Tensor | None:
    """One factor of the Kronecker product, whole or multiplied out."""
    parts = {part: found[part] for part in (name, f"{name}_a", f"{name}_b") if part in found}
    if parts.keys() not in ({name}, {f"{name}_a", f"{name}_b"}):
        problems.add(f"{quoted(module.path)}: expected {name}, or else {name}_a and {name}_b.")
        return None
    if bad := [part for part in parts.values() if part.tensor.dim() != 2]:
        problems.add(f"{quoted(bad[0].key)}: expected a matrix.")
        return None
    if name in parts:
        return parts[name].tensor
    a, b = parts[f"{name}_a"].tensor, parts[f"{name}_b"].tensor
    shapes = {f"{name}_a": (a.shape[0], rank), f"{name}_b": (rank, b.shape[1])}
    return a.float() @ b.float() if fits(parts, shapes, problems) else None


def read_c3a(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a C3A adapter; what does not fit is added to `problems`."""
    config = check_config(raw, C3A, problems)

    def lower(module: ModuleSpec, found: Mapping[str, Placed]) -> list[Op]:
        shape, kernel = module.shape, found["c3a_kernel"]
        size = kernel.tensor.shape[2] if kernel.tensor.dim() == 3 else 1
        if size < 1 or shape.d_out % size or shape.d_in % size:
            problems.add(f"{quoted(kernel.key)}: blocks of {size} do not cut {shape.d_out} by {shape.d_in}.")
            return []
        fit = check_shape(kernel, (shape.d_out // size, shape.d_in // size, size), problems)
        if not fit or not is_whole(module, problems):
            return []
        scaling = 1.0 / shape.d_in
        values, site = kernel.tensor, module.writes[0].site
        return [WeightDelta(site=site, layout="circulant", values=values, scaling=scaling)]

    return read_modules(C3A_LAYOUT, lower, config, tensors, spec, problems)
