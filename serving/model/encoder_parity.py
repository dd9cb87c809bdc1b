"""The load-time parity probe of encoders: rows of a batch against the stock forward, one row at a time.

It takes the flattened layout where that is exact, else the padded one, else it refuses the model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.backbone_spec import BackboneSpec
from adapters.errors import BackboneRefused
from serving.model.context import ForwardContext
from serving.model.encoder import BareEncoder, WholeRows, masked_logits, pooled
from serving.model.kv_cache import RowSpan
from serving.model.padded_rows import PaddedRows
from serving.model.parity import TOLERANCE

if TYPE_CHECKING:
    from serving.model.backbone import Backbone

log = logging.getLogger(__name__)

LENGTHS = (5, 1, 40, 3, 5)
"""Ragged rows of the probe; one more is longer than the window, where there is one."""


class Stock(NamedTuple):
    """What the stock model makes of one row: states [n, d], and pooled [d] and logits [n, V] where it has those."""

    tokens: Tensor
    states: Tensor
    pooled: Tensor | None
    logits: Tensor | None


@torch.inference_mode()
def stock_rows(model: PreTrainedModel | BareEncoder, spec: BackboneSpec) -> list[Stock]:
    """The probe rows through the stock forward, in eager attention."""
    model.set_attn_implementation("eager")
    body, found = model.base_model, []
    device = next(body.parameters()).device
    draw = torch.Generator().manual_seed(0)
    window = getattr(model.config, "sliding_window", None) or 0
    for length in (*LENGTHS, *([window + 20] if window else [])):
        shape = (min(length, spec.max_positions),)
        tokens = torch.randint(spec.first_position, spec.vocab_size, shape, generator=draw).to(device)
        out = body(input_ids=tokens[None])
        pooler = getattr(out, "pooler_output", None)
        logits = None if isinstance(model, BareEncoder) else model(input_ids=tokens[None]).logits[0]
        found.append(Stock(tokens, out.last_hidden_state[0], None if pooler is None else pooler[0], logits))
    return found


@torch.inference_mode()
def prove_encoder(backbone: Backbone, stock: Sequence[Stock]) -> None:
    """Give `backbone` the first layout that equals the stock forward, and its error. Raises BackboneRefused."""
    refusals: list[str] = []
    for layout in (WholeRows(), PaddedRows(backbone.spec, backbone.logit_modules)):
        backbone.layout = layout
        try:
            layout.adopt(backbone.model)
            backbone.parity_error = _parity_error(backbone, stock)
        except BackboneRefused as error:
            refusals.append(f"{layout.name}: {error}")
            continue
        backbone.spec = replace(backbone.spec, sees_queries=layout.sees_queries)
        log.info("%s is served in %s. %s", backbone.spec.model_type, layout.name, " ".join(refusals))
        return
    raise BackboneRefused(
        f"{backbone.spec.model_type!r} can't be served exactly. {' '.join(refusals)}",
        param="backbone",
        remedy="This architecture or option is not served exactly yet.",
    )


def _parity_error(backbone: Backbone, stock: Sequence[Stock]) -> float:
    """Largest relative difference from the stock rows. Raises BackboneRefused where it is beyond its limit."""
    spans, start = [], 0
    for slot, row in enumerate(stock):
        spans.append(RowSpan(start, start + len(row.tokens), slot, 0))
        start = spans[-1].stop
    programs = [None] * len(backbone.spec.modules)
    plan = backbone.new_cache(len(stock), backbone.spec.max_positions).plan(spans)
    context = ForwardContext(programs, plan, hidden_rows=torch.arange(start, device=backbone.device))
    positions = torch.cat([torch.arange(len(row.tokens)) for row in stock]).to(backbone.device)
    backbone.forward(torch.cat([row.tokens for row in stock]), positions, context, None)
    assert context.hidden is not None
    states = context.hidden
    errors = [_error(states, torch.cat([row.states for row in stock]))]
    aside = ForwardContext(programs, plan)
    firsts = torch.tensor([span.start for span in spans], device=backbone.device)
    if stock[0].pooled is not None:
        served = pooled(backbone.model, states[firsts].to(backbone.dtype), aside)
        errors.append(_error(served, torch.stack([row.pooled for row in stock if row.pooled is not None])))
    if stock[0].logits is not None:
        served = masked_logits(backbone.model, states.to(backbone.dtype), aside)
        errors.append(_error(served, torch.cat([row.logits for row in stock if row.logits is not None])))
    error, limit = max(errors), TOLERANCE[backbone.dtype]
    if not error <= limit:
        raise BackboneRefused(
            f"The forward of {backbone.spec.model_type!r} differs from the stock one by {error:.2e} of the scale of "
            f"its outputs, limit {limit:.0e}.",
            param="backbone",
        )
    return error


def _error(served: Tensor, stock: Tensor) -> float:
    """Largest difference relative to max(1, max|stock|)."""
    return float((served.float() - stock.float()).abs().max() / stock.float().abs().max().clamp(min=1.0))
