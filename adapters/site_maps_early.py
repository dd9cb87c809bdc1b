"""Site maps of the early decoders, all below `transformer.`; their transformers code computes attention itself.

A projection of q, k and v at once is the one site `qkv.out`, whatever the order of its columns (by head in BLOOM, by
group in Falcon, by part in CodeGen): so every method that is trained on the module runs on it, and what names q, k or v
apart is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.site_rows import Config, Required, Row, SiteMap

_END = (
    Row("transformer.ln_f", "final.pre", ("final",)),
    Row("lm_head", "final", ("logits",)),
)
_START = (
    Row("transformer.wte", None, ("embed",)),
    Row("transformer.h.*", "attn.r", ("layer.out",)),
    Row("transformer.h.*.ln_1", "attn.r", ("attn.x",)),
)
_WORD_START = (
    Row("transformer.word_embeddings", None, ("embed",)),
    Row("transformer.h.*", "attn.r", ("layer.out",)),
)

# One norm for attention and feed-forward block, which run side by side: there is no ffn.r.
_ONE_NORM_FFN = (
    Row("transformer.h.*.mlp.fc_in", "attn.x", ("up.out",)),
    Row("transformer.h.*.mlp.fc_out", "ffn.a", ("down.out",)),
)


def _falcon(config: Config) -> tuple[Row, ...]:
    """Three decoders: two norms side by side (40B, 180B), one for both (7B, 11B), or one after the other (RW)."""
    new, ffn_x = config["new_decoder_architecture"], "ffn.x"
    norms: tuple[Row, ...]
    if new and config["num_ln_in_parallel_attn"] != 1:
        norms = (
            Row("transformer.h.*.ln_attn", "attn.r", ("attn.x",)),
            Row("transformer.h.*.ln_mlp", "ffn.r", ("ffn.x",)),
        )
    elif new or config["parallel_attn"]:
        norms, ffn_x = (Row("transformer.h.*.input_layernorm", "attn.r", ("attn.x",)),), "attn.x"
    else:
        norms = (
            Row("transformer.h.*.input_layernorm", "attn.r", ("attn.x",)),
            Row("transformer.h.*.post_attention_layernorm", "ffn.r", ("ffn.x",)),
        )
    return (
        *_WORD_START,
        *norms,
        Row("transformer.h.*.self_attention.query_key_value", "attn.x", ("qkv.out",)),
        Row("transformer.h.*.self_attention.dense", "ctx", ("o.out",)),
        Row("transformer.h.*.mlp.dense_h_to_4h", ffn_x, ("up.out",)),
        Row("transformer.h.*.mlp.dense_4h_to_h", "ffn.a", ("down.out",)),
        *_END,
    )


def falcon_kv_heads(config: Config) -> int:
    """Key heads of a cache entry: the new decoder repeats the keys of a group for each of its heads before caching."""
    one = config["multi_query"] and not config["new_decoder_architecture"]
    return 1 if one else int(config["num_attention_heads"])


EARLY_MAPS: Mapping[str, SiteMap] = {
    "falcon": _falcon,
    "bloom": (
        *_WORD_START,
        Row("transformer.h.*.input_layernorm", "attn.r", ("attn.x",)),
        Row("transformer.h.*.self_attention.query_key_value", "attn.x", ("qkv.out",)),
        Row("transformer.h.*.self_attention.dense", "ctx", ("o.out",)),
        Row("transformer.h.*.post_attention_layernorm", "ffn.r", ("ffn.x",)),
        Row("transformer.h.*.mlp.dense_h_to_4h", "ffn.x", ("up.out",)),
        Row("transformer.h.*.mlp.dense_4h_to_h", "ffn.a", ("down.out",)),
        *_END,
    ),
    "gptj": (
        *_START,
        Row("transformer.h.*.attn.q_proj", "attn.x", ("q.out",)),
        Row("transformer.h.*.attn.k_proj", "attn.x", ("k.out",)),
        Row("transformer.h.*.attn.v_proj", "attn.x", ("v.out",)),
        Row("transformer.h.*.attn.out_proj", "ctx", ("o.out",)),
        *_ONE_NORM_FFN,
        *_END,
    ),
    "codegen": (
        *_START,
        Row("transformer.h.*.attn.qkv_proj", "attn.x", ("qkv.out",)),
        Row("transformer.h.*.attn.out_proj", "ctx", ("o.out",)),
        *_ONE_NORM_FFN,
        *_END,
    ),
    "gpt_neo": (
        *_START,
        Row("transformer.h.*.attn.attention.q_proj", "attn.x", ("q.out",)),
        Row("transformer.h.*.attn.attention.k_proj", "attn.x", ("k.out",)),
        Row("transformer.h.*.attn.attention.v_proj", "attn.x", ("v.out",)),
        Row("transformer.h.*.attn.attention.out_proj", "ctx", ("o.out",)),
        Row("transformer.h.*.ln_2", "ffn.r", ("ffn.x",)),
        Row("transformer.h.*.mlp.c_fc", "ffn.x", ("up.out",)),
        Row("transformer.h.*.mlp.c_proj", "ffn.a", ("down.out",)),
        *_END,
    ),
    "mpt": (
        Row("transformer.wte", None, ("embed",)),
        Row("transformer.blocks.*", "attn.r", ("layer.out",)),
        Row("transformer.blocks.*.norm_1", "attn.r", ("attn.x",)),
        Row("transformer.blocks.*.attn.Wqkv", "attn.x", ("qkv.out",)),
        Row("transformer.blocks.*.attn.out_proj", "ctx", ("o.out",)),
        Row("transformer.blocks.*.norm_2", "ffn.r", ("ffn.x",)),
        Row("transformer.blocks.*.ffn.up_proj", "ffn.x", ("up.out",)),
        Row("transformer.blocks.*.ffn.down_proj", "ffn.a", ("down.out",)),
        Row("transformer.norm_f", "final.pre", ("final",)),
        Row("lm_head", "final", ("logits",)),
    ),
}

EARLY_REQUIRED: Mapping[str, Mapping[str, Required]] = {
    "bloom": {
        "slow_but_exact": Required(False, "its projections then pass their modules by"),
        "apply_residual_connection_post_layernorm": Required(
            False, "its residual stream is then a normed one"
        ),
    },
    "falcon": {
        "alibi": Required(False, "transformers' eager attention then adds the biases twice, its SDPA once"),
    },
}
