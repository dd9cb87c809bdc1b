"""Teacher-forced runs through the engine's runner: logits of every position, prefilled and decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.tasks import Task
from serving.core import PoolingParams, Request, SamplingParams
from serving.engine.runner import Runner
from serving.engine.sequence import ScheduledRow
from serving.engine.sequence import Sequence as EngineSequence
from serving.model.programs import PlacedDelta


class Given(NamedTuple):
    """What a model is given: tokens, and on an encoder-decoder, whose decoder's they are, what its encoder reads."""

    tokens: list[int]
    source: tuple[int, ...] = ()


@dataclass(eq=False)
class Row:
    """`tokens` of one request; the first `num_prefill` run at once, in chunks of `chunk`, the others one by one.

    `source`: what an encoder-decoder's encoder reads; `tokens` are its decoder's then.
    """

    name: str
    tokens: list[int]
    num_prefill: int
    delta: PlacedDelta | None
    chunk: int = 1 << 30
    logits: list[Tensor] = field(default_factory=list)
    source: tuple[int, ...] = ()

    @property
    def given(self) -> Given:
        return Given(self.tokens, self.source)

    def counts(self) -> list[int]:
        chunks = [min(self.chunk, self.num_prefill - at) for at in range(0, self.num_prefill, self.chunk)]
        return chunks + [1] * (len(self.tokens) - self.num_prefill)


def run(runner: Runner, rows: Sequence[Row]) -> None:
    """Run all rows together, each at its own pace, and fill in their logits, one [T, V] tensor in pieces.

    On an encoder, their final hidden states.
    """
    generates = runner.backbone.spec.kind != "encoder"
    sequences, plans = [], []
    for slot, row in enumerate(rows):
        request = Request(
            request_id=str(slot),
            prompt_token_ids=row.source or tuple(row.tokens),
            sampling=SamplingParams(prompt_logprobs=0 if generates else None),  # 0: logits of every token
            pooling=None if generates else PoolingParams(task=Task.EMBEDDING),
            adapter_digest=None if row.delta is None else row.delta.digest,
        )
        sequence = EngineSequence(request, list(row.tokens), state=row, source=row.source)
        sequence.admit(slot, row.delta)
        sequence.max_len = len(row.tokens)
        sequence.pooled_tokens = range(0 if generates else len(row.tokens))
        sequences.append(sequence)
        plans.append(row.counts())
    while any(plans):
        batch = [ScheduledRow(s, plan.pop(0)) for s, plan in zip(sequences, plans, strict=True) if plan]
        for (sequence, count), logits, hidden in runner.run(batch):
            sequence.state.logits.append(logits if generates else hidden)
            sequence.num_computed += count


def errors(row: Row, reference: Tensor) -> tuple[float, float]:
    """Largest |logit - reference| of (prefill, cached decode). Shapes: reference [T, V]."""
    difference = (torch.cat(row.logits).double() - reference.double()).abs()
    decode = difference[row.num_prefill :]
    return float(difference[: row.num_prefill].max()), float(decode.max()) if len(decode) else 0.0
