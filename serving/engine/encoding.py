"""The encoder's part of a step: what newly admitted requests ask is read whole, requests with one prompt once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from serving.engine.sequence import Sequence
from serving.model.backbone import Backbone
from serving.model.context import ForwardContext
from serving.model.cross_cache import CrossCache
from serving.model.kv_cache import RowSpan
from serving.model.programs import DeltaSegment, PlacedDelta, compile_programs
from serving.model.seq2seq import SourceRow


def encode(backbone: Backbone, cache: CrossCache, seqs: Iterable[Sequence]) -> None:
    """Run the encoder for `seqs`; their slots hold the cross-attention's keys and values afterwards."""
    alike: dict[tuple[str, str, tuple[int, ...]], list[Sequence]] = defaultdict(list)
    for seq in seqs:
        digest = seq.request.adapter_digest or ""
        alike[digest, seq.request.tenant, seq.source].append(seq)
    tokens: list[int] = []
    positions: list[int] = []
    inserted: list[tuple[int, Tensor]] = []
    segments: list[DeltaSegment] = []
    spans, prefixes, rows = [], [], []
    for key in sorted(alike):  # those of one delta side by side
        first, slots = alike[key][0], [seq.slot for seq in alike[key]]
        delta = first.delta
        assert delta is None or isinstance(delta, PlacedDelta)
        start, num_virtual = len(tokens), 0
        if delta is not None and delta.virtual_tokens is not None:
            inserted.append((start, delta.virtual_tokens))
            num_virtual = len(delta.virtual_tokens)
        tokens += [*([0] * num_virtual), *first.source]
        positions += range(num_virtual + len(first.source))
        stop = len(tokens)
        prefix = None if delta is None else delta.encoder_prefix
        prefixes.append(prefix)
        spans.append(RowSpan(start, stop, slots[0], 0 if prefix is None else len(prefix[0][0])))
        cache.begin_source(slots, stop - start, None if delta is None else delta.cross_prefix)
        rows.append(SourceRow(start, stop, slots))
        if delta is not None:
            if segments and segments[-1].delta is delta:
                start = segments.pop().start
            segments.append(DeltaSegment(start, stop, delta))
    programs = compile_programs(
        len(backbone.spec.modules), backbone.kernels, segments, [], backbone.logit_modules
    )
    context = ForwardContext(programs, cache.plan_encoder(spans, prefixes), inserted=inserted)
    device = backbone.device
    backbone.encode(
        torch.tensor(tokens, device=device), torch.tensor(positions, device=device), context, cache, rows
    )
    for group in alike.values():
        for seq in group:
            seq.is_encoded = True
