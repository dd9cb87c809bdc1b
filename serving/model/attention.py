"""The attention function that transformers calls in place of its own, through the public AttentionInterface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from adapters.errors import BackboneRefused
from serving.model.context import active_context
from serving.model.distance_bias import DistanceBias

ATTENTION_NAME = "deltamux"
"""No mask function is registered under this name, so transformers builds no mask."""

CROSS_MARK = "attends_across"
"""Attribute of the modules that attend over the encoder's tokens."""

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
    Cross-attention, whose keys are in the cache, is told by an attribute of its module (`seq2seq.EncoderDecoder`); the
    position bias that it is handed is zero in every architecture that has one.
    Raises BackboneRefused for a feature it does not know (sinks, other biases, a mask): it must not guess.
    """
    is_cross, position_bias = getattr(module, CROSS_MARK, False), kwargs.pop("position_bias", None)
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in INERT_KWARGS)
    if attention_mask is not None:
        unknown.append("attention_mask")
    bias = position_bias if isinstance(position_bias, DistanceBias) else None
    if position_bias is not bias and not is_cross:
        unknown.append("position_bias")
    context = active_context()
    if unknown or context is None:
        raise BackboneRefused(
            f"Attention got {', '.join(unknown) or 'a forward pass outside the engine'}, which it does not execute.",
            param="backbone",
        )
    context.query, context.scaling = query[0], scaling
    counted = getattr(module, "layer_idx", None)
    layer = len(context.attention.attended) if counted is None else counted  # some encoders count no layers
    if is_cross:
        assert context.cross is not None, "cross-attention runs in passes of the decoder only"
        return context.cross.attend(layer, query, scaling), None
    return context.attention.attend(layer, query, key, value, scaling, sliding_window, softcap, bias), None


AttentionInterface.register(ATTENTION_NAME, attention)
