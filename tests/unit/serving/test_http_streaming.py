"""Streams: OpenAI's chunks, errors before and after the first byte, and callers that go away."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest

from adapters.errors import ErrorInfo
from serving.core import FailureEvent, FinishReason, GenerateCall, PromptEvent, TokenEvent
from tests.unit.serving.http_support import (
    BACKBONE,
    OUTPUT_IDS,
    PROMPT_IDS,
    Batches,
    FakeBackend,
    Gateway,
    gateway,
    listening,
    sse_events,
    tokens,
    until,
)

USER = {"role": "user", "content": "hi"}
OVERLOADED = ErrorInfo("Overloaded", "The queue is full.")
BROKEN = ErrorInfo("Unavailable", "The replica is gone.")


async def post(g: Gateway, path: str = "/v1/completions", **fields: Any) -> list[Any]:
    """The events of one stream."""
    prompt = {"messages": [USER]} if "chat" in path else {"prompt": "hi"}
    reply = await g.http.post(path, json={"model": BACKBONE, "stream": True, **prompt, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    return sse_events(reply.text)


def raw_post(body: Any) -> bytes:
    """A completion request as it goes over a socket."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + data


async def test_chat_chunks(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        *chunks, done = await post(g, "/v1/chat/completions")
        assert done == "[DONE]"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert all("usage" not in chunk for chunk in chunks)
        choices = [chunk["choices"][0] for chunk in chunks]
        assert [choice["delta"] for choice in choices] == [
            {"role": "assistant", "content": ""},
            {"content": "Hello"},
            {"content": ","},
            {"content": " world"},
            {},
        ]
        assert [choice["finish_reason"] for choice in choices] == [None, None, None, None, "stop"]


async def test_completion_chunks(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        *chunks, done = await post(g)
        assert done == "[DONE]"
        choices = [chunk["choices"][0] for chunk in chunks]
        assert [(choice["text"], choice["finish_reason"]) for choice in choices] == [
            ("Hello", None),
            (",", None),
            (" world", "stop"),
        ]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_usage_comes_last_and_is_null_before(tmp_path: Path, path: str) -> None:
    async with gateway(tmp_path) as g:
        *chunks, last, _ = await post(g, path, stream_options={"include_usage": True}, n=2)
        assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"] == {
            "prompt_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens": 6,
            "total_tokens": 9,
        }


async def test_the_sdk_reads_a_stream(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        stream = await g.openai.chat.completions.create(
            model=BACKBONE, messages=[USER], stream=True, stream_options={"include_usage": True}, n=2
        )
        texts = {0: "", 1: ""}
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == {0: "Hello, world", 1: "Hello, world"}
        assert chunk.usage is not None
        assert chunk.usage.completion_tokens == 6


async def test_stream_and_reply_say_the_same(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        fields = {"logprobs": 1, "return_token_ids": True, "prompt_logprobs": 1}
        whole = await g.http.post("/v1/completions", json={"model": BACKBONE, "prompt": "hi", **fields})
        expected = whole.json()["choices"][0]
        *chunks, _ = await post(g, **fields)
        opening, *rest = [chunk["choices"][0] for chunk in chunks]
        assert opening["prompt_token_ids"] == expected["prompt_token_ids"] == list(PROMPT_IDS)
        assert opening["prompt_logprobs"] == expected["prompt_logprobs"]
        assert [token for part in rest for token in part["token_ids"]] == expected["token_ids"]
        for key, values in expected["logprobs"].items():
            assert [item for part in rest for item in part["logprobs"][key]] == values, key
        assert "".join(part["text"] for part in rest) == expected["text"]


async def test_tokens_that_came_together_are_one_chunk(tmp_path: Path) -> None:
    def script(call: GenerateCall) -> Batches:
        first, second, third = tokens(call)
        return [first, second + third]

    async with gateway(tmp_path, FakeBackend(script=script)) as g:
        *chunks, _ = await post(g)
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hello", ", world"]


async def test_an_incomplete_character_is_no_chunk(tmp_path: Path) -> None:
    script = [
        (PromptEvent(prompt_token_ids=PROMPT_IDS),),
        (TokenEvent(token_ids=(1,), text=""),),
        (TokenEvent(token_ids=(2,), text="é", finish_reason=FinishReason.STOP),),
    ]
    async with gateway(tmp_path, FakeBackend(script=lambda call: script)) as g:
        *chunks, _ = await post(g)
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["é"]


async def test_refusal_before_the_first_event_is_a_status(tmp_path: Path) -> None:
    backend = FakeBackend(script=lambda call: [(FailureEvent(error=OVERLOADED),)])
    async with gateway(tmp_path, backend) as g:
        with pytest.raises(openai.RateLimitError):
            await g.openai.completions.create(model=BACKBONE, prompt="hi", stream=True)


async def test_refusal_of_one_choice_is_a_status_and_cancels_the_others(tmp_path: Path) -> None:
    def script(call: GenerateCall) -> Batches:
        return [(FailureEvent(error=OVERLOADED),)] if call.request_id.endswith("-2") else tokens(call)

    async with gateway(tmp_path, FakeBackend(script=script, hold=asyncio.Event())) as g:
        with pytest.raises(openai.RateLimitError):
            await g.openai.completions.create(model=BACKBONE, prompt="hi", n=3, stream=True)
        assert g.backend.open_calls == set()


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ((TokenEvent(finish_reason=FinishReason.ERROR, error=BROKEN),), "unavailable"),
        ((TokenEvent(finish_reason=FinishReason.ERROR),), "internal_error"),
        ((TokenEvent(finish_reason=FinishReason.CANCELLED),), "unavailable"),
        (ValueError("canary of a library"), "internal_error"),
        (None, "internal_error"),  # the backend's stream just ends
    ],
)
async def test_error_after_the_first_byte_is_the_last_event(tmp_path: Path, last: Any, code: str) -> None:
    def script(call: GenerateCall) -> Batches:
        return [tokens(call)[0], *([last] if last else [])]

    async with gateway(tmp_path, FakeBackend(script=script)) as g:
        first, error = await post(g)
        assert first["choices"][0]["text"] == "Hello"
        assert error["error"]["code"] == code
        assert "canary" not in json.dumps(error)
        with pytest.raises(openai.APIError, match=re.escape(error["error"]["message"])):
            async for _ in await g.openai.completions.create(model=BACKBONE, prompt="hi", stream=True):
                pass


@pytest.mark.parametrize(
    ("last", "error"),
    [
        (TokenEvent(finish_reason=FinishReason.CANCELLED), openai.InternalServerError),
        (TokenEvent(finish_reason=FinishReason.ERROR, error=OVERLOADED), openai.RateLimitError),
    ],
)
async def test_a_cut_reply_is_never_passed_off_as_one(
    tmp_path: Path, last: TokenEvent, error: type[openai.APIStatusError]
) -> None:
    backend = FakeBackend(script=lambda call: [tokens(call)[0], (last,)])
    async with gateway(tmp_path, backend) as g:
        with pytest.raises(error):
            await g.openai.completions.create(model=BACKBONE, prompt="hi")


@pytest.mark.parametrize("stream", [False, True])
async def test_timeout(tmp_path: Path, stream: bool) -> None:
    backend = FakeBackend(script=lambda call: [tokens(call)[0], tokens(call)[1]], hold=asyncio.Event())
    async with gateway(tmp_path, backend, request_timeout_s=0.05) as g:
        if stream:
            _, error = await post(g)
            assert error["error"]["code"] == "unavailable"
        else:
            with pytest.raises(openai.InternalServerError, match="longer than"):
                await g.openai.completions.create(model=BACKBONE, prompt="hi")
        assert backend.open_calls == set()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_goes_away_cancels_every_call(tmp_path: Path, stream: bool) -> None:
    backend = FakeBackend(hold=asyncio.Event())
    async with gateway(tmp_path, backend) as g, listening(g.app) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(raw_post({"model": BACKBONE, "prompt": "hi", "n": 3, "stream": stream}))
        if stream:
            assert b"Hello" in await reader.readuntil(b"\n\n")
        await until(lambda: len(backend.open_calls) == 3)
        writer.close()
        await until(lambda: not backend.open_calls)
        status = "200" if stream else "499"
        await until(lambda: g.sample("deltamux_requests_total", route="/v1/completions", status=status) == 1)


async def test_a_slow_reader_holds_its_own_call_back(tmp_path: Path) -> None:
    produced = 0

    def script(call: GenerateCall) -> Batches:
        nonlocal produced
        batches = [tokens(call)[0]]
        batches += [(TokenEvent(token_ids=(5,), text="x" * 4096),)] * 4000
        return [*batches, (TokenEvent(finish_reason=FinishReason.STOP),)]

    class Counting(FakeBackend):
        async def generate(self, call: GenerateCall) -> Any:
            nonlocal produced
            async for batch in super().generate(call):
                produced += 1
                yield batch

    async with gateway(tmp_path, Counting(script=script)) as g, listening(g.app) as (host, port):
        _, writer = await asyncio.open_connection(host, port, limit=1024)
        writer.write(raw_post({"model": BACKBONE, "prompt": "hi", "stream": True}))
        await until(lambda: produced > 10)
        seen = -1
        while seen != produced:  # until the sockets' buffers are full
            seen = produced
            await asyncio.sleep(0.2)
        assert produced < 3900
        writer.close()
        await until(lambda: not g.backend.open_calls)


async def test_token_times_are_measured(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        await g.openai.completions.create(model=BACKBONE, prompt="hi", n=2)
        assert g.sample("deltamux_time_to_first_token_seconds_count") == 2
        assert g.sample("deltamux_inter_token_seconds_count") == 2 * (len(OUTPUT_IDS) - 1)
