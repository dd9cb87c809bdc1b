"""Sampling: each parameter changes what it should, and a row never depends on its neighbours."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from adapters.errors import InvalidRequest
from serving.core import SamplingParams
from serving.engine.sampler import Sampled, SamplerState, sample


def state(prompt: tuple[int, ...] = (), **params: object) -> SamplerState:
    return SamplerState(SamplingParams(**params), prompt)  # type: ignore[arg-type]


def draw(logits: list[float], count: int, **params: object) -> Counter[int]:
    row, s = torch.tensor([logits]), state(seed=3, **params)
    return Counter(sample(row, [s])[0].token_id for _ in range(count))


LOGITS = [2.0, 1.0, 0.0, -1.0]


def test_greedy_takes_the_largest() -> None:
    assert sample(torch.tensor([LOGITS]), [state(temperature=0.0)])[0] == Sampled(0, None)


def test_temperature_one_follows_the_softmax() -> None:
    counts = draw(LOGITS, 4000, temperature=1.0)
    expected = torch.softmax(torch.tensor(LOGITS), 0)
    for token in range(4):
        assert counts[token] / 4000 == pytest.approx(float(expected[token]), abs=0.03)


def test_top_k_top_p_and_min_p_cut_the_tail() -> None:
    assert set(draw(LOGITS, 500, top_k=2)) == {0, 1}
    assert set(draw(LOGITS, 500, top_p=0.7)) == {0, 1}  # 0.64 alone does not reach 0.7
    assert set(draw(LOGITS, 500, top_p=0.6)) == {0}
    assert set(draw(LOGITS, 500, min_p=0.2)) == {0, 1}


def test_same_seed_gives_the_same_tokens_in_any_company() -> None:
    torch.manual_seed(0)
    steps = [torch.randn(3, 50) for _ in range(20)]
    alone = state(seed=11)
    row = [sample(logits[1:2], [alone])[0].token_id for logits in steps]
    together = [state(seed=5), state(seed=11), state(seed=9, top_k=3)]
    mixed = [sample(logits, together)[1].token_id for logits in steps]
    assert mixed == row
    assert len(set(row)) > 5


def test_unseeded_requests_differ() -> None:
    logits = torch.zeros(2, 1000)
    a, b = state(), state()
    first = [tuple(x.token_id for x in sample(logits, [a, b])) for _ in range(4)]
    assert any(x != y for x, y in first)


def test_penalties_use_what_was_generated() -> None:
    row = torch.tensor([[1.0, 0.9, 0.0]])
    s = state(temperature=0.0, frequency_penalty=0.5)
    assert [sample(row, [s])[0].token_id for _ in range(3)] == [0, 1, 0]
    s = state(temperature=0.0, presence_penalty=2.0)
    assert [sample(row, [s])[0].token_id for _ in range(3)] == [0, 1, 2]


def test_repetition_penalty_covers_the_prompt() -> None:
    row = torch.tensor([[1.0, 0.9, 0.0]])
    assert sample(row, [state(prompt=(0,), temperature=0.0, repetition_penalty=2.0)])[0].token_id == 1


def test_logit_bias_moves_the_choice_but_not_the_logprobs() -> None:
    s = state(temperature=0.0, logit_bias={3: 100.0}, logprobs=2)
    token, logprobs = sample(torch.tensor([LOGITS]), [s])[0]
    assert token == 3
    assert logprobs is not None
    expected = torch.log_softmax(torch.tensor(LOGITS), 0)
    assert logprobs.chosen.logprob == pytest.approx(float(expected[3]))
    assert [a.token_id for a in logprobs.top] == [0, 1]


def test_non_finite_row_is_reported_and_spares_the_others() -> None:
    logits = torch.tensor([[0.0, math.nan], [0.0, 1.0]])
    out = sample(logits, [state(temperature=0.0), state(temperature=0.0)])
    assert [x.token_id for x in out] == [-1, 1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1),
        ("min_p", -1.0),
        ("max_tokens", 0), ("max_tokens", -5), ("presence_penalty", 3.0), ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0), ("logprobs", -1), ("logprobs", 21), ("stop", ("",)), ("logit_bias", {1: 1000.0}),
        ("seed", 1 << 64),
    ],
)  # fmt: skip
def test_out_of_range_names_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field
