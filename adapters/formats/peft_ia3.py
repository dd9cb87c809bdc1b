"""PEFT IA3 -> Affine.

Format: PEFT 0.21.2, keys `base_model.model.<module>.ia3_l`: [d_out, 1] scales the module's output, bias included;
[1, d_in] scales the input of a feed-forward module. Source: Liu et al. "IA3" section 3.3; PEFT `IA3Layer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config import IA3
from adapters.formats.peft_keys import Placed, check_shape, place
from adapters.formats.peft_targets import expected_paths
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Affine, Op

FIELDS: Mapping[str, str] = {"ia3_l": "scale"}


def read_ia3(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of an IA3 adapter; what does not fit is added to `problems`."""
    config = check_config(raw, IA3, problems)
    placed = place(tensors, FIELDS, spec, problems)
    expected = expected_paths(config, spec, placed.keys(), problems)
    ops: list[Op] = []
    for module in spec.modules:
        found = placed.get(module.path, {}).get("scale")
        if module.path in expected and found is None:
            problems.add(f"A site without a tensor: {quoted(module.path)} has no ia3_l.")
        elif module.path not in expected and found is not None:
            problems.add(
                f"A tensor without a site: {quoted(found.key)} is in the file, but the config does not adapt it."
            )
        elif found is not None:
            ops += _lower(module, found, config["feedforward_modules"], problems)
    return tuple(ops)


def _lower(
    module: ModuleSpec, found: Placed, feedforward: list[str] | str | None, problems: Problems
) -> list[Op]:
    at_input = tuple(found.tensor.shape) == (1, module.shape.d_in)
    if isinstance(feedforward, list):  # else a regular expression or absent: the two shapes can't be confused
        # PEFT compares ends here without a dot before them
        at_input = any(module.path.endswith(name) for name in feedforward)
    if not check_shape(found, (1, module.shape.d_in) if at_input else (module.shape.d_out, 1), problems):
        return []
    scale = found.tensor.reshape(-1)
    if at_input:  # a module has one input, also where it is fused: its first site stands for it
        return [Affine(site=module.writes[0].site, side="input", scale=scale)]
    return [Affine(site=part.site, scale=scale[part.start : part.stop]) for part in module.writes]
