"""What a delta may touch in one backbone: module paths, widths and sites, as data. No model is loaded here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from adapters.normal_form import Site, Stack
from adapters.tasks import Pooling

ModuleKind = Literal["linear", "conv1d", "norm", "embedding", "layer"]
BackboneKind = Literal["decoder", "encoder", "encoder-decoder"]


MASKED_HEAD_SITES = frozenset({"mlm.out", "mlm.x"})
"""What the masked language model head writes before its logits."""

HEAD_SITES = MASKED_HEAD_SITES | {"pooled"}
"""What modules write that models of some tasks lack: adapters that were trained on those have nothing for them."""


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

    @property
    def in_head(self) -> bool:
        """True for a module that only models of some tasks have."""
        return self.writes[0].site.name in HEAD_SITES


@dataclass(frozen=True, slots=True)
class SharedRows:
    """Rows that belong to no token and that all rows of a batch see: a table of relative embeddings.

    `count` of them pass the modules that write `sites`, which may be modules that the tokens pass too.
    """

    count: int
    sites: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeadStyle:
    """What the backbone's configuration says of the dense layer in its task models' heads, where models differ there.

    `pooling`: what a head of whole inputs reads. `activation`: transformers' name of it. `norm_eps`: that of the norm
    behind it, None without one. `is_own`: the backbone has such a layer, and task models start from it.
    """

    pooling: Pooling
    activation: str
    has_bias: bool = True
    norm_eps: float | None = None
    has_norm_bias: bool = False
    is_own: bool = False


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone as deltas see it.

    `digest` identifies the checkpoint's weights and configuration. `names` are the spellings of
    `base_model_name_or_path` under which uploads may name it. `max_positions`: entries of the longest row that is
    served exactly. Widths: H `num_kv_heads`, D `head_dim`.
    `tied_embeddings`: the head's weight is the embedding. `sees_queries`: the engine runs the attention and sees its
    queries; `free_positions`: position ids are given to the forward, not counted by it. Both depend on the layout that
    serves the backbone. `kind`: a decoder sees what came before and generates; an encoder sees whole rows, at once; an
    encoder-decoder generates behind what its encoder saw. `num_layers`: those that a token passes, of an
    encoder-decoder its decoder's. `first_position`: the position id of a row's first token.
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
    shared: SharedRows | None = None
    head_style: HeadStyle | None = None
    num_encoder_layers: int = 0

    @property
    def body(self) -> str:
        """The module in which all layers are, as adapters name it; empty where they are the model's own (T5)."""
        tops = {module.path.partition(".")[0] for module in self.modules if module.writes[0].site.layer >= 0}
        return tops.pop() if len(tops) == 1 else ""

    @property
    def embedding_width(self) -> int:
        """Of a token's row in the embedding, which is the first module; some models widen it afterwards."""
        return self.modules[0].shape.d_out

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
        if raw["shared"] is not None:
            raw["shared"] = SharedRows(raw["shared"]["count"], tuple(raw["shared"]["sites"]))
        if raw["head_style"] is not None:
            raw["head_style"] = HeadStyle(**raw["head_style"])
        return cls(**raw)
