"""What a request says: its prompt's event, then its tokens as text, with log-probabilities and why they end."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from tokenizers import Tokenizer

from serving.core import (
    Alternative,
    FinishReason,
    PromptEvent,
    Request,
    TokenEvent,
    TokenLogprobs,
)
from serving.engine.beam import Beams, Demand, Hypothesis
from serving.engine.detokenizer import TextStream
from serving.engine.pooling import PoolState
from serving.engine.rules import GenerationRules
from serving.engine.sampler import Sampled, SamplerState, token_logprobs
from serving.engine.sequence import Sequence


@dataclass(slots=True)
class RowState:
    """What the engine keeps of one request beside its tokens. `ends`: the tokens that end its answer."""

    sampler: SamplerState
    text: TextStream | None
    ends: frozenset[int]
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    announced: bool = False
    pool: PoolState | None = None
    beams: Beams | None = None


class Answers:
    """Makes events of tokens. Without a tokenizer they have no text."""

    def __init__(
        self, tokenizer: Tokenizer | None, eos_token_ids: frozenset[int], rules: GenerationRules | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._rules = rules
        self._eos_token_ids = eos_token_ids

    def begin(self, request: Request) -> Sequence:
        """A request that has said nothing yet: its first row."""
        text, rules, begin = None, self._rules, request.prompt_token_ids
        if rules is not None:
            begin = rules.start_tokens
        if self._tokenizer is not None and request.pooling is None:
            text = TextStream(self._tokenizer, begin, request.sampling.stop)
        params = request.sampling
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        pool = None if request.pooling is None else PoolState()
        state = RowState(SamplerState(params, begin), text, ends, pool=pool)
        seq = Sequence(request, list(begin), state, source=() if rules is None else request.prompt_token_ids)
        demand: Demand | None = None
        if rules is not None and not rules.demands_nothing:
            demand = lambda row, scores: rules.apply(row.tokens, scores, seq.max_len)  # noqa: E731
            state.sampler.rules = partial(demand, seq)
        if params.beams is not None:
            state.beams = Beams(seq, params.beams, ends, demand)
        return seq

    def prompt(self, seq: Sequence) -> PromptEvent:
        """The first event of `seq`, whose prompt is computed."""
        logprobs = tuple(seq.state.prompt_logprobs) if seq.wants_prompt_logits else None
        return PromptEvent(
            prompt_token_ids=seq.request.prompt_token_ids, logprobs=logprobs, num_cached_tokens=seq.num_cached
        )

    def note_prompt(self, seq: Sequence, count: int, logits: torch.Tensor) -> None:
        """Keep the log-probabilities of the next `count` tokens, of `logits`, where they are wanted.

        Token i + 1 is scored by the logits of token i; the first token has no score.
        """
        wanted = seq.request.sampling.prompt_logprobs
        if wanted is None or seq.num_computed >= seq.num_prompt:
            return
        known: list[TokenLogprobs | None] = seq.state.prompt_logprobs
        for offset in range(count):
            position = seq.num_computed + offset + 1
            if len(known) <= position < seq.num_prompt:  # after a preemption they come a second time
                known.append(self._with_text(token_logprobs(logits[offset], seq.tokens[position], wanted)))

    def token(self, seq: Sequence, drawn: Sampled) -> TokenEvent:
        """The event of the token that `seq` has just got; it has the finish reason where the answer ends with it."""
        state: RowState = seq.state
        text = state.text
        piece = text.push(drawn.token_id) if text else ""
        reason = None
        if drawn.token_id in state.ends or (text and text.stopped):
            reason = FinishReason.STOP
        elif len(seq.tokens) >= seq.max_len:
            reason = FinishReason.LENGTH
        if reason is not None and text:
            piece += text.flush()
        return TokenEvent(
            token_ids=(drawn.token_id,),
            text=piece,
            logprobs=() if drawn.logprobs is None else (self._with_text(drawn.logprobs),),
            finish_reason=reason,
        )

    def found(self, seq: Sequence, hypotheses: Seq[Hypothesis], num_searched: int) -> TokenEvent:
        """The last event of a search."""
        events = tuple(self._hypothesis(seq, hypothesis) for hypothesis in hypotheses)
        return TokenEvent(hypotheses=events, num_searched=num_searched, finish_reason=events[0].finish_reason)

    def _hypothesis(self, seq: Sequence, hypothesis: Hypothesis) -> TokenEvent:
        text = ""
        if self._tokenizer is not None:
            stream = TextStream(self._tokenizer, seq.together[0].tokens[: seq.num_prompt], ())
            text = "".join(map(stream.push, hypothesis.tokens)) + stream.flush()
        reason = FinishReason.STOP if hypothesis.stopped else FinishReason.LENGTH
        return TokenEvent(token_ids=tuple(hypothesis.tokens), text=text, finish_reason=reason)

    def _with_text(self, found: TokenLogprobs) -> TokenLogprobs:
        return TokenLogprobs(self._decoded(found.chosen), tuple(self._decoded(item) for item in found.top))

    def _decoded(self, item: Alternative) -> Alternative:
        if self._tokenizer is None:
            return item
        return replace(item, text=self._tokenizer.decode([item.token_id], skip_special_tokens=False))
