"""PEFT prefix tuning -> AttnPrefix, PEFT prompt tuning -> VirtualTokens.

Format: PEFT 0.21.2, one key `prompt_embeddings`. Prefix: [l, 2·L·H·D], per token and layer first the key, then the
value, [H, D] each, any projection already evaluated. Prompt: [l, d]. Real tokens are positioned after the l virtual
ones. Source: PEFT `PeftModel.get_prompt`; Li and Liang "Prefix-Tuning"; Lester et al. "Prompt tuning".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.formats.peft_config import PREFIX_TUNING, PROMPT_TUNING
from adapters.formats.peft_keys import Placed, check_shape
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import AttnPrefix, Op, VirtualTokens

KEY = "prompt_embeddings"


def read_prefix_tuning(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """One AttnPrefix per layer; what does not fit is added to `problems`."""
    config = check_config(raw, PREFIX_TUNING, problems)
    kv_width = spec.num_kv_heads * spec.head_dim
    _check_sizes(
        config,
        {"num_layers": spec.num_layers, "num_attention_heads": spec.num_kv_heads, "token_dim": kv_width},
        problems,
    )
    stored = _embeddings(tensors, config["num_virtual_tokens"], 2 * spec.num_layers * kv_width, problems)
    if stored is None:
        return ()
    by_layer = stored.view(-1, spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
    return tuple(
        AttnPrefix(layer=layer, key=by_layer[:, layer, 0], value=by_layer[:, layer, 1])
        for layer in range(spec.num_layers)
    )


def read_prompt_tuning(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The virtual tokens; what does not fit is added to `problems`."""
    config = check_config(raw, PROMPT_TUNING, problems)
    # PEFT does not use num_layers and num_attention_heads here, but they tell that another backbone was meant
    _check_sizes(
        config,
        {"num_layers": spec.num_layers, "num_attention_heads": spec.num_heads, "token_dim": spec.hidden_size},
        problems,
    )
    stored = _embeddings(tensors, config["num_virtual_tokens"], spec.hidden_size, problems)
    return () if stored is None else (VirtualTokens(embeddings=stored),)


def _check_sizes(config: Mapping[str, Any], sizes: Mapping[str, int], problems: Problems) -> None:
    for key, size in sizes.items():
        if config[key] not in (None, size):  # null: PEFT takes it from the base model
            problems.add(
                f"adapter_config.json: {key}: got {config[key]}, but the backbone has {size}: the adapter was trained "
                "on another base model.",
                param=key,
            )


def _embeddings(
    tensors: Mapping[str, Tensor], length: int | None, width: int, problems: Problems
) -> Tensor | None:
    for key in tensors.keys() - {KEY}:
        problems.add(f"A tensor without a site: {quoted(key)}: this method stores only {KEY!r}.")
    if KEY not in tensors:
        problems.add(f"A site without a tensor: the file has no {KEY!r}.")
        return None
    stored = tensors[KEY]
    if length is None:  # refused already
        length = stored.shape[0] if stored.dim() else 0
    return stored if check_shape(Placed(KEY, stored), (length, width), problems) else None
