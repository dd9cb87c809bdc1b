"""PEFT OFT and BOFT -> LinearMap on the module's input (and, for BOFT, a scale on its output).

Format: PEFT 0.21.2. OFT: `oft_R.weight` [n, b(b-1)/2], the upper triangles of skew matrices, n = 1 where the block is
shared. BOFT: `boft_R` [m, n, b, b], of which the skew part counts, and `boft_s` [d_out, 1], which leaves the base bias
alone. Q skew becomes a rotation R, x is multiplied by R from the right.
Cayley: R = (I - Q)(I + Q)^-1. Cayley-Neumann with t terms: I + 2Q + 2Q^2 + ... + 2Q^(t-2) + Q^(t-1); 3 terms are
computed as 4.
Source: Qiu et al. "Controlling text-to-image diffusion by orthogonal finetuning"; Liu et al. "BOFT" section 4; PEFT
`OFTRotationModule`, `BOFTLayer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_matrix import BOFT, OFT
from adapters.formats.peft_keys import Placed, check_shape
from adapters.formats.peft_modules import LINEAR_ONLY, Layout, fits, read_modules
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Affine, LinearMap, Op

OFT_LAYOUT = Layout.of("oft_R.weight", kinds=LINEAR_ONLY)
BOFT_LAYOUT = Layout.of("boft_R", "boft_s", kinds=LINEAR_ONLY)


def read_oft(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of an OFT adapter; what does not fit is added to `problems`."""
    config = check_config(raw, OFT, problems)
    if config["use_cayley_neumann"] and config["peft_version"] is not None:
        release = config["peft_version"].split(".")[:2]
        known = len(release) == 2 and all(part.isascii() and part.isdigit() for part in release)
        if not known or (int(release[0]), int(release[1])) < (0, 18):
            problems.add(
                "adapter_config.json: peft_version: Cayley-Neumann was another series before PEFT 0.18: retrain the "
                "adapter, or set use_cayley_neumann to false if it was trained so.",
                param="peft_version",
            )

    sizes = _sizes(config, "r", "oft_block_size", problems)

    def lower(module: ModuleSpec, found: Mapping[str, Placed]) -> list[Op]:
        if sizes is None:
            return []
        placed, d_in = found["oft_R.weight"], module.shape.d_in
        count, size = sizes
        size = d_in // _divisor(d_in, count) if count else _divisor(d_in, size)
        runs = 1 if config["block_share"] else d_in // size
        if not check_shape(placed, (runs, size * (size - 1) // 2), problems):
            return []
        rows, columns = torch.triu_indices(size, size, 1)
        skew = torch.zeros(runs, size, size, dtype=torch.float64)
        skew[:, rows, columns] = placed.tensor.double()
        skew = skew - skew.mT
        if config["use_cayley_neumann"]:
            blocks = _neumann(skew, config["num_cayley_neumann_terms"] or 5)
        else:
            blocks = _cayley(skew)
        return [LinearMap(site=module.writes[0].site, blocks=blocks.float()[None])]

    return read_modules(OFT_LAYOUT, lower, config, tensors, spec, problems)


def read_boft(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a BOFT adapter; what does not fit is added to `problems`."""
    config = check_config(raw, BOFT, problems)

    sizes = _sizes(config, "boft_block_num", "boft_block_size", problems)
    factor = config["boft_n_butterfly_factor"]

    def lower(module: ModuleSpec, found: Mapping[str, Placed]) -> list[Op]:
        if sizes is None or factor is None:  # refused already
            return []
        d_in, stored = module.shape.d_in, found["boft_R"]
        size = d_in // sizes[0] if sizes[0] else sizes[1]
        count = d_in // max(size, 1)
        # without its CUDA extension PEFT trains one stage, whatever the config says
        stages = 1 if stored.tensor.shape[:1] == (1,) else factor
        if count * size != d_in or (stages > 1 and (size % 2 or count % 2 ** (stages - 1))):
            problems.add(
                f"{quoted(module.path)}: {d_in} columns have no {stages} butterfly stages of {count} blocks of {size}."
            )
            return []
        shapes = {"boft_R": (stages, count, size, size), "boft_s": (module.shape.d_out, 1)}
        if not fits(found, shapes, problems):
            return []
        data = stored.tensor.double()
        blocks = _cayley(0.5 * (data - data.mT)).flip(0)  # x meets the last factor first
        order = None
        if stages > 1:
            order = torch.stack([_butterfly(d_in, size, stage) for stage in reversed(range(stages))])
        scale = found["boft_s"].tensor.reshape(-1)
        return [
            LinearMap(site=module.writes[0].site, blocks=blocks.float(), order=order),
            *(
                Affine(site=part.site, scale=scale[part.start : part.stop], covers_bias=False)
                for part in module.writes
            ),
        ]

    return read_modules(BOFT_LAYOUT, lower, config, tensors, spec, problems)


def _sizes(config: Mapping[str, Any], count: str, size: str, problems: Problems) -> tuple[int, int] | None:
    """Number and size of the blocks, of which PEFT has one as 0 and derives it; None where that is not so."""
    if None in (config[count], config[size]):  # refused already
        return None
    if (config[count] == 0) == (config[size] == 0):
        problems.add(
            f"adapter_config.json: {size}: got {config[size]} beside {count} = {config[count]}, expected one to be 0.",
            param=size,
        )
        return None
    return config[count], config[size]


def _divisor(width: int, wanted: int) -> int:
    """The divisor of `width` that is next to `wanted`, of two the smaller: PEFT's `adjust_oft_parameters`."""
    if wanted >= width:
        return width
    lower = next(n for n in range(wanted, 0, -1) if width % n == 0)
    higher = next(n for n in range(wanted, width + 1) if width % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _cayley(skew: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1 of each matrix."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype)
    rotation: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return rotation


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """The truncated series of `_cayley`, as PEFT truncates it."""
    rotation = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew).clone()
    if terms == 1:
        return rotation
    rotation += 2 * skew
    if terms == 2:
        return rotation
    power = skew @ skew
    rotation += 2 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        rotation += 2 * power
    return rotation + power @ skew


def _butterfly(width: int, size: int, stage: int) -> Tensor:
    """The order of columns of one BOFT stage: in runs of size * 2^stage, half blocks move so that partners meet.

    Column a of the reordered x is column perm^-1[a] of x; perm lists the even half blocks of a run, then the odd.
    """
    halves = torch.arange(width).view(-1, 2 ** (stage + 1), size // 2)
    perm = torch.cat([halves[:, 0::2], halves[:, 1::2]], dim=1).flatten()
    return torch.argsort(perm).to(torch.int32)
