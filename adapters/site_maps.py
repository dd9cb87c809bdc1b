"""Site maps: which module of an architecture reads and writes which site. A new architecture is a row here.

`*` in a path is the layer index. A module with several writes is fused: its output columns are, in this order,
q, k, v (sizes from the head counts) or equal parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.backbone_spec import BackboneSpec, ModuleShape, ModuleSpec, Slice
from adapters.errors import BackboneRefused
from adapters.normal_form import Site


@dataclass(frozen=True, slots=True)
class Row:
    """One module: path template, the site it reads (None: token ids), the sites it writes."""

    path: str
    read: str | None
    writes: tuple[str, ...]


SITE_MAPS: Mapping[str, tuple[Row, ...]] = {
    "llama": (
        Row("model.embed_tokens", None, ("embed",)),
        Row("model.layers.*", "attn.r", ("layer.out",)),
        Row("model.layers.*.input_layernorm", "attn.r", ("attn.x",)),
        Row("model.layers.*.self_attn.q_proj", "attn.x", ("q.out",)),
        Row("model.layers.*.self_attn.k_proj", "attn.x", ("k.out",)),
        Row("model.layers.*.self_attn.v_proj", "attn.x", ("v.out",)),
        Row("model.layers.*.self_attn.o_proj", "ctx", ("o.out",)),
        Row("model.layers.*.post_attention_layernorm", "ffn.r", ("ffn.x",)),
        Row("model.layers.*.mlp.gate_proj", "ffn.x", ("gate.out",)),
        Row("model.layers.*.mlp.up_proj", "ffn.x", ("up.out",)),
        Row("model.layers.*.mlp.down_proj", "ffn.a", ("down.out",)),
        Row("model.norm", "final.pre", ("final",)),
        Row("lm_head", "final", ("logits",)),
    ),
    "gpt2": (
        Row("transformer.wte", None, ("embed",)),
        Row("transformer.h.*", "attn.r", ("layer.out",)),
        Row("transformer.h.*.ln_1", "attn.r", ("attn.x",)),
        Row("transformer.h.*.attn.c_attn", "attn.x", ("q.out", "k.out", "v.out")),
        Row("transformer.h.*.attn.c_proj", "ctx", ("o.out",)),
        Row("transformer.h.*.ln_2", "ffn.r", ("ffn.x",)),
        Row("transformer.h.*.mlp.c_fc", "ffn.x", ("up.out",)),
        Row("transformer.h.*.mlp.c_proj", "ffn.a", ("down.out",)),
        Row("transformer.ln_f", "final.pre", ("final",)),
        Row("lm_head", "final", ("logits",)),
    ),
}

ONCE = frozenset({"embed", "final.pre", "final", "logits"})


def build_spec(
    config: Mapping[str, Any],
    shape_of: Callable[[str], ModuleShape],
    *,
    name: str,
    digest: str,
    names: tuple[str, ...],
) -> BackboneSpec:
    """The spec of one backbone from its transformers config (common attribute names) and its modules' shapes.

    `shape_of(path)` describes the live module at `path`.
    Raises BackboneRefused where no site map exists for `config["model_type"]`.
    """
    model_type = config["model_type"]
    rows = SITE_MAPS.get(model_type)
    if rows is None:
        raise BackboneRefused(
            f"No site map for model_type {model_type!r}.",
            param="backbone",
            remedy=f"Supported: {', '.join(sorted(SITE_MAPS))}.",
        )
    num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    modules: list[ModuleSpec] = []
    for row in rows:
        for layer in range(num_layers) if "*" in row.path else (-1,):
            path = row.path.replace("*", str(layer))
            shape = shape_of(path)
            sizes = _part_sizes(row.writes, shape.d_out, num_heads * head_dim, num_kv_heads * head_dim)
            start, parts = 0, []
            for site_name, size in zip(row.writes, sizes, strict=True):
                parts.append(Slice(_site(site_name, layer), start, start + size))
                start += size
            read = None if row.read is None else _site(row.read, layer)
            modules.append(ModuleSpec(path, read, tuple(parts), shape))
    return BackboneSpec(
        name=name,
        digest=digest,
        model_type=model_type,
        names=names,
        num_layers=num_layers,
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=config["max_position_embeddings"],
        modules=tuple(modules),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
    )


def _site(name: str, layer: int) -> Site:
    return Site(name) if name in ONCE else Site(name, layer)


def _part_sizes(writes: tuple[str, ...], d_out: int, q_width: int, kv_width: int) -> list[int]:
    if writes == ("q.out", "k.out", "v.out"):
        return [q_width, kv_width, kv_width]
    return [d_out // len(writes)] * len(writes)
