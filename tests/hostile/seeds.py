"""Valid uploads to start from: two of PEFT's methods, and the canonical pair."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save

from adapters.canonical import to_canonical
from tests.unit.serving.http_support import WIDTH, lora

PREFIX = "base_model.model.model.layers.0"
COMMON = {"base_model_name_or_path": "tiny", "task_type": "CAUSAL_LM", "inference_mode": True}


@dataclass(frozen=True)
class Seed:
    """One valid upload. `config` and `tensors` are the names of its two files."""

    name: str
    config: str
    tensors: str
    files: Mapping[str, bytes]


def _peft(name: str, config: Mapping[str, object], tensors: Mapping[str, torch.Tensor]) -> Seed:
    names = ("adapter_config.json", "adapter_model.safetensors")
    contents = (json.dumps({**COMMON, **config}).encode(), save(dict(tensors), metadata={"format": "pt"}))
    return Seed(name, *names, dict(zip(names, contents, strict=True)))


def seeds() -> list[Seed]:
    """LoRA, IA3 and a canonical LoRA for `http_support.SPEC`, with random values."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    pairs = {"self_attn.q_proj": ("lora_A", "lora_B"), "mlp.down_proj": ("lora_A", "lora_B")}
    adapters = {
        f"{PREFIX}.{module}.{part}.weight": random(2, WIDTH) if part == "lora_A" else random(WIDTH, 2)
        for module, parts in pairs.items()
        for part in parts
    }
    canonical = to_canonical(lora())
    return [
        _peft(
            "lora",
            {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
            adapters,
        ),
        _peft(
            "ia3",
            {
                "peft_type": "IA3",
                "target_modules": ["k_proj", "down_proj"],
                "feedforward_modules": ["down_proj"],
            },
            {
                f"{PREFIX}.self_attn.k_proj.ia3_l": random(WIDTH, 1),
                f"{PREFIX}.mlp.down_proj.ia3_l": random(1, WIDTH),
            },
        ),
        Seed(
            "canonical",
            "manifest.json",
            "tensors.safetensors",
            {"manifest.json": canonical.manifest, "tensors.safetensors": canonical.tensors},
        ),
    ]
