"""AdapterHub LoRA, DoRA, IA3 and VeRA (architecture `lora`) -> LowRank and Affine.

Format: `adapters` 1.3.0. Keys `<linear>.loras.{n}.` and `lora_A` [r, d_in] · `lora_B` [d_out, r]; where q, k and v are
one module, those of the m enabled ones are stacked in this order, `lora_A` [r·m, d_in], `lora_B` [m·d_out/3, r].
DoRA adds `m.weight` [d_out, 1]. IA3 has `lora_B` [d_out, 1] alone. VeRA has `vera_D` [r, r] and `vera_B`
[d_out, d_out], and shares `shared_parameters.{n}.lora_A` and `lora_B`, all its modules being of one size.

    LoRA   W x + s·B A x + bias                           s = alpha / r; with a gate that in its place
    DoRA   m/‖W + B A‖ ⊙ (W x + bias + s·B A x)           no s in the norm, the bias inside: unlike PEFT's
    IA3    alpha·v ⊙ (W x + bias)                         of a fused module also the parts that have no v: alpha ⊙
    VeRA   B A is vera_B · lora_B · vera_D · lora_A

`intermediate` and `output` are the two sides of the feed-forward block; the library's Llama and Mistral have them
exchanged. On encoder-decoders the matrices of attention are those of all three attentions, and of a gated T5
`intermediate` is the side that is not activated. Source: `LoRALinear`, `LoRAMergedLinear`, `IA3`,
`Vera` there; Hu et al. "LoRA"; Liu et al. "DoRA", "IA3".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import ModuleSpec, Slice
from adapters.formats.adapterhub_config import LORA
from adapters.formats.adapterhub_layers import index_of
from adapters.formats.adapterhub_stored import Part, Stored
from adapters.formats.problems import quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Affine, LowRank, Op
from adapters.op_checks import LINEAR_KINDS

ATTENTION: Mapping[str, str] = {"q.out": "q", "k.out": "k", "v.out": "v"}
EXCHANGED = frozenset({"llama", "mistral"})
FIXED_SCALING = (1, 1)  # releases before this one divided by r twice where alpha is not r, and ran with s = 1


def read_lora(raw: Mapping[str, Any], path: str, stored: Stored) -> Part | None:
    """The ops of a LoRA, DoRA, IA3 or VeRA; what does not fit is noted."""
    config = check_config(raw, LORA, stored.problems, prefix=path)
    optional = ("vera_d", "vera_b")
    if any(value is None for key, value in config.items() if key not in optional):
        return None
    if stored.release < FIXED_SCALING and path == "config.":  # the library corrects no union
        config["alpha"] = config["r"]
    if stored.refuses_gate(config, path):
        return None
    lowering = _Lowering(config, path, stored)
    return lowering.method, tuple(lowering.ops())


@dataclass
class _Lowering:
    """One pass over the modules. `shared`, of `shapes`: what VeRA's modules share, once the first one was read."""

    config: Mapping[str, Any]
    path: str
    stored: Stored
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shared: Mapping[str, Tensor] | None = None

    @property
    def method(self) -> str:
        """The library's word for it."""
        if self.config["composition_mode"] == "scale":
            return "ia3"
        if self._is_vera:
            return "dvora" if self.config["use_dora"] else "vera"
        return "dora" if self.config["use_dora"] else "lora"

    @property
    def _is_vera(self) -> bool:
        return self.config["vera_d"] is not None or self.config["vera_b"] is not None

    def ops(self) -> Iterator[Op]:
        """The ops of all adapted modules, in the backbone's order."""
        config, add = self.config, self.stored.problems.add
        if self.method == "ia3" and (config["r"] != 1 or config["use_dora"] or self._is_vera):
            add(
                f"adapter_config.json: {self.path}composition_mode: the library has 'scale' only with r = 1 and "
                "without DoRA and VeRA.",
                param="composition_mode",
            )
            return
        if config["use_gating"] and self.method != "lora":
            add(
                f"adapter_config.json: {self.path}use_gating: served with plain LoRA, not with {self.method}.",
                param="use_gating",
            )
            return
        adapted = [(module, parts) for module in self.stored.spec.modules if (parts := self._enabled(module))]
        if not adapted:
            add(
                f"adapter_config.json: {self.path[:-1]}: it names no module of the backbone, so it would change "
                "nothing."
            )
        for module, parts in adapted:
            if len(module.writes) > 1 and not self._is_served_fused(module):
                continue
            if self.config["use_dora"] and module.shape.kind == "conv1d":
                add(f"{quoted(module.path)}: the library has no DoRA on Conv1D modules.", param="use_dora")
                continue
            yield from self._lower(module, parts)

    def _enabled(self, module: ModuleSpec) -> list[Slice]:
        """The parts of the module's output that are adapted."""
        site = module.writes[0].site
        if module.shape.kind not in LINEAR_KINDS or site.layer < 0:
            return []
        if index_of(site, self.stored.spec) in self.config["leave_out"]:
            return []
        ends = [part.site.local for part in module.writes]
        if all(end in ATTENTION for end in ends):
            wanted = self.config["attn_matrices"] if self.config["selfattn_lora"] else ()
            return [part for part, end in zip(module.writes, ends, strict=True) if ATTENTION[end] in wanted]
        sides = {"up.out": "intermediate_lora", "down.out": "output_lora"}
        if self.stored.spec.model_type in EXCHANGED:
            sides = {"up.out": "output_lora", "down.out": "intermediate_lora"}
        switch = sides.get(ends[-1])
        return list(module.writes) if switch is not None and self.config[switch] else []

    def _is_served_fused(self, module: ModuleSpec) -> bool:
        """True where the library has the method on a module of q, k and v."""
        why = None
        if self.method not in ("lora", "ia3"):
            why = f"{self.method} on modules that hold q, k and v at once"
        elif len({part.stop - part.start for part in module.writes}) > 1 or len(module.writes) != len(
            ATTENTION
        ):
            why = "LoRA on fused modules other than q, k and v of one width"
        if why is not None:
            self.stored.problems.add(f"{quoted(module.path)}: the library has no {why}.")
        return why is None

    def _lower(self, module: ModuleSpec, parts: list[Slice]) -> Iterable[Op]:
        stem = self.stored.at(module.path, "loras")
        r, d_out = self.config["r"], sum(part.stop - part.start for part in parts)
        if self.method == "ia3":
            found = self.stored.take(stem, {"lora_B": (d_out, 1)})
            return [] if found is None else self._scales(module, parts, found["lora_B"].reshape(-1))
        shapes: dict[str, tuple[int, ...]] = {"m.weight": (d_out, 1)} if self.config["use_dora"] else {}
        if self._is_vera:
            shapes |= {"vera_D": (r, r), "vera_B": (d_out, d_out)}
        else:
            shapes |= {"lora_A": (r * len(parts), module.shape.d_in), "lora_B": (d_out, r)}
        if self.config["use_gating"]:
            heads = 1 if len(module.writes) == 1 else len(parts)
            shapes |= {"gate.weight": (heads, module.shape.d_in), "gate.bias": (heads,)}
        found = self.stored.take(stem, shapes)
        shared = self._shared(module, d_out) if self._is_vera else found
        if found is None or shared is None:
            return []
        A, B = shared["lora_A"], shared["lora_B"]
        if self._is_vera:
            B = (found["vera_B"].double() @ B.double() @ found["vera_D"].double()).float()
        return self._low_ranks(module, parts, A, B, found)

    def _shared(self, module: ModuleSpec, d_out: int) -> Mapping[str, Tensor] | None:
        """VeRA's factors, which all modules share and whose size the first one sets."""
        r = self.config["r"]
        shapes = {"lora_A": (r, module.shape.d_in), "lora_B": (d_out, r)}
        if not self.shapes:
            self.shapes = shapes
            self.shared = self.stored.take(self.stored.shared("shared_parameters"), shapes)
        elif shapes != self.shapes:
            self.stored.problems.add(
                f"{quoted(module.path)}: the adapted modules share lora_A and lora_B, but differ in size."
            )
            return None
        return self.shared

    def _low_ranks(
        self, module: ModuleSpec, parts: list[Slice], A: Tensor, B: Tensor, found: Mapping[str, Tensor]
    ) -> Iterator[Op]:
        assert module.read is not None, module.path
        start, r, magnitude = 0, self.config["r"], found.get("m.weight")
        gated = "gate.weight" in found
        for index, part in enumerate(parts):
            stop = start + part.stop - part.start
            yield LowRank(
                read=module.read,
                write=part.site,
                A=A[index * r : (index + 1) * r],
                B=B[start:stop],
                scaling=1.0 if gated else self.config["alpha"] / r,
                gate_weight=found["gate.weight"][index % len(found["gate.weight"])] if gated else None,
                gate_bias=found["gate.bias"][[index % len(found["gate.bias"])]] if gated else None,
            )
            start = stop
        if magnitude is not None:
            yield Affine(
                site=parts[0].site, scale=magnitude.reshape(-1), weight_normalized=True, norm_scaling=1.0
            )

    def _scales(self, module: ModuleSpec, parts: list[Slice], vector: Tensor) -> Iterator[Op]:
        alpha, start = float(self.config["alpha"]), 0
        for part in module.writes:
            width = part.stop - part.start
            if part in parts:
                scale = (
                    vector[start : start + width].float() * alpha
                    if alpha != 1
                    else vector[start : start + width]
                )
                start += width
                yield Affine(site=part.site, scale=scale)
            elif alpha != 1:
                yield Affine(site=part.site, scale=torch.full((width,), alpha))
