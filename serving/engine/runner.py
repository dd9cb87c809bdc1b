"""One step on the device: scheduled rows -> flattened batches -> logits. Most layouts run all rows in one batch.

Rows are sorted by delta, so that the tokens of one delta are one segment. The delta programs of the last batch are
kept: a decode step with the same rows pays nothing for them.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from serving.engine.encoding import encode
from serving.engine.merging import HotMerge
from serving.engine.sequence import ScheduledRow, Sequence
from serving.model.backbone import Backbone
from serving.model.context import ForwardContext
from serving.model.cross_cache import CrossCache
from serving.model.kv_cache import RowSpan
from serving.model.programs import NOTHING_MERGED, DeltaSegment, PlacedDelta, Program, compile_programs

NONE_POOLED = range(0)


class RowOutput(NamedTuple):
    """Logits [n, V] of the last n tokens that `row` ran in this step; n = 0 in the middle of a chunked prompt.

    `hidden` [m, d] fp32: final hidden states of `row.pooled`.
    """

    row: ScheduledRow
    logits: Tensor
    hidden: Tensor


@dataclass(slots=True, eq=False)
class Batch:
    """A flattened step. `spans` place tokens in KV slots, `logits_rows` are the tokens whose logits are wanted.

    `hidden_rows` are those whose final hidden states are wanted. `inserted`: virtual tokens [l, d] in place of the l
    tokens from an index on. `token_types` are those of `Request`, 0 where a row has none.
    """

    rows: list[ScheduledRow]
    token_ids: list[int]
    positions: list[int]
    spans: list[RowSpan]
    token_segments: list[DeltaSegment]
    logits_rows: list[int]
    logits_counts: list[int]
    logit_segments: list[DeltaSegment]
    hidden_rows: list[int]
    hidden_counts: list[int]
    inserted: list[tuple[int, Tensor]]
    token_types: list[int]

    @property
    def sole_delta(self) -> PlacedDelta | None:
        """The delta that all tokens of the step belong to, if there is one."""
        if len(self.token_segments) != 1:
            return None
        start, stop, delta = self.token_segments[0]
        return delta if (start, stop) == (0, len(self.token_ids)) else None


class Runner:
    """Runs batches through the backbone; owns the KV tensors. Without `merging`, deltas are never merged."""

    def __init__(self, backbone: Backbone, *, num_slots: int, max_len: int) -> None:
        self.backbone = backbone
        self.merging: HotMerge | None = None
        self.cache = backbone.new_cache(num_slots, max_len)
        self._programs: list[Program | None] = []
        self._programs_key: tuple[object, ...] | None = None

    def run(self, rows: Seq[ScheduledRow]) -> list[RowOutput]:
        """One step of all rows. New rows get their delta's keys and values first."""
        for seq, _ in rows:
            if seq.num_computed == 0 and isinstance(seq.delta, PlacedDelta) and seq.delta.prefix is not None:
                self.cache.write_prefix(seq.slot, seq.delta.prefix)
        if isinstance(self.cache, CrossCache) and (unread := [seq for seq, _ in rows if seq.num_to_encode]):
            encode(self.backbone, self.cache, unread)
        groups = self.backbone.layout.groups([row.num_tokens for row in rows])
        return [output for group in groups for output in self._forward([rows[index] for index in group])]

    def _forward(self, rows: Seq[ScheduledRow]) -> list[RowOutput]:
        batch = build_batch(rows)
        device = self.backbone.device
        context = ForwardContext(self._compile(batch), self.cache.plan(batch.spans), inserted=batch.inserted)
        if isinstance(self.cache, CrossCache):
            context.cross = self.cache.plan_cross(batch.spans)
        if batch.hidden_rows:
            context.hidden_rows = torch.tensor(batch.hidden_rows, device=device)
        if any(batch.token_types):
            context.token_types = torch.tensor(batch.token_types, device=device)
        logits = self.backbone.forward(
            torch.tensor(batch.token_ids, device=device),
            torch.tensor(batch.positions, device=device),
            context,
            torch.tensor(batch.logits_rows, device=device) if batch.logits_rows else None,
        )
        parts = torch.split(logits, batch.logits_counts)
        none = logits[:0]
        hidden: Seq[Tensor] = [none] * len(batch.rows)
        if context.hidden is not None:
            hidden = self._through_heads(batch, torch.split(context.hidden, batch.hidden_counts))
        return [RowOutput(*found) for found in zip(batch.rows, parts, hidden, strict=True)]

    def _through_heads(self, batch: Batch, hidden: Seq[Tensor]) -> Seq[Tensor]:
        """`hidden` of every row; where the backbone's pooler or its masked head is asked, what that makes of it."""
        found = list(hidden)
        for head, run in (("pooler", self.backbone.pool), ("masks", self.backbone.masked_logits)):
            chosen = [index for index, row in enumerate(batch.rows) if _asked(row.seq) == head]
            if not chosen:
                continue
            states, segments, stop = [], list[DeltaSegment](), 0
            for index in chosen:
                seq = batch.rows[index].seq
                tokens = seq.request.masks if head == "masks" else range(len(hidden[index]))
                states.append(hidden[index][list(tokens)])
                for at, token in enumerate(tokens, start=stop):
                    if seq.delta is not None:
                        _extend(segments, at, token, token + 1, seq)
                stop += len(tokens)
            programs = compile_programs(
                len(self.backbone.spec.modules),
                self.backbone.kernels,
                [],
                segments,
                self.backbone.logit_modules,
            )
            made = run(torch.cat(states), ForwardContext(programs, self.cache.plan([])))
            for index, part in zip(chosen, torch.split(made, [len(s) for s in states]), strict=True):
                found[index] = part
        return found

    def _compile(self, batch: Batch) -> list[Program | None]:
        merged = NOTHING_MERGED if self.merging is None else self.merging.weights_for(batch.sole_delta)
        key = (tuple(batch.token_segments), tuple(batch.logit_segments), id(merged))
        if key != self._programs_key:
            self._programs = compile_programs(
                len(self.backbone.spec.modules),
                self.backbone.kernels,
                batch.token_segments,
                batch.logit_segments,
                self.backbone.logit_modules,
                merged,
            )
            self._programs_key = key
        return self._programs

    def forget_programs(self) -> None:
        """Drop the kept programs, which hold on to the weights of their deltas."""
        self._programs, self._programs_key = [], None


