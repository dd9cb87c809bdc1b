"""POST /v1/completions and /v1/chat/completions without streaming, through the unmodified openai SDK."""

from __future__ import annotations

import asyncio
import contextvars
from pathlib import Path
from typing import Any

import openai
import pytest

from serving.core import (
    BASE,
    Alternative,
    ChatMessage,
    FinishReason,
    GenerateCall,
    PromptEvent,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from tests.unit.serving.http_support import (
    BACKBONE,
    OUTPUT_IDS,
    PROMPT_IDS,
    Batches,
    FakeBackend,
    digest,
    gateway,
    tokens,
)

USER = {"role": "user", "content": "hi"}


async def test_completion_has_openai_shape(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.openai.completions.create(model=BACKBONE, prompt="hi")
        assert reply.object == "text_completion"
        assert reply.model == BACKBONE
        assert reply.id.startswith("cmpl-")
        assert [choice.model_dump() for choice in reply.choices] == [
            {"index": 0, "text": "Hello, world", "logprobs": None, "finish_reason": "stop"}
        ]
        assert reply.usage is not None
        usage = reply.usage.model_dump(exclude_none=True)
        assert usage == {
            "prompt_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens": 3,
            "total_tokens": 6,
        }


async def test_cached_tokens_are_those_that_no_choice_of_a_prompt_computed(tmp_path: Path) -> None:
    cached = {"a": [32, 48], "b": [16, 0]}

    def script(call: GenerateCall) -> Batches:
        assert isinstance(call.prompt, str)
        prompt = PromptEvent(prompt_token_ids=tuple(range(64)), num_cached_tokens=cached[call.prompt].pop(0))
        return [(prompt, TokenEvent(token_ids=(1,), text="x", finish_reason=FinishReason.LENGTH))]

    async with gateway(tmp_path, FakeBackend(script=script)) as g:
        reply = await g.openai.completions.create(model=BACKBONE, prompt=["a", "b"], n=2)
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == 2 * 64
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == 32 + 0


async def test_chat_has_openai_shape(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.openai.chat.completions.create(model=BACKBONE, messages=[USER])
        assert reply.object == "chat.completion"
        assert reply.id.startswith("chatcmpl-")
        choice = reply.choices[0]
        assert (choice.message.role, choice.message.content) == ("assistant", "Hello, world")
        assert choice.finish_reason == "stop"
        assert g.backend.calls[0].prompt == (ChatMessage(role="user", content="hi"),)


async def test_length_is_reported_as_length(tmp_path: Path) -> None:
    backend = FakeBackend(script=lambda call: tokens(call, finish=FinishReason.LENGTH))
    async with gateway(tmp_path, backend) as g:
        reply = await g.openai.completions.create(model=BACKBONE, prompt="hi")
        assert reply.choices[0].finish_reason == "length"


async def test_every_sampling_field_reaches_the_backend(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.openai.completions.create(
            model=BACKBONE,
            prompt="hi",
            max_tokens=5,
            temperature=0.5,
            top_p=0.9,
            seed=7,
            stop=["a", "b"],
            presence_penalty=0.1,
            frequency_penalty=0.2,
            logit_bias={"3": -100},
            logprobs=2,
            user="ignored",
            extra_body={
                "top_k": 4,
                "min_p": 0.05,
                "repetition_penalty": 1.1,
                "stop_token_ids": [6],
                "prompt_logprobs": 1,
                "ignore_eos": True,
            },
        )
        assert g.backend.calls[0].sampling == SamplingParams(
            max_tokens=5,
            temperature=0.5,
            top_p=0.9,
            top_k=4,
            min_p=0.05,
            seed=7,
            stop=("a", "b"),
            stop_token_ids=(6,),
            presence_penalty=0.1,
            frequency_penalty=0.2,
            repetition_penalty=1.1,
            logit_bias={3: -100.0},
            logprobs=2,
            prompt_logprobs=1,
            ignore_eos=True,
        )


async def test_null_means_default(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        fields = (
            "temperature",
            "top_p",
            "n",
            "stop",
            "seed",
            "logit_bias",
            "stream",
            "suffix",
            "echo",
            "user",
        )
        body = {"model": BACKBONE, "prompt": "hi", **dict.fromkeys(fields)}
        assert (await g.http.post("/v1/completions", json=body)).status_code == 200
        assert g.backend.calls[0].sampling == SamplingParams(max_tokens=16)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, None), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 6}, 6)],
)
async def test_max_tokens_of_chat(tmp_path: Path, given: dict[str, int], expected: int | None) -> None:
    async with gateway(tmp_path) as g:
        await g.openai.chat.completions.create(model=BACKBONE, messages=[USER], **given)  # type: ignore[arg-type]
        assert g.backend.calls[0].sampling.max_tokens == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        ([1, 2], [(1, 2)]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
async def test_prompt_forms(tmp_path: Path, prompt: Any, expected: list[Any]) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.openai.completions.create(model=BACKBONE, prompt=prompt)
        assert [call.prompt for call in g.backend.calls] == expected
        assert [choice.index for choice in reply.choices] == list(range(len(expected)))
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(PROMPT_IDS) * len(expected)


async def test_n_choices_are_calls_of_their_own(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.openai.completions.create(model=BACKBONE, prompt=["a", "b"], n=2, seed=40)
        calls = g.backend.calls
        assert [(call.prompt, call.sampling.seed) for call in calls] == [
            ("a", 40),
            ("a", 41),
            ("b", 40),  # a prompt in a list draws what it draws alone
            ("b", 41),
        ]
        assert len({call.request_id for call in calls}) == 4
        assert len(reply.choices) == 4
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == 2 * len(PROMPT_IDS)  # a prompt counts once
        assert reply.usage.completion_tokens == 4 * len(OUTPUT_IDS)


async def test_calls_run_at_the_same_time(tmp_path: Path) -> None:
    backend = FakeBackend(hold=asyncio.Event())
    async with gateway(tmp_path, backend) as g:
        request = asyncio.create_task(g.openai.completions.create(model=BACKBONE, prompt="hi", n=3))
        while len(backend.open_calls) < 3:
            await asyncio.sleep(0)
        assert backend.hold is not None
        backend.hold.set()
        assert len((await request).choices) == 3
        assert backend.open_calls == set()


async def test_each_call_runs_in_a_context_of_its_own(tmp_path: Path) -> None:
    """Concurrent Ray handle calls that share the request's context leave one another unrouted for ever."""
    of_the_request = contextvars.ContextVar("of_the_request", default="empty")
    seen: list[str] = []

    def script(call: GenerateCall) -> Batches:
        seen.append(of_the_request.get())
        of_the_request.set(call.request_id)
        return tokens(call)

    async with gateway(tmp_path, FakeBackend(script=script)) as g:
        of_the_request.set("full")
        await g.openai.completions.create(model=BACKBONE, prompt="hi", n=3)
    assert seen == ["empty"] * 3


async def test_completion_logprobs(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.openai.completions.create(model=BACKBONE, prompt="hi", logprobs=1)
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == ["Hello", ",", " world"]
        assert logprobs.token_logprobs == [-0.5] * 3
        assert logprobs.text_offset == [0, 5, 6]
        assert logprobs.top_logprobs is not None
        assert logprobs.top_logprobs[0] == {"<rival>": -0.25, "Hello": -0.5}


async def test_chat_logprobs(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.openai.chat.completions.create(
            model=BACKBONE, messages=[USER], logprobs=True, top_logprobs=2
        )
        assert g.backend.calls[0].sampling.logprobs == 2
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        first = logprobs.content[0]
        assert (first.token, first.bytes, first.logprob) == ("Hello", list(b"Hello"), -0.5)
        assert [(item.token, item.logprob) for item in first.top_logprobs] == [
            ("<rival>", -0.25),
            ("Hello", -0.5),
        ]


async def test_tokens_without_a_text_of_their_own(tmp_path: Path) -> None:
    """Part of a character, and a backbone without a tokenizer."""
    rivals = (Alternative(7, -0.1, "\ufffd"), Alternative(8, -0.2), Alternative(9, float("-inf")))
    logprobs = TokenLogprobs(rivals[1], rivals)
    last = TokenEvent(token_ids=(8,), logprobs=(logprobs,), finish_reason=FinishReason.STOP)
    backend = FakeBackend(script=lambda call: [(PromptEvent(prompt_token_ids=PROMPT_IDS), last)])
    async with gateway(tmp_path, backend) as g:
        reply = await g.openai.completions.create(model=BACKBONE, prompt="hi", logprobs=3)
        flat = reply.choices[0].logprobs
        assert flat is not None
        assert flat.tokens == ["token_id:8"]
        assert flat.top_logprobs == [{"\ufffd": -0.1, "token_id:8": -0.2, "token_id:9": -9999.0}]
        chat = await g.openai.chat.completions.create(
            model=BACKBONE, messages=[USER], logprobs=True, top_logprobs=3
        )
        nested = chat.choices[0].logprobs
        assert nested is not None
        assert nested.content is not None
        assert [(item.token, item.bytes) for item in nested.content[0].top_logprobs] == [
            ("\ufffd", None),
            ("token_id:8", None),
            ("token_id:9", None),
        ]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_token_ids_and_prompt_logprobs(tmp_path: Path, path: str) -> None:
    prompt = {"messages": [USER]} if "chat" in path else {"prompt": "hi"}
    async with gateway(tmp_path) as g:
        body = {"model": BACKBONE, "return_token_ids": True, "prompt_logprobs": 1, **prompt}
        choice = (await g.http.post(path, json=body)).json()["choices"][0]
        assert choice["prompt_token_ids"] == list(PROMPT_IDS)
        assert choice["token_ids"] == list(OUTPUT_IDS)
        first, second, _ = choice["prompt_logprobs"]
        assert first is None
        assert second["2"] == {"logprob": -0.5, "decoded_token": "b"}


async def test_text_parts_and_developer_role(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.openai.chat.completions.create(
            model=BACKBONE,
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c"},
                {"role": "user", "content": "d"},
            ],
        )
        assert g.backend.calls[0].prompt == (
            ChatMessage(role="system", content="be brief"),
            ChatMessage(role="user", content="ab"),
            ChatMessage(role="assistant", content="c"),
            ChatMessage(role="user", content="d"),
        )


async def test_an_answer_can_be_sent_back_as_a_message(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.openai.chat.completions.create(model=BACKBONE, messages=[USER])
        again = [USER, reply.choices[0].message, USER]
        await g.openai.chat.completions.create(model=BACKBONE, messages=again)  # type: ignore[arg-type]
        assert g.backend.calls[1].prompt[1] == ChatMessage(role="assistant", content="Hello, world")


async def test_the_digest_goes_to_the_backend_and_back(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta")
        for model, wanted in ((BACKBONE, BASE), ("delta", digest()), ("default/delta@v1", digest())):
            raw = await g.openai.completions.with_raw_response.create(model=model, prompt="hi")
            call = g.backend.calls[-1]
            assert call.adapter_digest == wanted
            assert call.tenant == "default"
            assert raw.headers["x-adapter-digest"] == (f"sha256:{wanted}" if wanted else "base")
            assert raw.parse().model == model
        assert g.backend.calls[-1].adapter_name == "delta"


async def test_a_name_is_resolved_anew_for_every_request(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.push("delta", seed=1)
        await g.openai.completions.create(model="delta", prompt="hi")
        await g.push("delta", seed=2)
        await g.openai.completions.create(model="delta", prompt="hi")
        assert [call.adapter_digest for call in g.backend.calls] == [digest(1), digest(2)]


async def test_a_version_that_is_not_ready_is_not_found(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        facts = {
            "method": "LORA",
            "backbone_digest": "",
            "task": "",
            "size_bytes": 1,
            "labels": {},
            "proof": {},
        }
        g.registry.publish("default", "delta", "d" * 64, status="failed", **facts)
        with pytest.raises(openai.NotFoundError):
            await g.openai.completions.create(model="delta@v1", prompt="hi")
        assert g.backend.calls == []


async def test_chat_needs_a_template(tmp_path: Path) -> None:
    async with gateway(tmp_path, FakeBackend(has_chat_template=False)) as g:
        with pytest.raises(openai.BadRequestError) as caught:
            await g.openai.chat.completions.create(model=BACKBONE, messages=[USER])
        assert caught.value.param == "messages"
