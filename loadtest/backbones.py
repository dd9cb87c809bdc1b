"""Randomly initialised Llama-style backbones and LoRAs for benchmarks; the numbers mean nothing, the sizes do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from loadtest.deltas import RANKS
from loadtest.workload import VOCAB_SIZE
from serving.model.backbone import Backbone, adopt_backbone

SIZES: Mapping[str, Mapping[str, int]] = {
    "2m": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2},
    "60m": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8, "num_attention_heads": 10,
            "num_key_value_heads": 5},
    "160m": {"hidden_size": 896, "intermediate_size": 2432, "num_hidden_layers": 16, "num_attention_heads": 14,
             "num_key_value_heads": 7},
}  # fmt: skip

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def random_llama(size: str, dtype: torch.dtype) -> Any:
    """A seeded Llama of about `size` parameters with 16,000 tokens of vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, **SIZES[size]
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def random_backbone(size: str, dtype: str) -> Backbone:
    """`random_llama`, served on CPU."""
    return adopt_backbone(random_llama(size, getattr(torch, dtype)), name=size, device="cpu", dtype=dtype)


def name_of(index: int) -> str:
    """Name of a LoRA. Not a bare number: PEFT cuts the name out of keys, and layer indices are numbers."""
    return f"lora{index}"


def random_loras(model: Any, count: int) -> PeftModel:
    """`model` with LoRAs `name_of(0)`, ... of ranks 8, 16, 32, 64 in turn on q, k, v, o; every tensor is random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for index in range(count):
            rank = RANKS[index % len(RANKS)]
            config = LoraConfig(
                r=rank,
                lora_alpha=rank,
                target_modules=list(TARGETS),
                init_lora_weights=False,
                task_type="CAUSAL_LM",
            )
            torch.manual_seed(index + 1)
            if index == 0:
                model = get_peft_model(model, config, adapter_name=name_of(0))
            else:
                model.add_adapter(name_of(index), config)
    return model.eval()
