"""The load-time parity probe of encoder-decoders: flattened stacks against the stock forward, one pair at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.backbone_spec import BackboneSpec
from adapters.errors import BackboneRefused
from serving.model.context import ForwardContext
from serving.model.cross_cache import CrossCache
from serving.model.kv_cache import RowSpan
from serving.model.parity import TOLERANCE
from serving.model.seq2seq import EncoderDecoder, SourceRow

if TYPE_CHECKING:
    from serving.model.backbone import Backbone

LENGTHS = ((5, 3), (1, 40), (40, 1), (3, 6), (5, 3))
"""Tokens of the probe's pairs: what the encoder reads, what the decoder is given."""


class Pair(NamedTuple):
    """What the stock model makes of one pair: logits [n, V] of the decoder's n tokens."""

    source: Tensor
    tokens: Tensor
    logits: Tensor


@torch.inference_mode()
def stock_pairs(model: PreTrainedModel, spec: BackboneSpec) -> list[Pair]:
    """The probe pairs through the stock forward, in eager attention."""
    model.set_attn_implementation("eager")
    draw, found = torch.Generator().manual_seed(0), []
    for lengths in LENGTHS:
        source, tokens = (
            torch.randint(0, spec.vocab_size, (min(n, spec.max_positions),), generator=draw).to(model.device)
            for n in lengths
        )
        out = model(input_ids=source[None], decoder_input_ids=tokens[None], use_cache=False)
        found.append(Pair(source, tokens, out.logits[0].float()))
    return found


@torch.inference_mode()
def prove_seq2seq(backbone: Backbone, stock: Sequence[Pair]) -> None:
    """Give `backbone` its layout and its parity error. Raises BackboneRefused where it differs from the stock one.

    The decoder runs a row's first token, then some at once, then a last one alone.
    """
    layout = EncoderDecoder(backbone.spec)
    layout.adopt(backbone.model)
    backbone.layout = layout
    device = backbone.device
    cache = backbone.new_cache(len(stock), max(max(lengths) for lengths in LENGTHS))
    assert isinstance(cache, CrossCache), type(cache)
    programs = [None] * len(backbone.spec.modules)
    spans, start = [], 0
    for slot, pair in enumerate(stock):
        spans.append(RowSpan(start, start + len(pair.source), slot, 0))
        cache.begin_source([slot], len(pair.source), None)
        start = spans[-1].stop
    positions = torch.cat([torch.arange(len(pair.source)) for pair in stock]).to(device)
    context = ForwardContext(programs, cache.plan_encoder(spans, [None] * len(spans)))
    sources = [SourceRow(span.start, span.stop, [span.slot]) for span in spans]
    backbone.encode(torch.cat([pair.source for pair in stock]), positions, context, cache, sources)
    pieces: list[list[Tensor]] = [[] for _ in stock]
    for step in range(3):
        spans, tokens, places, start = [], [], [], 0
        for slot, pair in enumerate(stock):
            count = len(pair.tokens)
            low, high = (0, 1, max(1, count - 1), count)[step : step + 2]
            spans.append(RowSpan(start, start + high - low, slot, low))
            tokens.append(pair.tokens[low:high])
            places.append(torch.arange(low, high))
            start += high - low
        spans = [span for span in spans if span.stop > span.start]
        if not spans:
            continue
        context = ForwardContext(programs, cache.plan(spans), cross=cache.plan_cross(spans))
        every = torch.arange(start, device=device)
        logits = backbone.forward(torch.cat(tokens), torch.cat(places).to(device), context, every)
        for span in spans:
            pieces[span.slot].append(logits[span.start : span.stop])
    ours, reference = torch.cat([torch.cat(parts) for parts in pieces]), torch.cat([p.logits for p in stock])
    backbone.parity_error = float((ours - reference).abs().max() / reference.abs().max().clamp(min=1.0))
    limit = TOLERANCE[backbone.dtype]
    if not backbone.parity_error <= limit:
        raise BackboneRefused(
            f"The forward of {backbone.spec.model_type!r} differs from the stock one by {backbone.parity_error:.2e} "
            f"of the scale of its logits, limit {limit:.0e}.",
            param="backbone",
            remedy="This architecture or option is not served exactly yet.",
        )
