"""Site maps: which module of an architecture reads and writes which site. A new architecture is a row here.

`*` in a path is the layer index; the token embedding comes first. A module with several writes is fused: its output
columns are, in this order, q, k, v (sizes from the head counts) or equal parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from adapters.backbone_spec import BackboneKind, BackboneSpec, ModuleShape, ModuleSpec, Slice
from adapters.errors import BackboneRefused
from adapters.normal_form import Site
from adapters.site_maps_early import EARLY_MAPS, EARLY_REQUIRED, falcon_kv_heads
from adapters.site_maps_encoders import ENCODER_MAPS, ENCODER_REQUIRED, first_position
from adapters.site_maps_seq2seq import (
    SEQ2SEQ_MAPS,
    SEQ2SEQ_REQUIRED,
    head_counts,
    num_decoder_layers,
    num_encoder_layers,
)
from adapters.site_rows import Config, Required, Row, SiteMap

# Rows that many architectures share.
_START = (
    Row("model.embed_tokens", None, ("embed",)),
    Row("model.layers.*", "attn.r", ("layer.out",)),
    Row("model.layers.*.input_layernorm", "attn.r", ("attn.x",)),
)
_ATTENTION = (
    Row("model.layers.*.self_attn.q_proj", "attn.x", ("q.out",)),
    Row("model.layers.*.self_attn.k_proj", "attn.x", ("k.out",)),
    Row("model.layers.*.self_attn.v_proj", "attn.x", ("v.out",)),
    Row("model.layers.*.self_attn.o_proj", "ctx", ("o.out",)),
)
_FFN_NORM = (Row("model.layers.*.post_attention_layernorm", "ffn.r", ("ffn.x",)),)
_GATED_FFN = (
    Row("model.layers.*.mlp.gate_proj", "ffn.x", ("gate.out",)),
    Row("model.layers.*.mlp.up_proj", "ffn.x", ("up.out",)),
    Row("model.layers.*.mlp.down_proj", "ffn.a", ("down.out",)),
)
_END = (
    Row("model.norm", "final.pre", ("final",)),
    Row("lm_head", "final", ("logits",)),
)

_LLAMA = (*_START, *_ATTENTION, *_FFN_NORM, *_GATED_FFN, *_END)

# A token passes only some experts, in modules of their own: their projections are no sites.
_EXPERTS = (*_START, *_ATTENTION, *_FFN_NORM, *_END)

# Norms before and after each block: the block's normed output is what joins the residual stream.
_FOUR_NORMS = (
    *_START,
    *_ATTENTION,
    Row("model.layers.*.post_attention_layernorm", "o.out", ("attn.post",)),
    Row("model.layers.*.pre_feedforward_layernorm", "ffn.r", ("ffn.x",)),
    *_GATED_FFN,
    Row("model.layers.*.post_feedforward_layernorm", "down.out", ("ffn.post",)),
    *_END,
)

SITE_MAPS: Mapping[str, SiteMap] = {
    **EARLY_MAPS,
    **ENCODER_MAPS,
    **SEQ2SEQ_MAPS,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _FOUR_NORMS,
    "gemma3_text": _FOUR_NORMS,
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "starcoder2": (
        *_START,
        *_ATTENTION,
        *_FFN_NORM,
        Row("model.layers.*.mlp.c_fc", "ffn.x", ("up.out",)),
        Row("model.layers.*.mlp.c_proj", "ffn.a", ("down.out",)),
        *_END,
    ),
    "phi3": (
        *_START,
        Row("model.layers.*.self_attn.qkv_proj", "attn.x", ("q.out", "k.out", "v.out")),
        Row("model.layers.*.self_attn.o_proj", "ctx", ("o.out",)),
        *_FFN_NORM,
        Row("model.layers.*.mlp.gate_up_proj", "ffn.x", ("gate.out", "up.out")),
        Row("model.layers.*.mlp.down_proj", "ffn.a", ("down.out",)),
        *_END,
    ),
    "gpt2": (
        Row("transformer.wte", None, ("embed",)),
        Row("transformer.drop", "embed.sum", ("embed.post",)),
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
    "gpt_neox": (
        Row("gpt_neox.embed_in", None, ("embed",)),
        Row("gpt_neox.layers.*", "attn.r", ("layer.out",)),
        Row("gpt_neox.layers.*.input_layernorm", "attn.r", ("attn.x",)),
        # q, k and v alternate head by head: one site, since no method trained here addresses them apart
        Row("gpt_neox.layers.*.attention.query_key_value", "attn.x", ("qkv.out",)),
        Row("gpt_neox.layers.*.attention.dense", "ctx", ("o.out",)),
        # with use_parallel_residual ffn.r is attn.r
        Row("gpt_neox.layers.*.post_attention_layernorm", "ffn.r", ("ffn.x",)),
        Row("gpt_neox.layers.*.mlp.dense_h_to_4h", "ffn.x", ("up.out",)),
        Row("gpt_neox.layers.*.mlp.dense_4h_to_h", "ffn.a", ("down.out",)),
        Row("gpt_neox.final_layer_norm", "final.pre", ("final",)),
        Row("lm_head", "final", ("logits",)),
    ),
    "opt": (
        Row("model.decoder.embed_tokens", None, ("embed",)),
        Row("model.decoder.layers.*", "attn.r", ("layer.out",)),
        Row("model.decoder.layers.*.self_attn_layer_norm", "attn.r", ("attn.x",)),
        Row("model.decoder.layers.*.self_attn.q_proj", "attn.x", ("q.out",)),
        Row("model.decoder.layers.*.self_attn.k_proj", "attn.x", ("k.out",)),
        Row("model.decoder.layers.*.self_attn.v_proj", "attn.x", ("v.out",)),
        Row("model.decoder.layers.*.self_attn.out_proj", "ctx", ("o.out",)),
        Row("model.decoder.layers.*.final_layer_norm", "ffn.r", ("ffn.x",)),
        Row("model.decoder.layers.*.fc1", "ffn.x", ("up.out",)),
        Row("model.decoder.layers.*.fc2", "ffn.a", ("down.out",)),
        Row("model.decoder.final_layer_norm", "final.pre", ("final",)),
        Row("lm_head", "final", ("logits",)),
    ),
}

REQUIRED: Mapping[str, Mapping[str, Required]] = {
    **EARLY_REQUIRED,
    **ENCODER_REQUIRED,
    **SEQ2SEQ_REQUIRED,
    "opt": {"do_layer_norm_before": Required(True, "its norms then follow the blocks")},
}
"""Config values that a map is written for."""

KV_HEADS: Mapping[str, Callable[[Config], int]] = {"falcon": falcon_kv_heads}
"""Key heads of a cache entry where `num_key_value_heads` does not say it."""

POSITIONS = ("max_position_embeddings", "max_seq_len", "seq_length")
"""Names of the number of positions, in this order; the last is BLOOM's, in checkpoints that say it."""

