"""PEFT BEFT -> Affine: a vector added to a module's output.

Format: PEFT 0.21.2, keys `base_model.model.<module>.beft_bias` [1, d_out].
Source: PEFT `beft.layer.Linear.forward`; Ben Zaken et al. "BitFit" for the idea.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_linear import BEFT
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import LINEAR_ONLY, Layout, fits, read_modules
from adapters.formats.problems import Problems
from adapters.formats.schema import check_config
from adapters.normal_form import Affine, Op

LAYOUT = Layout.of("beft_bias", kinds=LINEAR_ONLY)


def read_beft(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The shifts of a BEFT adapter; what does not fit is added to `problems`."""
    config = check_config(raw, BEFT, problems)
    return read_modules(LAYOUT, partial(_lower, problems=problems), config, tensors, spec, problems)


def _lower(module: ModuleSpec, found: Mapping[str, Placed], problems: Problems) -> Iterable[Op]:
    if not fits(found, {"beft_bias": (1, module.shape.d_out)}, problems):
        return []
    shift = found["beft_bias"].tensor[0]
    return [Affine(site=part.site, shift=shift[part.start : part.stop]) for part in module.writes]
