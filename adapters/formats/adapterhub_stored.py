"""The tensors of one AdapterHub upload: found by module and method, whatever class of model saved them.

Keys are `<path of a module>.<place>.{n}.<field>`, {n} the adapter's name and `<place>` the method's own (`loras`,
`output_adapters.adapters`); what all layers share has the backbone for its module. A model with a head puts the name of
its body first (`model.`, `transformer.`, `bert.`), a bare one does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.formats.problems import Problems, quoted
from adapters.normal_form import Op

Shapes = Mapping[str, tuple[int, ...]]
Part = tuple[str, tuple[Op, ...]]
"""What one method of an upload amounts to: the library's word for it, and its ops."""


KINDS = (
    "adapters",
    "loras",
    "prefix_tunings",
    "prefix_gates",
    "refts",
    "shared_parameters",
    "invertible_adapters",
)
"""What the library calls the containers of adapters."""


@dataclass
class Stored:
    """The tensors of the adapter `name`, and which of them were asked for. What does not fit is added to `problems`.

    `release` of the library and `model_class` wrote the file.
    """

    tensors: Mapping[str, Tensor]
    name: str
    spec: BackboneSpec
    problems: Problems
    release: tuple[int, int]
    model_class: str
    asked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._stems = {stem for key in self.tensors if (stem := self._stem(key)) is not None}

    def at(self, path: str, place: str) -> str:
        """The beginning of the keys of `place` at the module `path`."""
        full = f"{path}.{place}"
        bare = full.partition(".")[2]
        return f"{bare if bare in self._stems and full not in self._stems else full}.{self.name}."

    def shared(self, place: str) -> str:
        """The beginning of the keys of what all layers share."""
        body = self.spec.body
        found = place if place in self._stems or not body else f"{body}.{place}"
        return f"{found}.{self.name}."

    def refuses_gate(self, config: Mapping[str, Any], path: str) -> bool:
        """True, the reason noted, where `config` has a gate and the model generates."""
        refused = bool(config["use_gating"]) and self.spec.kind != "encoder"
        if refused:
            self.problems.add(
                f"adapter_config.json: {path}use_gating: the gate is a mean over the whole sequence, so it depends on "
                "later tokens, and in generation the library takes it over the tokens of each step alone; served on "
                "encoders.",
                param="use_gating",
            )
        return refused

    def take(self, stem: str, shapes: Shapes) -> dict[str, Tensor] | None:
        """Field -> tensor of the keys that begin with `stem`; None, the reason noted, where one is not as expected."""
        found: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            key = stem + name
            self._ask(key)
            if key not in self.tensors:
                self.problems.add(f"A site without a tensor: the file has no {quoted(key)}.")
            elif (got := tuple(self.tensors[key].shape)) != shape:
                self.problems.add(f"{quoted(key)}: got shape {list(got)}, expected {list(shape)}.")
            else:
                found[name] = self.tensors[key]
        return found if len(found) == len(shapes) else None

    def take_copy(self, key: str, original: str) -> None:
        """A tensor that the library stores under several names: it may be absent, but must be the same."""
        if key == original or key not in self.tensors:
            return
        self._ask(key)
        one, other = self.tensors[key], self.tensors[original]
        if one.dtype != other.dtype or one.shape != other.shape or not bool((one == other).all()):
            self.problems.add(f"{quoted(key)}: it differs from {quoted(original)}, of which it is a copy.")

    def refuse_strays(self) -> None:
        """Note every tensor that nothing asked for."""
        for key in self.tensors:
            if key not in self.asked:
                self.problems.add(
                    f"A tensor without a site: {quoted(key)}: the config names no such adapter on this backbone."
                )

    def _stem(self, key: str) -> str | None:
        """What stands before the adapter's name, which may be a word of the path too."""
        for kind in KINDS:
            before, found, _ = f".{key}".partition(f".{kind}.{self.name}.")
            if found:
                return f"{before}.{kind}"[1:]
        return None

    def _ask(self, key: str) -> None:
        if key in self.asked:
            self.problems.add(
                f"{quoted(key)}: two parts of the union act here; the library refuses them too."
            )
        self.asked.add(key)
