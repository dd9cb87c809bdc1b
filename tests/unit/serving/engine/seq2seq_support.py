"""Tiny encoder-decoders, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    MarianConfig,
    MBartConfig,
    PegasusConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from serving.model.backbone import Backbone, adopt_backbone

_BART: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,  # transformers 5.23 sizes generate's cache by the encoder: no more layers can be tested
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

CONFIGS: Mapping[str, PreTrainedConfig] = {
    "bart": BartConfig(**_BART),
    "mbart": MBartConfig(**_BART, scale_embedding=True),
    "marian": MarianConfig(**_BART),
    "pegasus": PegasusConfig(**_BART),
    "t5": T5Config(**_T5),
    "t5_gated": T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
"""One of each kind; its stacks differ in depth and, where it can, in width."""

RULES: Mapping[str, dict[str, Any]] = {
    "bart": {"no_repeat_ngram_size": 3, "min_length": 5},
    "marian": {"no_repeat_ngram_size": 2, "bad_words_ids": [[23], [71, 60]], "renormalize_logits": True},
    "pegasus": {
        "no_repeat_ngram_size": 2,
        "min_length": 9,
        "forced_bos_token_id": 7,
        "suppress_tokens": [19],
    },
    "t5": {"repetition_penalty": 1.7, "begin_suppress_tokens": [5, 9]},
}
"""What generation configs of published models ask for."""


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model; equal seeds give equal weights. Biases and norms are random too: a lost one shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(CONFIGS[name], attn_implementation="eager")
    draw = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:  # Marian's and Pegasus' positions are sines
            around = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            loud = "embed_positions" in path or (name == "bart" and "encoder_attn.v_proj" in path)
            sigma = 1.2 if loud else 0.3  # a tied head would repeat what it reads
            parameter.data = around + sigma * torch.randn(parameter.shape, generator=draw)
    if (bias := getattr(model, "final_logits_bias", None)) is not None:
        bias.copy_(0.3 * torch.randn(bias.shape, generator=draw))
    model.tie_weights()
    model.generation_config.update(**RULES.get(name, {}))
    return model.eval()


def one_character_a_token() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the 97 tokens of the tiny models."""
    tokenizer = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(97)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_seq2seq(name: str, model: PreTrainedModel | None = None) -> Backbone:
    """That model, or another, as a backbone with that tokenizer."""
    made = tiny_model(name) if model is None else model
    return adopt_backbone(made, name=name, tokenizer=one_character_a_token(), device="cpu", dtype="float32")


def prompts(count: int) -> list[list[int]]:
    """Ragged prompts, the longest of 30 tokens."""
    draw = torch.Generator().manual_seed(3)
    lengths = [1 + (7 * i) % 30 for i in range(count)]
    return [torch.randint(3, 97, (n,), generator=draw).tolist() for n in lengths]


@torch.inference_mode()
def generated(model: Any, prompt: Sequence[int], max_tokens: int = 12, **options: Any) -> list[int]:
    """The tokens that transformers' `generate` adds after the decoder's first, greedily and alone."""
    out = model.generate(
        input_ids=torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        **options,
    )
    found: list[int] = out[0, 1:].tolist()
    return found
