"""PEFT SHiRA, LoKr and C3A -> WeightDelta.

Format: PEFT 0.21.2.
SHiRA: `shira_weight` [n] at the places `shira_indices` int32 [2, n], (row, column) of the weight [d_out, d_in].
LoKr: alpha/r · (w1 ⊗ w2), each stored whole (`lokr_w1`) or as a product (`lokr_w1_a` `lokr_w1_b`).
C3A: `c3a_kernel` [d_out/b, d_in/b, b], circular correlation in blocks, divided by d_in.
Source: Bhardwaj et al. "Sparse high rank adapters"; Yeh et al. "Navigating text-to-image customization" (LyCORIS);
Chen et al. "Parameter-efficient fine-tuning via circular convolution"; PEFT `ShiraLayer`, `LoKrLayer`, `C3ALayer`.
"""

from __future__ import annotations

import math
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
LOKR_NUMBERS = ("r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor")
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
        if any(config[key] is None for key in LOKR_NUMBERS):  # refused already
            return []
        rank = pattern_value(config["rank_pattern"], module.path, config["r"])
        alpha = pattern_value(config["alpha_pattern"], module.path, config["alpha"])
        widths = (module.shape.d_out, module.shape.d_in)
        (out_left, out_right), (in_left, in_right) = (_divided(n, config["decompose_factor"]) for n in widths)
        small = config["decompose_both"] and rank < max(out_left, in_left) / 2
        shapes = {
            **_factor_shapes("lokr_w1", (out_left, in_left), rank, whole=not small),
            **_factor_shapes(
                "lokr_w2", (out_right, in_right), rank, whole=rank >= max(out_right, in_right) / 2
            ),
        }
        for name in sorted(shapes.keys() - found.keys()):
            problems.add(f"A site without a tensor: {quoted(module.path)} has no {name}.")
        for name in sorted(found.keys() - shapes.keys() - {"bias"}):
            problems.add(
                f"A tensor without a site: {quoted(found[name].key)}: the config has {', '.join(shapes)}."
            )
        if (
            found.keys() != shapes.keys()
            or not fits(found, shapes, problems)
            or not is_whole(module, problems)
        ):
            return []
        left, right = (_factor(name, found) for name in ("lokr_w1", "lokr_w2"))
        site = module.writes[0].site
        return [WeightDelta(site=site, layout="kron", values=right, left=left, scaling=alpha / rank)]

    return read_modules(LOKR_LAYOUT, lower, config, tensors, spec, problems)


def _divided(width: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `width`: `factor` first where it divides, else the divisors next to the root.

    A factor above 0 that does not divide bounds the first of them. Source: PEFT `lokr.layer.factorization`.
    """
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = math.isqrt(width) if factor == -1 else min(math.isqrt(width), max(factor, 1))
    first = next(n for n in range(most, 0, -1) if width % n == 0)
    return first, width // first


def _factor_shapes(
    name: str, shape: tuple[int, int], rank: int, *, whole: bool
) -> dict[str, tuple[int, int]]:
    """What is stored of one factor of the Kronecker product: the matrix, or two of rank r."""
    if whole:
        return {name: shape}
    return {f"{name}_a": (shape[0], rank), f"{name}_b": (rank, shape[1])}


def _factor(name: str, found: Mapping[str, Placed]) -> Tensor:
    if name in found:
        return found[name].tensor
    return found[f"{name}_a"].tensor.float() @ found[f"{name}_b"].tensor.float()


def read_c3a(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a C3A adapter; what does not fit is added to `problems`."""
    config = check_config(raw, C3A, problems)

    def lower(module: ModuleSpec, found: Mapping[str, Placed]) -> list[Op]:
        if None in (config["block_size"], config["block_size_pattern"]):  # refused already
            return []
        shape, kernel = module.shape, found["c3a_kernel"]
        size = pattern_value(config["block_size_pattern"], module.path, config["block_size"])
        if shape.d_out % size or shape.d_in % size:
            problems.add(f"{quoted(kernel.key)}: blocks of {size} do not cut {shape.d_out} by {shape.d_in}.")
            return []
        fit = check_shape(kernel, (shape.d_out // size, shape.d_in // size, size), problems)
        if not fit or not is_whole(module, problems):
            return []
        scaling = 1.0 / shape.d_in
        values, site = kernel.tensor, module.writes[0].site
        return [WeightDelta(site=site, layout="circulant", values=values, scaling=scaling)]

    return read_modules(C3A_LAYOUT, lower, config, tensors, spec, problems)
