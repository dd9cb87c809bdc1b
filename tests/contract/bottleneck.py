"""Bottleneck adapters by formula, on the stock transformers model, in any dtype: the oracle for AdapterHub placements.

Written from the formulas of `tests/golden/README.md`, independent of the readers and of the engine. The adapters are
stored as AdapterHub directories, so that the reader is part of what is tested.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.cases import GOLDEN
from tests.families import Family

Placement = Literal["seq_bn", "double_seq_bn", "par_bn"]

_LLAMA = {
    "layer": "model.layers.{}",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn": "mlp",
}
PATHS: dict[Family, dict[str, str]] = {
    **dict.fromkeys(("llama", "qwen2", "mistral", "qwen3", "gemma", "starcoder2", "phi3"), _LLAMA),
    **dict.fromkeys(
        ("mixtral", "qwen3_moe", "gemma2", "gemma3_text"), _LLAMA
    ),  # only placements at the layer
    "gpt2": {"layer": "transformer.h.{}", "o": "attn.c_proj", "ffn_norm": "ln_2", "ffn": "mlp"},
    "opt": {
        "layer": "model.decoder.layers.{}",
        "o": "self_attn.out_proj",
        "ffn_norm": "final_layer_norm",
        "ffn": "fc2",
    },
    "gpt_neox": {
        "layer": "gpt_neox.layers.{}",
        "o": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn": "mlp",
    },
    "bloom": {
        "layer": "transformer.h.{}",
        "o": "self_attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn": "mlp.dense_4h_to_h",  # the block returns it with the residual stream
    },
    "falcon": {
        "layer": "transformer.h.{}",
        "o": "self_attention.dense",
        "ffn_norm": "ln_mlp",
        "ffn": "mlp",
    },
    "falcon_mq": {"layer": "transformer.h.{}", "o": "self_attention.dense", "ffn": "mlp"},
    "gptj": {"layer": "transformer.h.{}", "o": "attn.out_proj", "ffn": "mlp"},
    "codegen": {"layer": "transformer.h.{}", "o": "attn.out_proj", "ffn": "mlp"},
    "gpt_neo": {
        "layer": "transformer.h.{}",
        "o": "attn.attention.out_proj",
        "ffn_norm": "ln_2",
        "ffn": "mlp",
    },
    "mpt": {
        "layer": "transformer.blocks.{}",
        "o": "attn.out_proj",
        "ffn_norm": "norm_2",
        "ffn": "ffn.down_proj",  # the block returns it with the residual stream
    },
}
LAYER_ONLY: frozenset[Family] = frozenset({"mixtral", "qwen3_moe", "gemma2", "gemma3_text"})
"""Families without a site for a feed-forward block's output, or with a norm after it: seq_bn only."""

ONE_NORM: frozenset[Family] = frozenset({"falcon_mq", "gptj", "codegen"})
"""Families whose feed-forward block has no norm of its own, at whose input a parallel adapter would read."""


def refused_placements(family: Family) -> tuple[Placement, ...]:
    """Where `family` has no exact place for an adapter."""
    if family in LAYER_ONLY:
        return ("double_seq_bn", "par_bn")
    return ("par_bn",) if family in ONE_NORM else ()


PLACES = {"seq_bn": ("output_adapters",), "double_seq_bn": ("attention_adapters", "output_adapters"),
          "par_bn": ("output_adapters",)}  # fmt: skip
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": F.gelu, "swish": F.silu}


@dataclass(frozen=True)
class Bottleneck:
    """One adapter: placement, activation, width, scaling."""

    placement: Placement
    activation: str
    width: int
    scaling: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.placement}_{self.activation}_{self.width}"

    def save(self, directory: Path, family: Family, model: nn.Module) -> None:
        """Write it as AdapterHub would, every tensor random."""
        source = json.loads((GOLDEN / "llama" / self.placement / "adapter_config.json").read_text())
        hidden = model.config.hidden_size
        source["config"] |= {"non_linearity": self.activation, "reduction_factor": hidden / self.width,
                             "scaling": self.scaling}  # fmt: skip
        source |= {
            "name": "a",
            "hidden_size": hidden,
            "model_name": None,
            "model_type": model.config.model_type,
        }
        draw = torch.Generator().manual_seed(self.width)
        tensors = {}
        for layer in range(model.config.num_hidden_layers):
            for place in PLACES[self.placement]:
                stem = f"{PATHS[family]['layer'].format(layer)}.{place}.adapters.a."
                for key, shape in (
                    ("adapter_down.0.weight", (self.width, hidden)),
                    ("adapter_down.0.bias", (self.width,)),
                    ("adapter_up.weight", (hidden, self.width)),
                    ("adapter_up.bias", (hidden,)),
                ):
                    tensors[stem + key] = 0.3 * torch.randn(shape, generator=draw)
        directory.mkdir()
        (directory / "adapter_config.json").write_text(json.dumps(source))
        save_file(tensors, directory / "adapter.safetensors")

    @torch.no_grad()
    def logits(self, directory: Path, family: Family, model: nn.Module, tokens: list[int]) -> Tensor:
        """Logits [T, V] of the stock model with this adapter, in the model's dtype."""
        stored = load_file(directory / "adapter.safetensors")
        dtype = next(model.parameters()).dtype
        paths = PATHS[family]
        with ExitStack() as hooks:
            for layer in range(model.config.num_hidden_layers):
                block = model.get_submodule(paths["layer"].format(layer))
                branches = {
                    place: self._branch(stored, f"{paths['layer'].format(layer)}.{place}.adapters.a.", dtype)
                    for place in PLACES[self.placement]
                }
                self._install(hooks, block, paths, branches)
            return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    def _branch(self, stored: dict[str, Tensor], stem: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        down, down_bias, up, up_bias = (
            stored[stem + key].to(dtype)
            for key in (
                "adapter_down.0.weight",
                "adapter_down.0.bias",
                "adapter_up.weight",
                "adapter_up.bias",
            )
        )
        f = ACTIVATIONS[self.activation]
        return lambda x: self.scaling * F.linear(f(F.linear(x, down, down_bias)), up, up_bias)

    def _install(
        self, hooks: ExitStack, block: nn.Module, paths: dict[str, str], branches: dict[str, Any]
    ) -> None:
        def on(path: str, hook: Any, *, before: bool = False) -> None:
            module = block.get_submodule(path) if path else block
            handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
            hooks.callback(handle.remove)

        out = branches["output_adapters"]
        if self.placement == "seq_bn":
            on("", lambda _m, _i, y: (y[0] + out(y[0]), *y[1:]) if isinstance(y, tuple) else y + out(y))
        elif self.placement == "double_seq_bn":
            attn = branches["attention_adapters"]
            on(paths["o"], lambda _m, _i, y: y + attn(y))
            on(paths["ffn"], lambda _m, _i, y: y + out(y))
        else:
            stream: list[Tensor] = []
            on(paths["ffn_norm"], lambda _m, args: stream.append(args[0]), before=True)
            on(paths["ffn"], lambda _m, _i, y: y + out(stream.pop()))
