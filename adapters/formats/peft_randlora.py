"""PEFT RandLoRA -> LowRank, as high in rank as the narrower side of the module.

Format: PEFT 0.21.2, keys `base_model.randlora_A` [r, 1, narrowest] · `base_model.randlora_B` [widest, bases, r] (copies
of both stand under every module) and, per module `base_model.model.<module>.`, `randlora_lambda` [r, n] ·
`randlora_gamma` [n, min(d_in, d_out)], n = ceil(min(d_in, d_out) / r).

U = lambda ⊗ A ⊗ gamma reshaped to [r·n, min], V = B[:max, :n] reshaped to [max, n·r];
y = W x + alpha/r · V U x, or with d_in > d_out alpha/r · Uᵀ Vᵀ x. V is shared by modules of equal widths.
Source: Albert et al. "RandLoRA" section 4; PEFT `randlora.layer.Linear.get_scaled_bases`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_linear import RANDLORA
from adapters.formats.peft_keys import Placed, check_shape, take_shared
from adapters.formats.peft_modules import Layout, fits, parallel, parallel_parts, read_modules
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Op

SHARED = ("randlora_A", "randlora_B")
_OWN = ("randlora_lambda", "randlora_gamma")
LAYOUT = Layout({name: name for name in (*_OWN, *SHARED)}, wanted=frozenset(_OWN), optional=frozenset(SHARED))


def read_randlora(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a RandLoRA adapter; what does not fit is added to `problems`."""
    config = check_config(raw, RANDLORA, problems)
    if config["save_projection"] is None:
        return ()  # refused: the file can't have what is looked for below
    shared, rest = take_shared(tensors, SHARED, problems)
    lowering = _Lowering(config["r"], config["randlora_alpha"], shared, problems)
    ops = read_modules(LAYOUT, lowering.lower, config, rest, spec, problems)
    lowering.check_shared()
    return ops


@dataclass
class _Lowering:
    """One pass over the modules, which share the bases (None where the file lacks one)."""

    rank: int | None
    alpha: float | None
    shared: Mapping[str, Placed] | None
    problems: Problems
    modules: list[ModuleSpec] = field(default_factory=list)
    bases: dict[object, list[Tensor]] = field(default_factory=dict)  # V by sizes and cuts

    def lower(self, module: ModuleSpec, found: Mapping[str, Placed]) -> Iterable[Op]:
        """The op of one module."""
        self.modules.append(module)
        if self.shared is None or self.rank is None or self.alpha is None:
            return []
        for name in SHARED:
            if name in found and not torch.equal(found[name].tensor, self.shared[name].tensor):
                self.problems.add(
                    f"{quoted(found[name].key)}: it differs from {quoted(self.shared[name].key)}, of which PEFT "
                    "stores a copy under every module."
                )
        d_in, d_out = module.shape.d_in, module.shape.d_out
        low, high = min(d_in, d_out), max(d_in, d_out)
        n = -(-low // self.rank)
        shapes = {"randlora_lambda": (self.rank, n), "randlora_gamma": (n, low)}
        if not fits(found, shapes, self.problems):
            return []
        A, B = (self.shared[name].tensor for name in SHARED)
        if A.dim() != 3 or A.shape != (self.rank, 1, max(low, A.shape[2])):
            return []  # `check_shared` says so once
        if B.dim() != 3 or B.shape != (max(high, len(B)), max(n, B.shape[1]), self.rank):
            return []
        weights, gamma = (found[name].tensor.float() for name in _OWN)
        U = (weights[:, :, None] * A[:, :, :low].float() * gamma).flatten(end_dim=1)
        scaling = self.alpha / self.rank
        if low == d_in:
            cuts = tuple((part.start, part.stop) for part in module.writes)
            if (cuts, n) not in self.bases:
                self.bases[cuts, n] = [B[start:stop, :n].flatten(start_dim=1) for start, stop in cuts]
            return parallel_parts(module, U, self.bases[cuts, n], scaling)
        if (high, n) not in self.bases:
            self.bases[high, n] = [B[:high, :n].flatten(start_dim=1).T.contiguous()]
        return parallel(module, self.bases[high, n][0], U.T.contiguous(), scaling)

    def check_shared(self) -> None:
        """The shared bases are as large as the largest module needs, and no larger."""
        if self.shared is None or self.rank is None or not self.modules:
            return
        sizes = [max(getattr(m.shape, side) for m in self.modules) for side in ("d_in", "d_out")]
        bases = -(-min(sizes) // self.rank)
        check_shape(self.shared["randlora_A"], (self.rank, 1, min(sizes)), self.problems)
        check_shape(self.shared["randlora_B"], (max(sizes), bases, self.rank), self.problems)
