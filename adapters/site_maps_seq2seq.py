"""Site maps of encoder-decoders: `enc.` and `dec.` before the usual names, `dec.cross.` for what looks at the encoder.

Keys and values of cross-attention read `enc.final`. Each stack embeds tokens through a module of its own, whose weight
is in most checkpoints the one table `shared`, a module that holds it and never runs: the table is no site. In BART and
Marian norms follow the blocks, elsewhere they precede them.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.site_rows import Config, Required, Row, SiteMap


def _stack(side: str, *, pre_norm: bool, embedding_norm: bool, final_norm: bool) -> tuple[Row, ...]:
    """One stack of BART and what is built like it; `side` is encoder or decoder."""
    name, body = side[:3], f"model.{side}"
    layer = f"{body}.layers.*"
    rows = [Row(f"{body}.embed_tokens", None, (f"{name}.embed",))]
    if embedding_norm:
        rows.append(Row(f"{body}.layernorm_embedding", f"{name}.embed.sum", (f"{name}.embed.post",)))
    rows += [
        Row(layer, f"{name}.attn.r", (f"{name}.layer.out",)),
        *_attention(f"{layer}.self_attn", f"{name}.attn", f"{name}.", pre_norm=pre_norm),
    ]
    if side == "decoder":
        rows += _attention(f"{layer}.encoder_attn", "dec.cross", "dec.cross.", pre_norm=pre_norm)
    read = f"{name}.ffn.x" if pre_norm else f"{name}.ffn.r"
    rows += [
        Row(f"{layer}.fc1", read, (f"{name}.up.out",)),
        Row(f"{layer}.fc2", f"{name}.ffn.a", (f"{name}.down.out",)),
        _norm(f"{layer}.final_layer_norm", f"{name}.ffn", pre_norm=pre_norm),
    ]
    if final_norm:
        rows.append(Row(f"{body}.layer_norm", f"{name}.final.pre", (f"{name}.final",)))
    return tuple(rows)


def _attention(path: str, block: str, prefix: str, *, pre_norm: bool) -> tuple[Row, ...]:
    read = f"{block}.x" if pre_norm else f"{block}.r"
    remembered = "enc.final" if prefix == "dec.cross." else read
    return (
        Row(f"{path}.q_proj", read, (f"{prefix}q.out",)),
        Row(f"{path}.k_proj", remembered, (f"{prefix}k.out",)),
        Row(f"{path}.v_proj", remembered, (f"{prefix}v.out",)),
        Row(f"{path}.out_proj", f"{prefix}ctx", (f"{prefix}o.out",)),
        _norm(f"{path}_layer_norm", block, pre_norm=pre_norm),
    )


def _norm(path: str, block: str, *, pre_norm: bool) -> Row:
    """A block's norm: of what it reads, or of the stream and what it adds."""
    return (
        Row(path, f"{block}.r", (f"{block}.x",))
        if pre_norm
        else Row(path, f"{block}.sum", (f"{block}.post",))
    )


def _bart_like(*, pre_norm: bool, embedding_norm: bool, final_norm: bool) -> tuple[Row, ...]:
    return (
        *(
            row
            for side in ("encoder", "decoder")
            for row in _stack(side, pre_norm=pre_norm, embedding_norm=embedding_norm, final_norm=final_norm)
        ),
        Row("lm_head", "dec.final", ("logits",)),
    )


def _t5(config: Config) -> tuple[Row, ...]:
    """T5, whose first versions have no gate, and its multilingual kin."""
    gated = config["feed_forward_proj"].startswith("gated")
    return (
        *(row for side in ("encoder", "decoder") for row in _t5_stack(side, gated=gated)),
        # where the embedding is tied, what it reads is scaled by the root of the width
        Row("lm_head", "dec.final", ("logits",)),
    )


def _t5_stack(side: str, *, gated: bool) -> tuple[Row, ...]:
    name, layer = side[:3], f"{side}.block.*.layer"
    ffn = f"{layer}.{1 if side == 'encoder' else 2}"
    first = ("wi_0", "gate.out") if gated else ("wi", "up.out")
    return (
        Row(f"{side}.embed_tokens", None, (f"{name}.embed",)),
        Row(f"{side}.block.*", f"{name}.attn.r", (f"{name}.layer.out",)),
        *_t5_attention(f"{layer}.0", "SelfAttention", f"{name}.attn", f"{name}."),
        *(
            ()
            if side == "encoder"
            else _t5_attention(f"{layer}.1", "EncDecAttention", "dec.cross", "dec.cross.")
        ),
        Row(f"{ffn}.layer_norm", f"{name}.ffn.r", (f"{name}.ffn.x",)),
        Row(f"{ffn}.DenseReluDense.{first[0]}", f"{name}.ffn.x", (f"{name}.{first[1]}",)),
        *((Row(f"{ffn}.DenseReluDense.wi_1", f"{name}.ffn.x", (f"{name}.up.out",)),) if gated else ()),
        Row(f"{ffn}.DenseReluDense.wo", f"{name}.ffn.a", (f"{name}.down.out",)),
        Row(f"{side}.final_layer_norm", f"{name}.final.pre", (f"{name}.final",)),
    )


def _t5_attention(path: str, attention: str, block: str, prefix: str) -> tuple[Row, ...]:
    remembered = "enc.final" if prefix == "dec.cross." else f"{block}.x"
    return (
        Row(f"{path}.layer_norm", f"{block}.r", (f"{block}.x",)),
        Row(f"{path}.{attention}.q", f"{block}.x", (f"{prefix}q.out",)),
        Row(f"{path}.{attention}.k", remembered, (f"{prefix}k.out",)),
        Row(f"{path}.{attention}.v", remembered, (f"{prefix}v.out",)),
        Row(f"{path}.{attention}.o", f"{prefix}ctx", (f"{prefix}o.out",)),
    )


SEQ2SEQ_MAPS: Mapping[str, SiteMap] = {
    "bart": _bart_like(pre_norm=False, embedding_norm=True, final_norm=False),
    "mbart": _bart_like(pre_norm=True, embedding_norm=True, final_norm=True),
    "marian": _bart_like(pre_norm=False, embedding_norm=False, final_norm=False),
    "pegasus": _bart_like(pre_norm=True, embedding_norm=False, final_norm=True),
    "t5": _t5,
    "mt5": _t5,
}

SEQ2SEQ_REQUIRED: Mapping[str, Mapping[str, Required]] = {
    "marian": {"share_encoder_decoder_embeddings": Required(True, "its stacks then know different tokens")}
}


def num_encoder_layers(config: Config) -> int:
    """Layers of the encoder; of any other kind of backbone 0."""
    return int(config["num_hidden_layers"]) if config["model_type"] in SEQ2SEQ_MAPS else 0


def num_decoder_layers(config: Config) -> int:
    """Layers of the stack that puts out logits or hidden states, of which most backbones have no other."""
    names = ("decoder_layers", "num_decoder_layers") if config["model_type"] in SEQ2SEQ_MAPS else ()
    return int(next((config[name] for name in names if config.get(name)), config["num_hidden_layers"]))


def head_counts(config: Config) -> set[int]:
    """The numbers of attention heads in the stacks of a backbone."""
    names = ("num_attention_heads", "decoder_attention_heads")
    return {int(config[name]) for name in names if config.get(name)}
