"""From logits to tokens, each row by its own parameters and its own random stream.

A row's draw never depends on the other rows: every request has its own generator. Log-probabilities are those of the
unmodified distribution. Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from serving.core import Alternative, SamplingParams, TokenLogprobs


@dataclass(slots=True)
class SamplerState:
    """One request's parameters, random stream and token counts (counted only where a penalty needs them).

    `rules` reshapes logits [V] as the backbone demands, after what the request asks for.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    generator: torch.Generator | None = None
    generated: Counter[int] = field(default_factory=Counter)
    rules: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.params.temperature > 0:
            seed = secrets.randbits(63) if self.params.seed is None else self.params.seed & ((1 << 63) - 1)
            self.generator = torch.Generator().manual_seed(seed)

    @property
    def reshapes(self) -> bool:
        """True when the logits are changed before a token is chosen."""
        p = self.params
        penalised = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
        return bool(penalised or p.logit_bias or self.rules is not None)


class Sampled(NamedTuple):
    """The token of one row; `token_id` -1 when the row's logits are not finite."""

    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits_RV: Tensor, states: Sequence[SamplerState]) -> list[Sampled]:
    """One token per row. Shapes: logits [R, V] fp32, R = len(states)."""
    greedy = logits_RV.argmax(dim=-1)
    finite = torch.isfinite(
        logits_RV.sum(dim=-1)
    )  # one pass over the row; whatever is not finite stays so in a sum
    tokens, healthy = greedy.tolist(), finite.tolist()
    result = []
    for index, state in enumerate(states):
        if not healthy[index]:
            result.append(Sampled(-1, None))
            continue
        token = tokens[index]
        if state.params.temperature > 0 or state.reshapes:
            token = _draw(logits_RV[index], state)
        state.generated[token] += 1
        wanted = state.params.logprobs
        result.append(
            Sampled(token, None if wanted is None else token_logprobs(logits_RV[index], token, wanted))
        )
    return result


def token_logprobs(logits_V: Tensor, token_id: int, count: int) -> TokenLogprobs:
    """Natural-log probabilities of `token_id` and of the `count` likeliest tokens. Shapes: logits [V]."""
    logprobs = torch.log_softmax(logits_V, dim=-1)
    values, ids = logprobs.topk(count)
    top = tuple(Alternative(i, v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(Alternative(token_id, float(logprobs[token_id])), top)


def _draw(logits_V: Tensor, state: SamplerState) -> int:
    params = state.params
    logits = _reshape(logits_V.clone(), state) if state.reshapes else logits_V
    if params.temperature == 0:
        return int(logits.argmax())
    logits = (logits / params.temperature).cpu()
    if 0 < params.top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    if params.top_p < 1.0:
        ordered, order = probs.sort(descending=True)
        outside = ordered.cumsum(0) - ordered >= params.top_p  # the token that crosses the bound stays
        probs[order[outside]] = 0.0
    if params.min_p > 0.0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0.0)
    return int(torch.multinomial(probs, 1, generator=state.generator))


def _reshape(logits_V: Tensor, state: SamplerState) -> Tensor:
    """Penalties and biases. Repetition looks at prompt and output (CTRL), the other two at the output (OpenAI)."""
    params, device = state.params, logits_V.device
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*state.prompt_token_ids, *state.generated}), device=device)
        values = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if state.generated and (params.presence_penalty or params.frequency_penalty):
        ids = torch.tensor(list(state.generated.keys()), device=device)
        counts = torch.tensor(list(state.generated.values()), dtype=logits_V.dtype, device=device)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias.keys()), device=device)
        logits_V[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits_V.dtype, device=device)
    if state.rules is not None:
        logits_V = state.rules(logits_V)
    return logits_V
