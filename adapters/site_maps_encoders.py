"""Site maps of encoders. Their norms follow the blocks, except ModernBERT's: `attn.r` and `ffn.r` are what blocks read.

Paths are those of the models with a head, whose body stands under its own name: adapters are saved from them. The
masked language model head comes from checkpoints that have it, and so does the pooler: both are optional. That head is
a dense layer (`mlm.r` to `mlm.out`), an activation, a norm (`mlm.a` to `mlm.x`) and the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.backbone_spec import HeadStyle, SharedRows
from adapters.site_rows import Config, Required, Row, SiteMap


def _masked_head(dense: str, norm: str, decoder: str) -> tuple[Row, ...]:
    """The masked language model head, module by module."""
    return (
        Row(dense, "mlm.r", ("mlm.out",), optional=True),
        Row(norm, "mlm.a", ("mlm.x",), optional=True),
        Row(decoder, "mlm.x", ("logits",), optional=True),
    )


def _bert(body: str, head: tuple[Row, ...], *, pooler: bool = True) -> tuple[Row, ...]:
    """BERT and what is built like it."""
    layer = f"{body}.encoder.layer.*"
    return (
        Row(f"{body}.embeddings.word_embeddings", None, ("embed",)),
        Row(f"{body}.embeddings.LayerNorm", "embed.sum", ("embed.post",)),
        Row(f"{body}.embeddings_project", "embed.post", ("embed.wide",), optional=True),
        Row(layer, "attn.r", ("layer.out",)),
        Row(f"{layer}.attention.self.query", "attn.r", ("q.out",)),
        Row(f"{layer}.attention.self.key", "attn.r", ("k.out",)),
        Row(f"{layer}.attention.self.value", "attn.r", ("v.out",)),
        Row(f"{layer}.attention.output.dense", "ctx", ("o.out",)),
        Row(f"{layer}.attention.output.LayerNorm", "attn.sum", ("attn.post",)),
        Row(f"{layer}.intermediate.dense", "ffn.r", ("up.out",)),
        Row(f"{layer}.output.dense", "ffn.a", ("down.out",)),
        Row(f"{layer}.output.LayerNorm", "ffn.sum", ("ffn.post",)),
        *((Row(f"{body}.pooler.dense", "pooled.x", ("pooled",), optional=True),) if pooler else ()),
        *head,
    )


_DEBERTA = "deberta.encoder.layer.*"
_ALBERT = "albert.encoder.albert_layer_groups.*"
_ROBERTA = _bert("roberta", _masked_head("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"))

ENCODER_MAPS: Mapping[str, SiteMap] = {
    "bert": _bert(
        "bert",
        _masked_head(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
        ),
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": _bert(
        "electra",
        _masked_head("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"),
        pooler=False,
    ),
    "distilbert": (
        Row("distilbert.embeddings.word_embeddings", None, ("embed",)),
        Row("distilbert.embeddings.LayerNorm", "embed.sum", ("embed.post",)),
        Row("distilbert.transformer.layer.*", "attn.r", ("layer.out",)),
        Row("distilbert.transformer.layer.*.attention.q_lin", "attn.r", ("q.out",)),
        Row("distilbert.transformer.layer.*.attention.k_lin", "attn.r", ("k.out",)),
        Row("distilbert.transformer.layer.*.attention.v_lin", "attn.r", ("v.out",)),
        Row("distilbert.transformer.layer.*.attention.out_lin", "ctx", ("o.out",)),
        Row("distilbert.transformer.layer.*.sa_layer_norm", "attn.sum", ("attn.post",)),
        Row("distilbert.transformer.layer.*.ffn.lin1", "ffn.r", ("up.out",)),
        Row("distilbert.transformer.layer.*.ffn.lin2", "ffn.a", ("down.out",)),
        Row("distilbert.transformer.layer.*.output_layer_norm", "ffn.sum", ("ffn.post",)),
        *_masked_head("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    ),
    "modernbert": (
        Row("model.embeddings.tok_embeddings", None, ("embed",)),
        Row("model.embeddings.norm", "embed.sum", ("embed.post",)),
        Row("model.layers.*", "attn.r", ("layer.out",)),
        # layer 0 has none: the embedding's norm is its own
        Row("model.layers.*.attn_norm", "attn.r", ("attn.x",), optional=True),
        Row("model.layers.*.attn.Wqkv", "attn.x", ("q.out", "k.out", "v.out")),
        Row("model.layers.*.attn.Wo", "ctx", ("o.out",)),
        Row("model.layers.*.mlp_norm", "ffn.r", ("ffn.x",)),
        Row("model.layers.*.mlp.Wi", "ffn.x", ("gate.out", "up.out")),
        Row("model.layers.*.mlp.Wo", "ffn.a", ("down.out",)),
        Row("model.final_norm", "final.pre", ("final",)),
        *_masked_head("head.dense", "head.norm", "decoder"),
    ),
    # Layers of a group share one module, and a delta on it acts each time that a token passes it.
    "albert": (
        Row("albert.embeddings.word_embeddings", None, ("embed",)),
        Row("albert.embeddings.LayerNorm", "embed.sum", ("embed.post",)),
        Row("albert.encoder.embedding_hidden_mapping_in", "embed.post", ("embed.wide",)),
        Row(_ALBERT, "attn.r", ("layer.out",)),
        Row(f"{_ALBERT}.attention.query", "attn.r", ("q.out",)),
        Row(f"{_ALBERT}.attention.key", "attn.r", ("k.out",)),
        Row(f"{_ALBERT}.attention.value", "attn.r", ("v.out",)),
        Row(f"{_ALBERT}.attention.dense", "ctx", ("o.out",)),
        Row(f"{_ALBERT}.attention.LayerNorm", "attn.sum", ("attn.post",)),
        Row(f"{_ALBERT}.ffn", "ffn.r", ("up.out",)),
        Row(f"{_ALBERT}.ffn_output", "ffn.a", ("down.out",)),
        Row(f"{_ALBERT}.full_layer_layer_norm", "ffn.sum", ("ffn.post",)),
        Row("albert.pooler", "pooled.x", ("pooled",), optional=True),
        *_masked_head("predictions.dense", "predictions.LayerNorm", "predictions.decoder"),
    ),
    # `rel` are the relative embeddings that all rows share; queries and keys of them are made by modules of their own,
    # or with `share_att_key` by those of the tokens (`BackboneSpec.shared`).
    "deberta-v2": (
        Row("deberta.embeddings.word_embeddings", None, ("embed",)),
        Row("deberta.embeddings.embed_proj", "embed.narrow", ("embed.sum",), optional=True),
        Row("deberta.embeddings.LayerNorm", "embed.sum", ("embed.post",)),
        Row("deberta.encoder.LayerNorm", "rel", ("rel.post",), optional=True),
        Row(_DEBERTA, "attn.r", ("layer.out",)),
        Row(f"{_DEBERTA}.attention.self.query_proj", "attn.r", ("q.out",)),
        Row(f"{_DEBERTA}.attention.self.key_proj", "attn.r", ("k.out",)),
        Row(f"{_DEBERTA}.attention.self.value_proj", "attn.r", ("v.out",)),
        Row(f"{_DEBERTA}.attention.self.pos_key_proj", "rel.x", ("rel.k.out",), optional=True),
        Row(f"{_DEBERTA}.attention.self.pos_query_proj", "rel.x", ("rel.q.out",), optional=True),
        Row(f"{_DEBERTA}.attention.output.dense", "ctx", ("o.out",)),
        Row(f"{_DEBERTA}.attention.output.LayerNorm", "attn.sum", ("attn.post",)),
        Row(f"{_DEBERTA}.intermediate.dense", "ffn.r", ("up.out",)),
        Row(f"{_DEBERTA}.output.dense", "ffn.a", ("down.out",)),
        Row(f"{_DEBERTA}.output.LayerNorm", "ffn.sum", ("ffn.post",)),
        # xlarge has a convolution beside its first layer; the convolution itself is no site
        Row("deberta.encoder.conv.LayerNorm", "conv.sum", ("conv.post",), optional=True),
        *_masked_head(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
        ),
    ),
}

ENCODER_REQUIRED: Mapping[str, Mapping[str, Required]] = {
    name: {"is_decoder": Required(False, "it is served as an encoder")}
    for name in ("bert", "roberta", "xlm-roberta", "electra")
} | {"albert": {"inner_group_num": Required(1, "each layer is then one module of its group")}}


def layer_names(config: Config, num_layers: int) -> list[str]:
    """What stands for `*` in the paths of each layer that has modules of its own: ALBERT's groups share theirs."""
    if config["model_type"] == "albert":
        return [f"{group}.albert_layers.0" for group in range(config["num_hidden_groups"])]
    return [str(layer) for layer in range(num_layers)]


