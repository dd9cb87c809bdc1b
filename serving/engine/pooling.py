"""Answers of task heads: what a step computed of pooling requests, gathered over chunks and scored delta by delta."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.errors import InvalidRequest
from adapters.tasks import PER_TOKEN
from serving.core import Choice, Pooled
from serving.engine.runner import RowOutput
from serving.engine.sequence import Sequence
from serving.model.heads import BARE_EMBEDDING, PlacedHead
from serving.model.programs import PlacedDelta


@dataclass(slots=True, eq=False)
class PoolState:
    """What is known of one request's answer: the sum of its hidden states [d], or the parts that were scored."""

    total: Tensor | None = None
    pooled: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    def take(self, seq: Sequence, head: PlacedHead, hidden: Tensor) -> Tensor:
        """The vectors [n, d] to score now, after `hidden` [m, d] of the next tokens.

        A preempted request starts anew.
        """
        if seq.num_computed == 0:
            self.total = None
            self.pooled.clear()
            self.scores.clear()
        if head.spec.pooling != "mean":
            return hidden
        total = hidden.sum(dim=0)
        self.total = total if self.total is None else self.total + total
        if not _is_complete(seq, hidden):
            return hidden[:0]
        return self.total[None] / len(seq.pooled_tokens)


def head_of(seq: Sequence) -> PlacedHead:
    """The head that answers `seq`, which has been admitted."""
    assert seq.delta is None or isinstance(seq.delta, PlacedDelta)
    return (None if seq.delta is None else seq.delta.head) or BARE_EMBEDDING


def advance(outputs: Iterable[RowOutput]) -> dict[Sequence, Pooled | InvalidRequest | None]:
    """The answers that this step completed, before its tokens are counted as computed.

    None stands for numbers that are not finite. Vectors of one head are scored together.
    """
    answers: dict[Sequence, Pooled | InvalidRequest | None] = {}
    by_head: dict[PlacedHead, list[tuple[Sequence, Tensor]]] = {}
    complete = []
    for (seq, count), logits, hidden in outputs:
        if seq.request.pooling is None:
            continue
        if seq.request.masks:
            answers[seq] = _worded(seq, logits, hidden) if seq.request.words else _filled(seq, logits)
            continue
        if len(hidden):
            head = head_of(seq)
            by_head.setdefault(head, []).append((seq, seq.state.pool.take(seq, head, hidden)))
        if count == seq.num_pending:
            complete.append(seq)
    for head, rows in by_head.items():
        scores = head(torch.cat([vectors for _, vectors in rows]))
        for (seq, vectors), part in zip(rows, torch.split(scores, [len(v) for _, v in rows]), strict=True):
            seq.state.pool.scores.append(part)
            if head.task not in PER_TOKEN:  # their answers say nothing of the vectors themselves
                seq.state.pool.pooled.append(vectors)
    return answers | {seq: _answer(seq) for seq in complete}


def _filled(seq: Sequence, logits: Tensor) -> Pooled | None:
    """The likeliest tokens at each mask. Shapes: logits [masks, V]."""
    if not bool(torch.isfinite(logits).all()):
        return None
    assert seq.request.pooling is not None
    probs = logits.softmax(dim=-1)
    ids = torch.tensor(seq.request.targets) if seq.request.targets else torch.arange(probs.shape[-1])
    best = probs[:, ids.to(probs.device)].topk(min(seq.request.pooling.top_k, len(ids)), dim=-1)
    masks = tuple(
        tuple(Choice(int(ids[at]), float(prob)) for prob, at in zip(row, places, strict=True))
        for row, places in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
    return Pooled(values=b"", shape=(0,), masks=masks)


def _worded(seq: Sequence, logits: Tensor, hidden: Tensor) -> Pooled | None:
    """The mean log-probability of each word's tokens, see `adapters.cloze`.

    Shapes: logits [masks, V], hidden [T, d].
    """
    if not bool(torch.isfinite(logits).all()):
        return None
    knows_classes = head_of(seq).class_means is not None
    features = _bytes(at_masks(seq, hidden)) if knows_classes else b""
    words = torch.tensor(seq.request.words, device=logits.device)
    scores = logits.log_softmax(dim=-1)[torch.arange(len(logits), device=logits.device), words].mean(dim=1)
    return Pooled(values=_bytes(scores), shape=tuple(scores.shape), features=features)


def at_masks(seq: Sequence, hidden: Tensor) -> Tensor:
    """The mean [d] of the states at the masks; `hidden` [T, d] are those of all tokens."""
    return hidden[list(seq.request.masks)].mean(dim=0)


def _is_complete(seq: Sequence, hidden: Tensor) -> bool:
    return seq.num_computed + len(hidden) >= seq.num_prompt


def _answer(seq: Sequence) -> Pooled | InvalidRequest | None:
    head, state, pooling = head_of(seq), seq.state.pool, seq.request.pooling
    assert pooling is not None
    scores = torch.cat(state.scores)
    if not bool(torch.isfinite(scores).all()):
        return None
    if head.task in PER_TOKEN:
        return scored(head, scores)
    vector = scores[0]
    if pooling.task is pooling.task.EMBEDDING:
        if pooling.dimensions is not None:
            if pooling.dimensions > len(vector):
                return InvalidRequest(
                    f"dimensions: got {pooling.dimensions}, the embedding has {len(vector)}.",
                    param="dimensions",
                    remedy="Ask for at most as many.",
                )
            vector = F.normalize(vector[: pooling.dimensions], dim=0)
        return Pooled(values=_bytes(vector), shape=tuple(vector.shape))
    return scored(head, vector, head.out_of_distribution(torch.cat(state.pooled)[0], vector))


def scored(head: PlacedHead, scores: Tensor, ood: dict[str, float] | None = None) -> Pooled:
    """What `head` makes known of its scores [..., n]."""
    probs = head.probabilities(scores)
    return Pooled(
        values=_bytes(scores),
        shape=tuple(scores.shape),
        labels=head.spec.labels,
        problem_type=head.spec.problem_type,
        probs=None if probs is None else _bytes(probs),
        ood=ood or {},
    )


def _bytes(tensor: Tensor) -> bytes:
    data: bytes = tensor.float().cpu().contiguous().numpy().tobytes()
    return data