UNBOUNDED_POSITIONS = 2048
"""Where no config value bounds the positions (ALiBi, T5's relative ones): what BLOOM was trained on."""

COMMON_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
"""Attributes that transformers configs have under these names, whatever the architecture's own spelling."""

ONCE = frozenset(
    {
        "embed",
        "embed.sum",
        "embed.post",
        "embed.wide",
        "final.pre",
        "final",
        "logits",
        "mlm.x",
        "pooled.x",
        "pooled",
    }
)


def build_spec(
    config: Config,
    shape_of: Callable[[str], ModuleShape | None],
    *,
    name: str,
    digest: str,
    names: tuple[str, ...],
) -> BackboneSpec:
    """The spec of one backbone from its transformers config and its modules' shapes.

    `config` has `COMMON_NAMES` beside the architecture's own keys. `shape_of(path)` describes the live module at
    `path`, None where there is none. Raises BackboneRefused where no site map fits.
    """
    model_type = config["model_type"]
    rows = SITE_MAPS.get(model_type)
    if rows is None:
        raise BackboneRefused(
            f"No site map for model_type {model_type!r}.",
            param="backbone",
            remedy=f"Supported: {', '.join(sorted(SITE_MAPS))}.",
        )
    _check_config(config, model_type)
    num_layers, encoder_layers = num_decoder_layers(config), num_encoder_layers(config)
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config.get("d_kv") or config["hidden_size"] // num_heads
    num_kv_heads = KV_HEADS.get(model_type, _kv_heads)(config)
    modules: list[ModuleSpec] = []
    kind = _kind(model_type)
    for row in rows if isinstance(rows, tuple) else rows(config):
        layers = encoder_layers if Site(row.writes[0]).stack == "enc" else num_layers
        for layer in range(layers) if "*" in row.path else (-1,):
            path = row.path.replace("*", str(layer))
            shape = shape_of(path)
            if shape is None and row.optional:
                continue
            if shape is None:
                raise BackboneRefused(
                    f"The backbone has no module {path!r}, which its site map names.",
                    param="backbone",
                    remedy="This variant of the architecture is not served yet.",
                )
            sizes = _part_sizes(row.writes, shape.d_out, num_heads * head_dim, num_kv_heads * head_dim)
            start, parts = 0, []
            for site_name, size in zip(row.writes, sizes, strict=True):
                parts.append(Slice(_site(site_name, layer), start, start + size))
                start += size
            read = None if row.read is None else _site(row.read, layer)
            modules.append(ModuleSpec(path, read, tuple(parts), shape))
    embed = modules[0].shape
    if embed.d_out != config["hidden_size"] and kind != "encoder":
        raise BackboneRefused(
            f"{model_type} with token embeddings of width {embed.d_out} in a model of width {config['hidden_size']} is "
            "not served.",
            param="backbone",
        )
    return BackboneSpec(
        name=name,
        digest=digest,
        model_type=model_type,
        names=names,
        num_layers=num_layers,
        num_encoder_layers=encoder_layers,
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=_max_positions(config) - first_position(config),
        modules=tuple(modules),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        kind=kind,
        first_position=first_position(config),
    )


