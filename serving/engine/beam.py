"""Beam search: the rows of one request that go on together, the likeliest continuations of them all in each step.

The arithmetic is that of transformers' `generate`, in fp32 and in its order, so that its hypotheses come out. Each row
has a KV slot. A beam stays in its parent's row where it can, and takes the row of a beam that has ended where a
sibling is there already: a step copies as many slots as parents have died, in any order, and of each only the entries
that differ. Legend: B beams, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from serving.core import BeamParams
from serving.engine.runner import RowOutput
from serving.engine.sequence import Sequence

NEVER = -1e9
"""Score of the beams but one before the first step, when all have the same tokens."""


Demand = Callable[[Sequence, Tensor], Tensor]
"""What the backbone demands of a row's next token: log-probabilities [V] -> [V], -inf where it is forbidden."""


class Hypothesis(NamedTuple):
    """Generated tokens that are final, and what they are worth. `stopped`: a token ended them, not the length."""

    tokens: list[int]
    worth: float
    stopped: bool


class Candidate(NamedTuple):
    """A beam and a token after it: their log-probability, and what they are worth if they end here."""

    score: float
    worth: float
    beam: int
    token: int


class Copy(NamedTuple):
    """Entries [start, stop) that one slot needs of another."""

    source: int
    target: int
    start: int
    stop: int


class Beams:
    """The search of one request. Made of its first row, to which it joins the others.

    `finished` are the best hypotheses so far, best first, at most B; `done` when no better ones are to come.
    """

    def __init__(
        self, first: Sequence, params: BeamParams, ends: frozenset[int], demand: Demand | None = None
    ) -> None:
        others = [
            Sequence(first.request, list(first.tokens), first.state, source=first.source)
            for _ in range(params.width - 1)
        ]
        self.rows = (first, *others)
        for row in self.rows:
            row.together = self.rows
        for row in others:
            row.num_charged = len(first.source)  # which is read once
        self.params = params
        self.finished: list[Hypothesis] = []
        self.done = False
        self._ends = ends
        self._demand = demand
        self._ranked = list(self.rows)  # best beam first
        self._scores = [0.0] + [NEVER] * (params.width - 1)

    def candidates(self, logits: dict[Sequence, Tensor]) -> list[Candidate] | None:
        """The likeliest continuations, best first; None where numbers are not finite. Shapes: logits [V] of each row.

        There are enough of them for B that don't end, should every end be among them.
        """
        logits_BV = torch.stack([logits[row] for row in self._ranked]).float()
        if not bool(torch.isfinite(logits_BV.sum(dim=-1)).all()):
            return None
        scores = torch.tensor(self._scores, device=logits_BV.device)
        logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
        if self._demand is not None:
            demand = self._demand
            logprobs_BV = torch.stack(
                [demand(row, found) for row, found in zip(self._ranked, logprobs_BV, strict=True)]
            )
        sums = (logprobs_BV + scores[:, None]).view(-1)
        width, vocabulary = logits_BV.shape
        scores_K, places_K = sums.topk(min(len(sums), max(2, 1 + len(self._ends)) * width))
        worths = self._worths(scores_K, self.rows[0].num_generated + 1).tolist()
        return [
            Candidate(score, worth, place // vocabulary, place % vocabulary)
            for score, worth, place in zip(scores_K.tolist(), worths, places_K.tolist(), strict=True)
        ]

    def advance(self, candidates: list[Candidate]) -> list[Copy]:
        """Finish what ends, and let every row go on as one of the best that don't; the slots' entries follow."""
        length = self.rows[0].num_generated + 1
        full = len(self.rows[0].tokens) + 1 >= self.rows[0].max_len
        for place, found in enumerate(candidates):
            stopped = found.token in self._ends
            if (stopped or full) and place < self.params.width:
                tokens = [*self._generated(found.beam), found.token]
                self.finished.append(Hypothesis(tokens, found.worth, stopped))
        self.finished.sort(key=lambda hypothesis: -hypothesis.worth)
        del self.finished[self.params.width :]
        going = [] if full else [found for found in candidates if found.token not in self._ends]
        going = going[: self.params.width]
        self.done = not going or self._is_settled(going[0].score, length)
        return [] if self.done else self._branch(going)

    def _is_settled(self, best_score: float, length: int) -> bool:
        """Whether the best beam, of `length`, is not to be worth more than what is finished."""
        if len(self.finished) < self.params.width:
            return False
        if self.params.early_stopping is True:
            return True
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = self.rows[0].max_len - self.rows[0].num_prompt
        return float(self._worths(torch.tensor(best_score), length)) <= self.finished[-1].worth

    def _branch(self, going: list[Candidate]) -> list[Copy]:
        parents = [self._ranked[found.beam] for found in going]
        vacant = [row for row in self._ranked if row not in parents]
        ranked, copies = list[Sequence](), list[Copy]()
        for parent in parents:
            row = parent if parent not in ranked else vacant.pop()
            if row is not parent:
                start, stop = (
                    row.prefix_len + count for count in (parent.num_common(row), parent.num_computed)
                )
                copies.append(Copy(parent.slot, row.slot, start, stop))
            ranked.append(row)
        tokens = [[*parent.tokens, found.token] for parent, found in zip(parents, going, strict=True)]
        for row, its_tokens in zip(ranked, tokens, strict=True):
            row.tokens = its_tokens
        self._ranked, self._scores = ranked, [found.score for found in going]
        return copies

    def _generated(self, beam: int) -> list[int]:
        row = self._ranked[beam]
        return row.tokens[row.num_prompt :]

    def _worths(self, scores: Tensor, length: int) -> Tensor:
        worths: Tensor = scores / length**self.params.length_penalty
        return worths


def search(outputs: Iterable[RowOutput]) -> dict[Sequence, list[Candidate] | None]:
    """Per first row of a search whose rows' last tokens ran: what `Beams.candidates` gives."""
    logits: dict[Sequence, dict[Sequence, Tensor]] = {}
    for row, logits_nV, _ in outputs:
        if row.samples and row.seq.together:
            logits.setdefault(row.seq.together[0], {})[row.seq] = logits_nV[-1]
    return {first: first.state.beams.candidates(rows) for first, rows in logits.items()}
