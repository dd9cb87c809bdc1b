"""Beam search over HTTP: its fields, its choices, and what it is charged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serving.core import BeamParams, FinishReason, GenerateCall, PromptEvent, TokenEvent
from tests.unit.serving.engine_gateway import complete, engine_gateway, make_backbone
from tests.unit.serving.http_support import BACKBONE, PROMPT_IDS, Batches, FakeBackend, gateway

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 16},
}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stream": True}, "stream"),
    ({"temperature": 0.7}, "temperature"),
    ({"top_p": 0.9}, "top_p"),
    ({"top_k": 5}, "top_k"),
    ({"min_p": 0.1}, "min_p"),
    ({"stop": "x"}, "stop"),
    ({"presence_penalty": 1}, "presence_penalty"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"repetition_penalty": 1.5}, "repetition_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"n": 5}, "n"),
    ({"num_beams": 17}, "num_beams"),
    ({"num_beams": 0}, "num_beams"),
    ({"num_beams": "4"}, "num_beams"),
    ({"length_penalty": 5.5}, "length_penalty"),
    ({"early_stopping": "always"}, "early_stopping"),
    ({"num_beams": None, "length_penalty": 1.0}, "length_penalty"),
    ({"num_beams": 1, "early_stopping": True}, "early_stopping"),
]


def searched(call: GenerateCall) -> Batches:
    """The prompt, two steps, then the hypotheses."""
    beams = call.sampling.beams
    assert beams is not None
    step = TokenEvent(num_searched=beams.width)
    hypotheses = tuple(
        TokenEvent(token_ids=(10, at), text=f"{call.prompt} {at}", finish_reason=FinishReason.STOP)
        for at in range(beams.num_returned)
    )
    last = TokenEvent(
        num_searched=beams.width, hypotheses=hypotheses, finish_reason=hypotheses[0].finish_reason
    )
    return [(PromptEvent(prompt_token_ids=PROMPT_IDS), step), (step, last)]


async def test_choices_are_the_best_hypotheses_of_each_prompt(tmp_path: Path) -> None:
    backend = FakeBackend(script=searched)
    async with gateway(tmp_path, backend) as g:
        body = {"num_beams": 4, "length_penalty": 0.5, "early_stopping": "never"}
        reply = await g.openai.completions.create(
            model=BACKBONE, prompt=["a", "b"], n=2, max_tokens=5, extra_body=body
        )
        assert [(c.index, c.text, c.finish_reason) for c in reply.choices] == [
            (at, text, "stop") for at, text in enumerate(["a 0", "a 1", "b 0", "b 1"])
        ]
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2 * 3, 2 * 3 * 4)
        assert [call.prompt for call in backend.calls] == ["a", "b"]
        expected = BeamParams(width=4, num_returned=2, length_penalty=0.5, early_stopping="never")
        assert {call.sampling.beams for call in backend.calls} == {expected}
        assert {call.sampling.temperature for call in backend.calls} == {0.0}


@pytest.mark.parametrize("path", BODIES)
async def test_what_a_search_does_not_do_is_refused_by_name(tmp_path: Path, path: str) -> None:
    async with gateway(tmp_path, FakeBackend(script=searched)) as g:
        body = {"model": BACKBONE, "num_beams": 4, **BODIES[path]}
        taken = await g.http.post(path, json=body | {"temperature": 0, "top_p": 1.0, "seed": 3})
        assert taken.status_code == 200, taken.text
        logprobs: object = 1 if path == "/v1/completions" else True
        for fields, param in [*REFUSED, ({"logprobs": logprobs}, "logprobs")]:
            reply = await g.http.post(path, json=body | fields)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), fields
        assert len(g.backend.calls) == 1


async def test_limits_count_beams(tmp_path: Path) -> None:
    async with gateway(tmp_path, FakeBackend(script=searched), max_n=6, max_choices=8) as g:
        for fields, param in (
            ({"num_beams": 7}, "num_beams"),
            ({"prompt": ["a"] * 3, "num_beams": 4}, "prompt"),
        ):
            reply = await g.http.post("/v1/completions", json={"model": BACKBONE, "prompt": "a"} | fields)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        body = {"model": BACKBONE, "prompt": [1, 2, 3], "max_tokens": 10, "num_beams": 4}
        g.limited(tokens_per_min=42)  # of 3 + 4 * 10
        assert (await g.http.post("/v1/completions", json=body)).status_code == 429
        g.limited(tokens_per_min=43)
        assert (await g.http.post("/v1/completions", json=body)).status_code == 200


async def test_an_engine_gives_distinct_hypotheses_and_charges_every_beam(tmp_path: Path) -> None:
    async with engine_gateway(tmp_path, make_backbone()) as g:
        reply = await complete(g, BACKBONE, "and now?", num_beams=4, n=3)
        assert reply.status_code == 200, reply.text
        choices = reply.json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        assert len({tuple(choice["token_ids"]) for choice in choices}) == 3
        assert all(len(choice["token_ids"]) == 8 and choice["text"] for choice in choices)
        assert reply.json()["usage"]["completion_tokens"] == 4 * 8
        too_wide = await complete(g, BACKBONE, "and now?", num_beams=9)
        assert (too_wide.status_code, too_wide.json()["error"]["param"]) == (400, "num_beams")
