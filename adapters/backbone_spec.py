"""What a delta may touch in one backbone: module paths, widths and sites, as data. No model is loaded here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from adapters.normal_form import Site, Stack

ModuleKind = Literal["linear", "conv1d", "norm", "embedding", "layer"]
BackboneKind = Literal["decoder", "encoder", "encoder-decoder"]


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """What the live module says of itself. `conv1d` stores its weight transposed, [d_in, d_out]."""

    kind: ModuleKind
    d_in: int
    d_out: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class Slice:
    """Columns [start, stop) of a module's output are the value of `site`."""

    site: Site
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One module of the backbone: where it reads, which sites it writes, and its shape."""

    path: str
    read: Site | None
    writes: tuple[Slice, ...]
    shape: ModuleShape


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone as deltas see it.

    `digest` identifies the checkpoint's weights and configuration. `names` are the spellings of
    `base_model_name_or_path` under which uploads may name it. `max_positions`: entries of the longest row that is
    served exactly. Widths: H `num_kv_heads`, D `head_dim`.
    `tied_embeddings`: the head's weight is the embedding. `sees_queries`: the engine runs the attention and sees its
    queries; `free_positions`: position ids are given to the forward, not counted by it. Both depend on the layout that
    serves the backbone. `kind`: a decoder sees what came before and generates; an encoder sees whole rows, at once; an
    encoder-decoder generates behind what its encoder saw, and `num_layers` counts its decoder's.
    `first_position`: the position id of a row's first token.
    """

    name: str
    digest: str
    model_type: str
    names: tuple[str, ...]
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    modules: tuple[ModuleSpec, ...]
    tied_embeddings: bool = False
    sees_queries: bool = True
    free_positions: bool = True
    kind: BackboneKind = "decoder"
    first_position: int = 0
    num_encoder_layers: int = 0

    @property
    def body(self) -> str:
        """The module in which all layers are, as adapters name it; empty where they are the model's own (T5)."""
        tops = {module.path.partition(".")[0] for module in self.modules if module.writes[0].site.layer >= 0}
        return tops.pop() if len(tops) == 1 else ""

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The attentions that an AttnPrefix may belong to."""
        return ("enc", "dec", "dec.cross") if self.kind == "encoder-decoder" else ("",)

    def layers_of(self, stack: Stack) -> int:
        """Layers of the stack that has sites with this prefix."""
        return self.num_encoder_layers if stack == "enc" else self.num_layers

    @cached_property
    def by_path(self) -> Mapping[str, ModuleSpec]:
        """Modules by their path in the transformers model, as PEFT's keys name them."""
        return {module.path: module for module in self.modules}

    @cached_property
    def writer(self) -> Mapping[Site, tuple[ModuleSpec, Slice]]:
        """The module and output columns that produce each site's value."""
        return {part.site: (module, part) for module in self.modules for part in module.writes}

    def norm_around(self, write: Site, read: Site) -> ModuleSpec | None:
        """The norm that reads `write` and puts out `read`, if there is one."""
        module, part = self.writer.get(read, (None, None))
        whole = (
            module is not None and part is not None and module.shape.kind == "norm" and module.read == write
        )
        return module if whole else None

    @cached_property
    def site_width(self) -> Mapping[Site, int]:
        """Width of every site's row vectors."""
        widths = {site: part.stop - part.start for site, (_, part) in self.writer.items()}
        for module in self.modules:
            if module.read is not None:
                widths.setdefault(module.read, module.shape.d_in)
        return widths

    def to_json(self) -> str:
        """This spec as JSON; `from_json` is the inverse."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> BackboneSpec:
        """The spec that `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        raw["names"] = tuple(raw["names"])
        raw["modules"] = tuple(
            ModuleSpec(
                path=module["path"],
                read=Site(**module["read"]) if module["read"] else None,
                writes=tuple(
                    Slice(Site(**part["site"]), part["start"], part["stop"]) for part in module["writes"]
                ),
                shape=ModuleShape(**module["shape"]),
            )
            for module in raw["modules"]
        )
        return cls(**raw)
