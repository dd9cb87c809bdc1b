"""PEFT IA3 -> Affine.

Format: PEFT 0.21.2, keys `base_model.model.<module>.ia3_l`: [d_out, 1] scales the module's output, bias included;
[1, d_in] scales the input of a feed-forward module. Source: Liu et al. "IA3" section 3.3; PEFT `IA3Layer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config import IA3
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import Layout, fits, read_modules
from adapters.formats.problems import Problems
from adapters.formats.schema import check_config
from adapters.normal_form import Affine, Op

LAYOUT = Layout.of("ia3_l")


def read_ia3(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of an IA3 adapter; what does not fit is added to `problems`."""
    config = check_config(raw, IA3, problems)
    lower = partial(_lower, feedforward=config["feedforward_modules"], problems=problems)
    return read_modules(LAYOUT, lower, config, tensors, spec, problems)


def _lower(
    module: ModuleSpec,
    found: Mapping[str, Placed],
    feedforward: list[str] | str | None,
    problems: Problems,
) -> list[Op]:
    stored = found["ia3_l"].tensor
    at_input = tuple(stored.shape) == (1, module.shape.d_in)
    if isinstance(feedforward, list):  # else a regular expression or absent: the two shapes can't be confused
        # PEFT compares ends here without a dot before them
        at_input = any(module.path.endswith(name) for name in feedforward)
    shape = (1, module.shape.d_in) if at_input else (module.shape.d_out, 1)
    if not fits(found, {"ia3_l": shape}, problems):
        return []
    scale = stored.reshape(-1)
    if at_input:  # a module has one input, also where it is fused: its first site stands for it
        return [Affine(site=module.writes[0].site, side="input", scale=scale)]
    return [Affine(site=part.site, scale=scale[part.start : part.stop]) for part in module.writes]
