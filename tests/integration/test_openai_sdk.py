"""The unmodified openai SDK against a real server: every answer it reads and every error it types."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx
import openai
import pytest

from tests.integration.support import GREEDY, gauge, token_ids, wait_for
from tests.integration.world import BACKBONE, CONTEXT, DELTAS, NUM_TOKENS, PROMPTS, World

pytestmark = pytest.mark.cluster


# -- answers ---------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI, deltas: dict[str, Any]) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {BACKBONE, *deltas}
    assert listed["lora-a"].parent == BACKBONE  # type: ignore[attr-defined]
    assert client.models.retrieve("lora-a@v1").id == "lora-a@v1"


@pytest.mark.parametrize("model", [BACKBONE, *DELTAS])
def test_tokens_are_the_reference_librarys(
    client: openai.OpenAI, world: World, deltas: dict[str, Any], model: str
) -> None:
    for prompt in PROMPTS:
        assert token_ids(client, model, prompt) == world.reference[model, prompt]


def test_each_delta_has_one_home_among_the_replicas(http: httpx.Client, deltas: dict[str, Any]) -> None:
    # admitted there, and asked for one by one since: nothing has spilled
    assert gauge(http, "deltamux_adapters_resident") == len(deltas)


def test_every_reference_to_a_version_is_the_same_delta(
    client: openai.OpenAI, deltas: dict[str, Any]
) -> None:
    digest = deltas["lora-a"]["digest"]
    for model in ("lora-a", "lora-a:latest", "lora-a@v1", f"lora-a@{digest}", "default/lora-a"):
        answer = client.completions.with_raw_response.create(model=model, prompt="?", max_tokens=1)
        assert answer.headers["x-adapter-digest"] == digest


def test_chat(client: openai.OpenAI, deltas: dict[str, Any]) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(model="lora-a", messages=messages, **GREEDY)
    same = client.completions.create(model="lora-a", prompt="user: hello\nassistant:", **GREEDY)
    assert chat.choices[0].message.content == same.choices[0].text
    assert chat.usage is not None
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens


def test_stream(client: openai.OpenAI, deltas: dict[str, Any]) -> None:
    whole = client.completions.create(
        model="lora-b", prompt="hello", **GREEDY, extra_body={"ignore_eos": True}
    )
    chunks = list(
        client.completions.create(
            model="lora-b",
            prompt="hello",
            **GREEDY,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        "length"
    ]
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == NUM_TOKENS


def test_logprobs(client: openai.OpenAI, deltas: dict[str, Any]) -> None:
    legacy = (
        client.completions.create(model="prefix", prompt="hello", **GREEDY, logprobs=2).choices[0].logprobs
    )
    assert legacy is not None
    assert legacy.token_logprobs is not None
    assert all(value <= 0 for value in legacy.token_logprobs)
    messages: Any = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(
        model="prefix", messages=messages, **GREEDY, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)  # greedy takes the likeliest


def test_a_file_in_parts_becomes_a_delta(client: openai.OpenAI, world: World, deltas: dict[str, Any]) -> None:
    ids = []
    for path in sorted(world.delta("lora-a").glob("adapter_*")):
        upload = client.uploads.upload_file_chunked(
            file=path,
            mime_type="application/octet-stream",
            purpose="user_data",
            part_size=4096,
            md5=hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest(),
        )
        assert upload.file is not None
        ids.append(upload.file.id)
    body, headers = {"file_ids": ids}, {"Idempotency-Key": "in-parts"}
    made, again = (
        client.with_options(default_headers=headers).put(
            "/adapters/in-parts/versions", cast_to=object, body=body
        )
        for _ in range(2)
    )
    assert made == again
    assert made["digest"] == deltas["lora-a"]["digest"]  # type: ignore[index]
    assert token_ids(client, "in-parts", PROMPTS[0]) == world.reference["lora-a", PROMPTS[0]]
    client.delete("/adapters/in-parts", cast_to=object)


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind", "code", "param"),
    [
        ({"model": "absent"}, openai.NotFoundError, "model_not_found", "model"),
        ({"model": "No Name!"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"max_tokens": CONTEXT - 4}, openai.BadRequestError, "context_length_exceeded", None),
        ({"prompt": [[999999]]}, openai.BadRequestError, "invalid_value", "prompt"),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "unknown_parameter", "nonsense"),
    ],
)
def test_refusals(
    client: openai.OpenAI,
    body: dict[str, Any],
    kind: type[openai.APIStatusError],
    code: str,
    param: str | None,
) -> None:
    with pytest.raises(kind) as refused:
        client.completions.create(**{"model": BACKBONE, "prompt": "hello", "max_tokens": 4} | body)
    assert refused.value.code == code
    assert param in (None, refused.value.param)


def test_a_full_queue_is_a_rate_limit(client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(
            model=BACKBONE, prompt=["hello"] * 8, n=16, max_tokens=200, extra_body={"ignore_eos": True}
        )
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.response.headers["retry-after"]
    wait_for(lambda: gauge(http, "vllm:num_requests_running") + gauge(http, "vllm:num_requests_waiting") == 0)


def test_a_lost_compare_and_swap_is_a_conflict(client: openai.OpenAI, deltas: dict[str, Any]) -> None:
    path, body = "/adapters/lora-a/aliases/prod", {"version": 1, "expected_revision": 0}
    client.put(path, cast_to=object, body=body)
    with pytest.raises(openai.ConflictError) as lost:
        client.put(path, cast_to=object, body=body)
    assert lost.value.code == "conflict"


def test_a_body_over_the_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(model=BACKBONE, prompt="x" * (9 << 20))
    assert refused.value.status_code == 413
