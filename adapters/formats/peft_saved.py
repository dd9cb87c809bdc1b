"""PEFT's `modules_to_save`, whole modules that were trained beside the adapter -> Head, Rows, Affine.

Format: PEFT 0.21.2, the module's own parameters: `<module>.weight`, and `<module>.bias` where it has one, after
`base_model.model.`, beside prompts after `base_model.`. A name in the config saves every module whose path ends in it,
in the middle of a word too: `norm` means `input_layernorm`; of a masked language model head also every module inside
one that is so named (`cls`, `lm_head`). Each saved module is a copy of its own: a head that was
tied to the embedding is so no more, and keeps the base weight where only the embedding was saved.
Source: PEFT `ModulesToSaveWrapper`, `_set_trainable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import MASKED_HEAD_SITES, BackboneSpec, ModuleSpec
from adapters.formats.peft_keys import PREFIX, Placed, check_shape
from adapters.formats.problems import Problems, quoted
from adapters.normal_form import Affine, Head, Op, Rows


def take_saved(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    spec: BackboneSpec,
    problems: Problems,
    *,
    prefix: str = PREFIX,
) -> tuple[list[Op], Mapping[str, Tensor]]:
    """The ops of the modules that the checked `config` saves, and the tensors that are left.

    `prefix`: how the method's keys start. What does not fit is added to `problems`.
    """
    names = config.get("modules_to_save") or ()
    modules = [module for module in spec.modules if any(_names(name, module, spec) for name in names)]
    for name in names:
        if not any(_names(name, module, spec) for module in modules):
            problems.add(
                f"adapter_config.json: modules_to_save: no module of the backbone that could be replaced ends in "
                f"{quoted(name)}. Remove the name if nothing was saved under it.",
                param="modules_to_save",
            )
    ops: list[Op] = []
    taken: set[str] = set()
    for module in modules:
        if not _is_served(module):
            problems.add(
                f"adapter_config.json: modules_to_save: {quoted(module.path)} can't be replaced whole; the language "
                "model head, the token embedding and norms can.",
                param="modules_to_save",
            )
            continue
        names_here = ("weight", "bias") if module.shape.has_bias else ("weight",)
        keys = {name: f"{prefix}{module.path}.{name}" for name in names_here}
        taken |= set(keys.values())
        for name in [name for name, key in keys.items() if key not in tensors]:
            problems.add(
                f"A site without a tensor: modules_to_save: {quoted(module.path)} has no {name}.",
                param="modules_to_save",
            )
        found = {name: Placed(key, tensors[key]) for name, key in keys.items() if key in tensors}
        taken |= _take_tied_bias(module, found, tensors, prefix, problems)
        if len(found) == len(keys) and _fits(module, found, problems):
            ops.append(_lower(module, found))
    return ops, {key: tensor for key, tensor in tensors.items() if key not in taken}


def _names(name: str, module: ModuleSpec, spec: BackboneSpec) -> bool:
    """True where PEFT saves `module` by `name`."""
    if not _is_masked_head(module, spec):
        return module.path.endswith(name)
    parts = module.path.split(".")
    return any(".".join(parts[:count]).endswith(name) for count in range(1, len(parts) + 1))


def _is_masked_head(module: ModuleSpec, spec: BackboneSpec) -> bool:
    site = module.writes[0].site.name
    return site in MASKED_HEAD_SITES or (site == "logits" and spec.kind == "encoder")


def _take_tied_bias(
    module: ModuleSpec,
    found: Mapping[str, Placed],
    tensors: Mapping[str, Tensor],
    prefix: str,
    problems: Problems,
) -> set[str]:
    """The key under which the container of a masked head's decoder has the decoder's bias once more."""
    container, _, name = module.path.rpartition(".")
    key = f"{prefix}{container}.bias"
    if name != "decoder" or not container or key not in tensors or "bias" not in found:
        return set()
    if not torch.equal(tensors[key], found["bias"].tensor):
        problems.add(
            f"{quoted(key)} and {quoted(found['bias'].key)} are one parameter in the model, but differ here.",
            param="modules_to_save",
        )
    return {key}


def _is_served(module: ModuleSpec) -> bool:
    return module.shape.kind in ("embedding", "norm") or module.writes[0].site.name in ("logits", "mlm.out")


def _fits(module: ModuleSpec, found: Mapping[str, Placed], problems: Problems) -> bool:
    d_in, d_out = module.shape.d_in, module.shape.d_out
    weight = {"embedding": (d_in, d_out), "norm": (d_out,)}.get(module.shape.kind, (d_out, d_in))
    shapes = {"weight": weight, "bias": (d_out,)}
    checked = [check_shape(placed, shapes[name], problems) for name, placed in found.items()]
    return all(checked)


def _lower(module: ModuleSpec, found: Mapping[str, Placed]) -> Op:
    site, weight = module.writes[0].site, found["weight"].tensor
    bias = found["bias"].tensor if "bias" in found else None
    match module.shape.kind:
        case "embedding":
            return Rows(site=site, ids=torch.arange(len(weight), dtype=torch.int32), rows=weight)
        case "norm":
            return Affine(site=site, weight=weight, bias=bias)
        case _:
            return Head(site=site, weight=weight, bias=bias)
