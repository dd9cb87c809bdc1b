"""PEFT VeRA and PVeRA -> LowRank with one A for all modules of a width.

Format: PEFT 0.21.2, keys `base_model.vera_A` [r, widest d_in] · `base_model.vera_B` [widest d_out, r] and, per module
`base_model.model.<module>.`, `vera_lambda_d` [r] · `vera_lambda_b` [d_out]. PVeRA: `pvera_` for `vera_`, A and
lambda_d twice as high: the first half gives means, the second variances, which inference without sampling ignores.

y = W x + lambda_b ⊙ B[:d_out] (lambda_d ⊙ A[:, :d_in] x). Both vectors are folded into B, so A stays shared.
Source: Kopiczko et al. "VeRA" section 3.1; PEFT `vera.layer.Linear.forward`, `pvera.layer.Linear.forward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_linear import PVERA, VERA
from adapters.formats.peft_keys import Placed, check_shape, take_shared
from adapters.formats.peft_modules import Layout, fits, parallel, read_modules
from adapters.formats.problems import Problems
from adapters.formats.schema import Rule, check_config
from adapters.normal_form import Op


def read_vera(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a VeRA adapter; what does not fit is added to `problems`."""
    return _read(raw, tensors, spec, problems, _Form("vera", VERA, halves=1))


def read_pvera(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a PVeRA adapter that does not sample; what does not fit is added to `problems`."""
    return _read(raw, tensors, spec, problems, _Form("pvera", PVERA, halves=2))


@dataclass(frozen=True, slots=True)
class _Form:
    """`halves`: how many times the rank A and lambda_d are high."""

    name: str
    rules: Mapping[str, Rule]
    halves: int

    @property
    def layout(self) -> Layout:
        fields = {f"{self.name}_lambda_d": "d", f"{self.name}_lambda_b": "b"}
        return Layout(fields, frozenset(fields.values()))


def _read(
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    spec: BackboneSpec,
    problems: Problems,
    form: _Form,
) -> tuple[Op, ...]:
    config = check_config(raw, form.rules, problems)
    if config["save_projection"] is None:
        return ()  # refused: the file can't have what is looked for below
    shared, rest = take_shared(tensors, (f"{form.name}_A", f"{form.name}_B"), problems)
    lowering = _Lowering(config["r"], form.halves, shared, problems)
    ops = read_modules(form.layout, lowering.lower, config, rest, spec, problems)
    lowering.check_shared()
    return ops


@dataclass
class _Lowering:
    """One pass over the modules, which share `A` and `B` (None where the file lacks one)."""

    rank: int | None
    halves: int
    shared: Mapping[str, Placed] | None
    problems: Problems
    modules: list[ModuleSpec] = field(default_factory=list)
    slices: dict[int, Tensor] = field(default_factory=dict)  # d_in -> A of that width

    def lower(self, module: ModuleSpec, found: Mapping[str, Placed]) -> Iterable[Op]:
        """The op of one module."""
        self.modules.append(module)
        if self.shared is None or self.rank is None:
            return []
        d_in, d_out = module.shape.d_in, module.shape.d_out
        A, B = (placed.tensor for placed in self.shared.values())
        if not fits(found, {"d": (self.halves * self.rank,), "b": (d_out,)}, self.problems):
            return []
        if A.dim() != 2 or A.shape[1] < d_in or B.dim() != 2 or B.shape != (max(d_out, len(B)), self.rank):
            return []  # `check_shared` says so once
        narrow = self.slices.setdefault(d_in, A[: self.rank, :d_in].contiguous())
        d, b = found["d"].tensor[: self.rank].float(), found["b"].tensor.float()
        return parallel(module, narrow, b[:, None] * B[:d_out].float() * d)

    def check_shared(self) -> None:
        """The shared matrices are as large as the largest module needs, and no larger."""
        if self.shared is None or self.rank is None or not self.modules:
            return
        d_in = max(module.shape.d_in for module in self.modules)
        d_out = max(module.shape.d_out for module in self.modules)
        for placed, shape in zip(
            self.shared.values(), ((self.halves * self.rank, d_in), (d_out, self.rank)), strict=True
        ):
            check_shape(placed, shape, self.problems)
