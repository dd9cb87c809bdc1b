"""What readers of PEFT methods that put tensors into modules share: which modules, and that each has its tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_keys import Placed, place
from adapters.formats.peft_targets import LINEAR_KINDS, expected_paths
from adapters.formats.problems import Problems, quoted
from adapters.normal_form import Op

Lower = Callable[[ModuleSpec, Mapping[str, Placed]], list[Op]]

LINEAR = ("linear",)
"""Most methods have no Conv1D in PEFT."""


def lower_modules(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    required: Mapping[str, str],
    lower: Lower,
    spec: BackboneSpec,
    problems: Problems,
    *,
    optional: Mapping[str, str] | None = None,
    kinds: Collection[str] = LINEAR_KINDS,
) -> tuple[Op, ...]:
    """The ops that `lower` makes of each adapted module; what does not fit is added to `problems`.

    `required` and `optional` map the end of a key to the name of the field that `lower` finds the tensor under.
    """
    placed = place(tensors, {**required, **(optional or {})}, spec, problems)
    expected = expected_paths(config, spec, placed.keys(), problems, kinds)
    ops: list[Op] = []
    for module in spec.modules:
        found = placed.get(module.path, {})
        if module.path not in expected:
            for tensor in found.values():
                problems.add(
                    f"A tensor without a site: {quoted(tensor.key)} is in the file, but the config does not adapt it."
                )
            continue
        missing = [key for key, field in required.items() if field not in found]
        for key in missing:
            problems.add(f"A site without a tensor: {quoted(module.path)} has no {key}.")
        if not missing:
            ops += lower(module, found)
    return tuple(ops)


def is_whole(module: ModuleSpec, problems: Problems) -> bool:
    """True where the module writes one site; a matrix over several can't be cut at their borders."""
    if len(module.writes) > 1:
        problems.add(
            f"{quoted(module.path)} writes {len(module.writes)} sites at once; this method is not cut into them yet."
        )
    return len(module.writes) == 1