def _kind(model_type: str) -> BackboneKind:
    if model_type in SEQ2SEQ_MAPS:
        return "encoder-decoder"
    return "encoder" if model_type in ENCODER_MAPS else "decoder"


def _kv_heads(config: Config) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _check_config(config: Config, model_type: str) -> None:
    for key, needed in REQUIRED.get(model_type, {}).items():
        if config.get(key) != needed.value:
            raise BackboneRefused(
                f"{model_type} with {key}={config.get(key)!r} is not served, only with {needed.value!r}: {needed.why}.",
                param="backbone",
            )
    if len(counts := head_counts(config)) > 1:
        raise BackboneRefused(
            f"{model_type} whose stacks have {' and '.join(map(str, sorted(counts)))} attention heads is not served.",
            param="backbone",
        )


def _max_positions(config: Config) -> int:
    """Positions up to which a row's numbers are its own.

    Beyond its original range, rope of type longrope (and of type dynamic, whose original range is the whole one)
    chooses the frequencies of the whole batch by the batch's longest row.
    """
    rope = config.get("rope_parameters") or {}
    by_layer_type = (nested for nested in rope.values() if isinstance(nested, Mapping))
    limits: list[int] = [
        parameters["original_max_position_embeddings"]
        for parameters in (rope, *by_layer_type)
        if parameters.get("rope_type") == "longrope"
    ]
    bound = next((config[name] for name in POSITIONS if config.get(name)), UNBOUNDED_POSITIONS)
    return int(min([bound, *limits]))


def _site(name: str, layer: int) -> Site:
    return Site(name) if Site(name).local in ONCE else Site(name, layer)


def _part_sizes(writes: tuple[str, ...], d_out: int, q_width: int, kv_width: int) -> list[int]:
    if writes == ("q.out", "k.out", "v.out"):
        return [q_width, kv_width, kv_width]
    return [d_out // len(writes)] * len(writes)
