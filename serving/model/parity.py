"""The load-time parity probe: the engine's forward against the stock one on ragged random input.

It takes the flattened layout where that is exact, else the padded one, else it refuses the model. A window of thousands
of tokens is longer than any probe that one would wait for. There the probe compares what the layers ask for with what
the config says, and that windows are then executed right is shown on tiny models, whose windows are shorter than their
rows (`tests/contract`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.backbone_spec import BackboneSpec
from adapters.errors import BackboneRefused
from serving.model.context import ForwardContext
from serving.model.kv_cache import RowSpan
from serving.model.layout import Flattened
from serving.model.padded import Padded

if TYPE_CHECKING:
    from serving.model.backbone import Backbone

log = logging.getLogger(__name__)

LENGTHS = (5, 1, 40, 3)
"""Ragged rows of the probe."""

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest accepted |served - stock| logit, relative to max(1, max|stock logit|)."""


@torch.inference_mode()
def stock_probe(model: PreTrainedModel, spec: BackboneSpec) -> list[Tensor]:
    """Logits of every position of the probe rows, one stock forward a row.

    In eager attention, the reference of all deltas; SDPA can't do all of it (Gemma 2's softcap).
    """
    model.set_attn_implementation("eager")
    return [
        model(input_ids=row[None].to(model.device), use_cache=False).logits[0].float()
        for row in _tokens(spec)
    ]


def choose_layout(backbone: Backbone, stock: Sequence[Tensor]) -> None:
    """Give `backbone` the first layout that equals the stock forward. Raises BackboneRefused where none does."""
    refusals: list[str] = []
    for layout in (Flattened(), Padded(backbone.model, backbone.logit_modules)):
        backbone.layout = layout
        try:
            layout.adopt(backbone.model)
            backbone.parity_error = parity_error(backbone, stock)
        except BackboneRefused as error:
            refusals.append(f"{layout.name}: {error}")
            continue
        backbone.spec = replace(
            backbone.spec, sees_queries=layout.sees_queries, free_positions=layout.free_positions
        )
        log.info("%s is served %s. %s", backbone.spec.model_type, layout.name, " ".join(refusals))
        return
    raise BackboneRefused(
        f"{backbone.spec.model_type!r} can't be served exactly. {' '.join(refusals)}",
        param="backbone",
        remedy="This architecture or option is not served exactly yet.",
    )


def parity_error(backbone: Backbone, stock: Sequence[Tensor]) -> float:
    """Largest relative logit difference, served against stock. Raises BackboneRefused.

    Rows run in two chunks and a last single token, so that prefill, chunked prefill and decode are compared.
    """
    rows = [row.to(backbone.device) for row in _tokens(backbone.spec)]
    cache = backbone.new_cache(len(rows), max(LENGTHS))
    pieces: list[list[Tensor]] = [[] for _ in rows]
    cuts = [(0, (n + 1) // 2, max(n - 1, (n + 1) // 2), n) for n in map(len, rows)]
    for step in range(3):
        spans, tokens, positions, start = [], [], [], 0
        for slot, row in enumerate(rows):
            low, high = cuts[slot][step : step + 2]
            if low == high:
                continue
            spans.append(RowSpan(start, start + high - low, slot, low))
            tokens.append(row[low:high])
            positions.append(torch.arange(low, high, device=backbone.device))
            start += high - low
        context = ForwardContext([None] * len(backbone.spec.modules), cache.plan(spans))
        every = torch.arange(start, device=backbone.device)
        logits = backbone.forward(torch.cat(tokens), torch.cat(positions), context, every)
        _check_windows(context.attention.attended, backbone.model.config)
        for span in spans:
            pieces[span.slot].append(logits[span.start : span.stop])
    ours = torch.cat([torch.cat(parts) for parts in pieces])
    reference = torch.cat(list(stock))
    error = float((ours - reference).abs().max() / reference.abs().max().clamp(min=1.0))
    limit = TOLERANCE[backbone.dtype]
    if not error <= limit:
        raise BackboneRefused(
            f"The forward of {backbone.spec.model_type!r} differs from the stock one by {error:.2e} of the logit "
            f"scale, limit {limit:.0e}.",
            param="backbone",
        )
    return error


def _check_windows(attended: Sequence[tuple[int, int | None]], config: Any) -> None:
    """Refuse layers whose attention asks for another window than the config gives them."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [
        "full_attention" if window is None else "sliding_attention"
    ] * len(attended)
    expected = {"full_attention": None, "sliding_attention": window}
    for layer, asked in attended:
        if kinds[layer] not in expected or asked != expected[kinds[layer]]:
            raise BackboneRefused(
                f"Layer {layer} is of type {kinds[layer]!r} in a model with sliding_window={window}, but its attention "
                f"asks for the window {asked}.",
                param="backbone",
            )


def _tokens(spec: BackboneSpec) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    lengths = [min(length, spec.max_positions) for length in LENGTHS]
    return [torch.randint(0, spec.vocab_size, (length,), generator=draw) for length in lengths]
