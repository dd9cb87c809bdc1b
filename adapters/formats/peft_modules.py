"""What PEFT's methods that put tensors into modules share: which modules have which, trained biases, saved modules.

A method says what it stores at a module (`Layout`) and what that amounts to (`lower`); the walk over the backbone's
modules finds what is missing and what is stray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleKind, ModuleSpec
from adapters.formats.peft_keys import Placed, check_shape, place
from adapters.formats.peft_saved import take_saved
from adapters.formats.peft_targets import LINEAR_KINDS, expected_paths
from adapters.formats.problems import Problems, quoted
from adapters.normal_form import Affine, Delta, LowRank, Op

Lower = Callable[[ModuleSpec, Mapping[str, Placed]], Iterable[Op]]

BIAS_FIELDS: Mapping[str, str] = {"base_layer.bias": "bias", "bias": "bias"}
# Several methods store little and lower to much (a few vectors that scale shared matrices): what one delta may become.
MAX_LOWERED_BYTES = 4 << 30

LINEAR_ONLY: tuple[ModuleKind, ...] = ("linear",)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a method stores at each module that it adapts.

    `fields`: end of the key -> field name. `wanted`: the fields that each adapted module must have; the others are
    strays, except `optional` ones. `kinds`: the modules for which PEFT has the method. `max_bytes`: of all ops.
    """

    fields: Mapping[str, str]
    wanted: frozenset[str]
    kinds: tuple[ModuleKind, ...] = LINEAR_KINDS
    optional: frozenset[str] = frozenset()
    max_bytes: int = MAX_LOWERED_BYTES

    @classmethod
    def of(
        cls, *names: str, optional: tuple[str, ...] = (), kinds: tuple[ModuleKind, ...] = LINEAR_KINDS
    ) -> Layout:
        """A layout whose keys end in the fields' own names; `names` are the wanted ones."""
        return cls({name: name for name in names + optional}, frozenset(names), kinds, frozenset(optional))

    def key_of(self, field: str) -> str:
        """How a message names the tensor of `field`."""
        ends = [end for end, name in self.fields.items() if name == field]
        return ends[0] if ends else "base_layer.bias or bias"


def read_modules(
    layout: Layout,
    lower: Lower,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    spec: BackboneSpec,
    problems: Problems,
) -> tuple[Op, ...]:
    """The ops of all adapted modules; what does not fit is added to `problems`.

    `config`: the checked `target_modules` and, where the method has them, `modules_to_save`, `exclude_modules`,
    `layers_to_transform` and `bias`. `lower` is called for modules that have all their tensors, of any shape.
    """
    saved, tensors = take_saved(config, tensors, spec, problems)
    placed = place(tensors, {**layout.fields, **BIAS_FIELDS}, spec, problems)
    adapted = {path for path, found in placed.items() if found.keys() - {"bias"}}
    # where a method has no Conv1D, the refusal below says so
    kinds = LINEAR_KINDS if "linear" in layout.kinds else layout.kinds
    expected = expected_paths(config, spec, adapted, problems, kinds)
    biased = _biased_paths(config.get("bias"), spec, expected | adapted)
    biased -= {module.path for module in spec.modules if module.in_head} - placed.keys()
    ops: list[Op] = [*saved]
    for module in spec.modules:
        found = placed.get(module.path, {})
        wanted = set(layout.wanted) if module.path in expected else set()
        wanted |= {"bias"} if module.path in biased else set()
        if module.path in expected and module.shape.kind not in layout.kinds:
            problems.add(
                f"target_modules: {quoted(module.path)}: PEFT has this method for Linear modules only, not for Conv1D.",
                param="target_modules",
            )
        for name in sorted(wanted - found.keys()):
            problems.add(f"A site without a tensor: {quoted(module.path)} has no {layout.key_of(name)}.")
        allowed = wanted | layout.optional if module.path in expected else wanted
        for name in sorted(found.keys() - allowed):
            problems.add(
                f"A tensor without a site: {quoted(found[name].key)} is in the file, but the config does not adapt it."
            )
        if module.path in expected and found.keys() >= wanted - {"bias"}:
            ops += lower(module, found)
            if Delta(method="", ops=tuple(ops)).size_bytes > layout.max_bytes:
                problems.add(
                    f"The adapter's matrices take more than {layout.max_bytes} bytes once they are written out: lower "
                    "its rank or adapt fewer modules."
                )
                return ()
        if "bias" in found and "bias" in wanted:
            ops += _lower_bias(module, found["bias"], problems)
    return tuple(ops)


def is_whole(module: ModuleSpec, problems: Problems) -> bool:
    """True where the module writes one site; a matrix over several can't be cut at their borders."""
    if len(module.writes) > 1:
        problems.add(
            f"{quoted(module.path)} writes {len(module.writes)} sites at once; this method is not cut into them yet."
        )
    return len(module.writes) == 1


def fits(found: Mapping[str, Placed], shapes: Mapping[str, tuple[int, ...]], problems: Problems) -> bool:
    """True where every tensor of `shapes` that the module has is of that shape; each other one is a problem."""
    checked = [check_shape(found[name], shape, problems) for name, shape in shapes.items() if name in found]
    return all(checked)


def parallel(module: ModuleSpec, A: Tensor, B: Tensor, scaling: float = 1.0) -> list[LowRank]:
    """s·B·A over the whole module, cut where its output is fused. Shapes: A [r, d_in], B [d_out, r]."""
    return parallel_parts(module, A, [B[part.start : part.stop] for part in module.writes], scaling)


def parallel_parts(
    module: ModuleSpec, A: Tensor, Bs: Iterable[Tensor], scaling: float = 1.0
) -> list[LowRank]:
    """As `parallel`, with one B per part of a fused output."""
    assert module.read is not None, module.path
    return [
        LowRank(read=module.read, write=part.site, A=A, B=B, scaling=scaling)
        for part, B in zip(module.writes, Bs, strict=True)
    ]


def _biased_paths(bias: str | None, spec: BackboneSpec, targeted: set[str]) -> set[str]:
    """Modules whose bias the adapter replaces: all, or for `<method>_only` the targeted ones."""
    if bias in (None, "none"):
        return set()
    return {
        module.path
        for module in spec.modules
        if module.shape.has_bias and (bias == "all" or module.path in targeted)
    }


def _lower_bias(module: ModuleSpec, bias: Placed, problems: Problems) -> list[Op]:
    if not check_shape(bias, (module.shape.d_out,), problems):
        return []
    return [Affine(site=part.site, bias=bias.tensor[part.start : part.stop]) for part in module.writes]
