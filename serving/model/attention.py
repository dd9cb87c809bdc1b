"""The attention function that transformers calls in place of its own, through the public AttentionInterface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from adapters.errors import BackboneRefused
from serving.model.context import active_context

ATTENTION_NAME = "deltamux"
"""No mask function is registered under this name, so transformers builds no mask."""

INERT_KWARGS = frozenset(
    {
        "dropout",
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_router_logits",  # only asks for another output
        "cache_position",
        "is_causal",
        "past_key_values",
        "deterministic",  # of another implementation
    }
)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over the KV cache of the active batch.

    Shapes: query [1, heads, T, D], key and value of the new tokens [1, kv_heads, T, D] -> [1, T, heads, D].
    Raises BackboneRefused for a feature it does not know (sinks, position bias, a mask): it must not guess.
    """
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in INERT_KWARGS)
    if attention_mask is not None:
        unknown.append("attention_mask")
    context = active_context()
    if unknown or context is None:
        raise BackboneRefused(
            f"Attention got {', '.join(unknown) or 'a forward pass outside the engine'}, which it does not execute.",
            param="backbone",
        )
    context.query, context.scaling = query[0], scaling
    layer = getattr(module, "layer_idx", len(context.attention.attended))  # some encoders count no layers
    return context.attention.attend(layer, query, key, value, scaling, sliding_window, softcap), None


AttentionInterface.register(ATTENTION_NAME, attention)
