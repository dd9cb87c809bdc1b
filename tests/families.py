"""Backbone families: one tiny config each, with every option on that could go wrong.

Windows are shorter than the prompts of the contract tests and than the rows of the parity probe, and head widths
differ from hidden_size / heads wherever the family allows it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import (
    BartConfig,
    BertConfig,
    BloomConfig,
    CodeGenConfig,
    DistilBertConfig,
    ElectraConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MarianConfig,
    MBartConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    MptConfig,
    MT5Config,
    OPTConfig,
    PegasusConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    Starcoder2Config,
    T5Config,
)

Family = Literal[
    "llama",
    "gpt2",
    "qwen2",
    "mistral",
    "qwen3",
    "gemma",
    "starcoder2",
    "phi3",
    "opt",
    "mixtral",
    "qwen3_moe",
    "gpt_neox",
    "gemma2",
    "gemma3_text",
    "bloom",
    "falcon",
    "falcon_mq",
    "gptj",
    "gpt_neo",
    "codegen",
    "mpt",
]
FAMILIES: tuple[Family, ...] = get_args(Family)

Encoder = Literal["bert", "roberta", "electra", "distilbert", "modernbert"]
ENCODERS: tuple[Encoder, ...] = get_args(Encoder)

Seq2Seq = Literal["bart", "mbart", "marian", "pegasus", "t5", "mt5"]
SEQ2SEQ: tuple[Seq2Seq, ...] = get_args(Seq2Seq)

AnyFamily = Family | Encoder | Seq2Seq

PADDED: frozenset[Family] = frozenset({"bloom", "falcon", "falcon_mq", "gptj", "gpt_neo", "codegen", "mpt"})
"""Families whose own code attends."""

_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED: dict[str, Any] = {**_TINY, "intermediate_size": 64, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {**_GATED, "num_experts_per_tok": 2}
_GPT: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 97,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}

# stacks of different depth and width wherever the family allows it
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 48,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 4,
    "vocab_size": 97,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

CONFIGS: dict[AnyFamily, PreTrainedConfig] = {
    "bart": BartConfig(**_BART),
    "mbart": MBartConfig(**{**_BART, "decoder_layers": 4}, scale_embedding=True),
    "marian": MarianConfig(**_BART),
    "pegasus": PegasusConfig(**{**_BART, "decoder_layers": 3}, scale_embedding=True),
    "t5": T5Config(**_T5, d_kv=8),
    "mt5": MT5Config(**_T5, d_kv=12, num_decoder_layers=2, feed_forward_proj="gated-gelu"),
    "bert": BertConfig(**_ENCODER),
    "roberta": RobertaConfig(**_ENCODER, pad_token_id=1),
    "electra": ElectraConfig(**_ENCODER, embedding_size=16),
    "distilbert": DistilBertConfig(
        dim=32, n_layers=3, n_heads=4, hidden_dim=64, vocab_size=97, max_position_embeddings=128
    ),
    "modernbert": ModernBertConfig(
        **_ENCODER,
        local_attention=6,
        global_attn_every_n_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "llama": LlamaConfig(**{**_GATED, "pad_token_id": None}),
    "gpt2": GPT2Config(**_GPT),
    "qwen2": Qwen2Config(**_GATED, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "mistral": MistralConfig(**_GATED, sliding_window=7),
    "qwen3": Qwen3Config(
        **_GATED, head_dim=16, use_sliding_window=True, sliding_window=7, max_window_layers=2
    ),
    "gemma": GemmaConfig(**{**_GATED, "num_key_value_heads": 1, "tie_word_embeddings": True}, head_dim=16),
    "starcoder2": Starcoder2Config(**_GATED, sliding_window=7),
    "phi3": Phi3Config(
        **_GATED,
        sliding_window=7,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.3],
            "long_factor": [2.0, 4.0],
        },
    ),
    "opt": OPTConfig(**_TINY, ffn_dim=64, word_embed_proj_dim=32),
    "mixtral": MixtralConfig(**_EXPERTS, num_local_experts=4, sliding_window=7),
    "qwen3_moe": Qwen3MoeConfig(
        **_EXPERTS,
        num_experts=4,
        moe_intermediate_size=24,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=7,
    ),
    "gpt_neox": GPTNeoXConfig(**_TINY, intermediate_size=64, use_parallel_residual=True),
    "gemma2": Gemma2Config(
        **_GATED,
        head_dim=16,
        query_pre_attn_scalar=12,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3_text": Gemma3TextConfig(
        **_GATED,
        head_dim=16,
        query_pre_attn_scalar=12,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "bloom": BloomConfig(**{**_TINY, "tie_word_embeddings": True}),
    "falcon": FalconConfig(
        **{**_TINY, "num_attention_heads": 8},
        new_decoder_architecture=True,
        num_kv_heads=2,
        bias=True,
        ffn_hidden_size=64,
    ),
    "falcon_mq": FalconConfig(**{**_TINY, "tie_word_embeddings": True}),
    "gptj": GPTJConfig(**_GPT, rotary_dim=4),
    "gpt_neo": GPTNeoConfig(
        **_TINY,
        attention_types=[[["global", "local"], 1], [["local"], 1]],
        window_size=7,
        intermediate_size=64,
    ),
    "codegen": CodeGenConfig(**{**_GPT, "n_head": 8}, rotary_dim=2),
    "mpt": MptConfig(
        d_model=32,
        n_heads=4,
        n_layers=3,
        vocab_size=97,
        max_seq_len=256,
        attn_config={"clip_qkv": 2.0},
        eos_token_id=2,
    ),
}