def build_batch(rows: Seq[ScheduledRow]) -> Batch:
    """Flatten `rows`, those of one delta side by side."""
    ordered = sorted(rows, key=lambda row: row.seq.request.adapter_digest or "")
    batch = Batch(ordered, [], [], [], [], [], [], [], [], [], [], [])
    for row in ordered:
        seq, count = row
        start, first = len(batch.token_ids), seq.num_computed
        if (virtual := _inserted(seq)) is not None:
            batch.inserted.append((start, virtual))
            batch.token_ids += [0] * len(virtual)
            batch.positions += range(len(virtual))
            batch.token_types += [0] * len(virtual)
        stop = len(batch.token_ids) + count
        batch.token_ids += seq.tokens[first : first + count]
        batch.token_types += seq.request.token_types[first : first + count] or [0] * count
        batch.positions += range(seq.position_offset + first, seq.position_offset + first + count)
        batch.spans.append(RowSpan(start, stop, seq.slot, seq.prefix_len + first))
        wanted = count if seq.wants_prompt_logits and first < seq.num_prompt else int(row.samples)
        logits_start = len(batch.logits_rows)
        batch.logits_rows += range(stop - wanted, stop)
        batch.logits_counts.append(wanted)
        pooled = row.pooled if seq.request.pooling is not None else NONE_POOLED
        batch.hidden_rows += [_first_pooled(seq, start) + offset for offset in pooled]
        batch.hidden_counts.append(len(pooled))
        if seq.delta is not None:
            _extend(batch.token_segments, start, first + count - (stop - start), first + count, seq)
            _extend(batch.logit_segments, logits_start, first + count - wanted, first + count, seq)
    return batch


def _asked(seq: Sequence) -> str | None:
    """Which head of the backbone answers the row."""
    return "masks" if seq.request.masks else _pooling(seq)


def _pooling(seq: Sequence) -> str | None:
    """How the head of the row's delta is fed."""
    spec = None if seq.delta is None else seq.delta.head_spec
    return None if spec is None or seq.request.pooling is None else spec.pooling


def _first_pooled(seq: Sequence, start: int) -> int:
    """The token from which `ScheduledRow.pooled` counts: the first real one, unless virtual ones count too."""
    virtual = _inserted(seq)
    return start if virtual is None or _pooling(seq) in ("first", "pooler") else start + len(virtual)


def _inserted(seq: Sequence) -> Tensor | None:
    """The virtual tokens [l, d] that run with the row; those of an encoder-decoder run with what its encoder reads."""
    return seq.delta.virtual_tokens if isinstance(seq.delta, PlacedDelta) and not seq.source else None


def _extend(segments: list[DeltaSegment], at: int, first: int, stop: int, seq: Sequence) -> None:
    """Add tokens [first, stop) of `seq`, from the batch's token `at` on, cut where other parts of its delta act.

    Tokens before 0 are virtual ones, and belong to the first part.

    A segment is joined with the one before it where that is alike.
    """
    assert isinstance(seq.delta, PlacedDelta)
    ends = [cut.start for cut in seq.cuts[1:]]
    for cut, end in zip(seq.cuts, (*ends, stop), strict=True):
        begin, until = max(cut.start, first) if cut.start else first, min(end, stop)
        if begin >= until:
            continue
        form, offset = seq.delta.form_at(cut.positions), at - first
        if segments and segments[-1].delta is form and segments[-1].stop == begin + offset:
            segments[-1] = DeltaSegment(segments[-1].start, until + offset, form)
        else:
            segments.append(DeltaSegment(begin + offset, until + offset, form))