def first_position(config: Config) -> int:
    """The position id of a row's first token: RoBERTa counts from behind its padding index."""
    return config["pad_token_id"] + 1 if config["model_type"] in ("roberta", "xlm-roberta") else 0


def shared_rows(config: Config) -> SharedRows | None:
    """DeBERTa's relative embeddings: as many on each side as there are buckets, else distances.

    Source: transformers 5 `DebertaV2Encoder`, `DisentangledSelfAttention`, which read the same keys.
    """
    if config["model_type"] != "deberta-v2" or not config.get("relative_attention"):
        return None
    distances = config.get("max_relative_positions", -1)
    buckets = config.get("position_buckets", -1)
    if distances < 1:
        distances = config["max_position_embeddings"]
    own = ("rel.post", "rel.k.out", "rel.q.out")
    return SharedRows(
        2 * (buckets if buckets > 0 else distances),
        (*own, "q.out", "k.out") if config.get("share_att_key") else own,
    )


def head_style(config: Config, *, is_own: bool) -> HeadStyle | None:
    """The dense layer of task heads, None where all models of the architecture have the same. `is_own`: see there.

    Source: transformers 5 `ContextPooler` of DeBERTa-v2, `ModernBertPredictionHead`.
    """
    match config["model_type"]:
        case "deberta-v2":
            return HeadStyle("cls", config["pooler_hidden_act"])
        case "modernbert":
            return HeadStyle(
                config["classifier_pooling"],
                config["classifier_activation"],
                has_bias=config["classifier_bias"],
                norm_eps=config["norm_eps"],
                has_norm_bias=config["norm_bias"],
                is_own=is_own,
            )
    return None
