"""Every error class has its status and its place in the envelope; nothing of the inside shows."""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from adapters import errors
from adapters.errors import DeltamuxError, ErrorInfo
from adapters.registry import Registry
from serving.core import FailureEvent
from serving.http.errors import ANSWERS, INTERNAL_MESSAGE, reply_to
from serving.http.schemas import AliasBody, ChatBody, CompletionBody
from tests.unit.serving.http_support import (
    BACKBONE,
    FakeBackend,
    Gateway,
    Pauses,
    gateway,
    listening,
    pair,
    tokens,
    until,
)

USER = {"role": "user", "content": "hi"}
CANARY = "canary-7f3a"
FIELD = "canary-field-9c1e"
"""The name of a field; a refusal says which one it does not know."""


def tree(root: type[DeltamuxError] = DeltamuxError) -> Iterator[type[DeltamuxError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


@pytest.mark.parametrize(
    ("kind", "sdk_error", "status", "code"),
    [
        ("InvalidRequest", openai.BadRequestError, 400, "invalid_value"),
        ("InvalidReference", openai.BadRequestError, 400, "invalid_value"),
        ("ContextLengthExceeded", openai.BadRequestError, 400, "context_length_exceeded"),
        ("InvalidDelta", openai.BadRequestError, 400, "invalid_adapter"),
        ("PayloadTooLarge", openai.APIStatusError, 413, "payload_too_large"),
        ("Unauthenticated", openai.AuthenticationError, 401, "invalid_api_key"),
        ("Forbidden", openai.PermissionDeniedError, 403, "insufficient_permissions"),
        ("NotFound", openai.NotFoundError, 404, "not_found"),
        ("Conflict", openai.ConflictError, 409, "conflict"),
        ("Overloaded", openai.RateLimitError, 429, "rate_limit_exceeded"),
        ("RateLimited", openai.RateLimitError, 429, "rate_limit_exceeded"),
        ("QuotaExceeded", openai.RateLimitError, 429, "insufficient_quota"),
        ("Unavailable", openai.InternalServerError, 503, "unavailable"),
        ("StoreError", openai.InternalServerError, 503, "unavailable"),
        ("RegistryUnavailable", openai.InternalServerError, 503, "unavailable"),
        ("DeltamuxError", openai.InternalServerError, 500, "internal_error"),
    ],
)
async def test_each_class_of_ours_as_the_sdk_sees_it(
    tmp_path: Path, kind: str, sdk_error: type[openai.APIStatusError], status: int, code: str
) -> None:
    info = ErrorInfo(kind, "What is wrong.", "prompt", "What to do.", problems=("one", "two"))
    backend = FakeBackend(script=lambda call: [(FailureEvent(error=info),)])
    async with gateway(tmp_path, backend) as g:
        with pytest.raises(sdk_error) as caught:
            await g.openai.completions.create(model=BACKBONE, prompt="hi")
        error = caught.value
        assert (error.status_code, error.code, error.param) == (status, code, "prompt")
        assert error.type
        assert isinstance(error.body, dict)
        if kind == "InvalidDelta":
            assert error.body["problems"] == ["one", "two"]
        else:
            assert error.body["message"] == "What is wrong. What to do."
            assert "problems" not in error.body
        assert error.request_id
        assert error.response.headers["x-adapter-digest"] == "base"


def test_every_class_of_the_tree_is_answered() -> None:
    for kind in tree():
        error = kind(["p"]) if issubclass(kind, errors.InvalidDelta) else kind("m")
        assert 400 <= reply_to(error).status <= 503
    assert set(ANSWERS) <= set(tree())


@pytest.mark.parametrize(
    ("kind", "header", "value"),
    [
        ("Overloaded", "retry-after", "1"),
        ("Unavailable", "retry-after", "1"),
        ("Conflict", "x-should-retry", "false"),
    ],
)
async def test_headers_that_steer_the_sdks_retries(
    tmp_path: Path, kind: str, header: str, value: str
) -> None:
    backend = FakeBackend(script=lambda call: [(FailureEvent(error=ErrorInfo(kind, "m")),)])
    async with gateway(tmp_path, backend) as g:
        reply = await g.http.post("/v1/completions", json={"model": BACKBONE, "prompt": "hi"})
        assert reply.headers[header] == value


@pytest.mark.parametrize(
    ("kind", "pauses"),
    [
        ("InvalidRequest", []),
        ("PayloadTooLarge", []),
        ("Unauthenticated", []),
        ("Forbidden", []),
        ("NotFound", []),
        ("Conflict", []),
        ("QuotaExceeded", []),
        ("Overloaded", [1.0, 1.0]),
        ("RateLimited", [1.0, 1.0]),
        ("Unavailable", [1.0, 1.0]),
        ("RegistryUnavailable", [1.0, 1.0]),
        (
            "DeltamuxError",
            [pytest.approx(0.45, abs=0.1), pytest.approx(0.9, abs=0.2)],
        ),  # the SDK's own choice
    ],
)
async def test_what_the_sdk_repeats_and_when(
    tmp_path: Path, kind: str, pauses: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = Pauses(monkeypatch)
    backend = FakeBackend(script=lambda call: [(FailureEvent(error=ErrorInfo(kind, "m")),)])
    async with gateway(tmp_path, backend) as g:
        sdk = g.openai.with_options(max_retries=2)
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError):
                await sdk.completions.create(model=BACKBONE, prompt="hi", stream=stream)
            assert slept.lengths == pauses
            assert len(backend.calls) == 1 + len(pauses)
            slept.lengths.clear()
            backend.calls.clear()


async def test_the_sdks_retry_of_what_was_only_momentary_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = Pauses(monkeypatch)
    failures = [FailureEvent(error=ErrorInfo(kind, "m")) for kind in ("Unavailable", "Overloaded")]
    backend = FakeBackend(script=lambda call: [(failures.pop(),)] if failures else tokens(call))
    async with gateway(tmp_path, backend) as g:
        answer = await g.openai.with_options(max_retries=2).completions.create(model=BACKBONE, prompt="hi")
        assert answer.choices[0].text == "Hello, world"
        assert slept.lengths == [1.0, 1.0]


async def test_a_client_that_runs_out_of_time_frees_its_request(tmp_path: Path) -> None:
    backend = FakeBackend(hold=asyncio.Event())
    async with gateway(tmp_path, backend) as g, listening(g.app) as (host, port):
        sdk = openai.AsyncOpenAI(api_key="x", base_url=f"http://{host}:{port}/v1", timeout=0.3, max_retries=1)
        async with sdk:
            with pytest.raises(openai.APITimeoutError):
                await sdk.completions.create(model=BACKBONE, prompt="hi")
        await until(lambda: not backend.open_calls)
        assert len(backend.calls) == 2  # both attempts reached the server, and both are over there too
        await until(lambda: g.sample("deltamux_usage_requests_total", outcome="cancelled") == 2)


async def test_the_description_has_the_statuses_that_are_sent(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        paths = (await g.http.get("/openapi.json")).json()["paths"]
        documented = {status for item in paths.values() for op in item.values() for status in op["responses"]}
        assert {"400", "401", "403", "404", "409", "413", "429", "503"} < documented
        assert not documented & {"408", "422"}
        assert not {answer.status for answer in ANSWERS.values()} & {408, 422}


COMPLETION_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 1 << 60}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"prompt": ["x"] * 20, "n": 16}, "prompt"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": 0}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"echo": True}, "echo"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"seed": 1 << 80}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1 << 40]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"model": 3}, "model"),
    ({"model": ""}, "model"),
    ({"model": "x" * 301}, "model"),
    ({"adapters": [{"model": "a", "weight": 0.5}]}, "adapters"),
    ({"models": ["a", "b"]}, "models"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"guided_json": {}}, "guided_json"),
]


@pytest.mark.parametrize(("fields", "param"), COMPLETION_FAULTS, ids=lambda value: json.dumps(value)[:40])
async def test_faulty_completion_names_the_field(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.post("/v1/completions", json={"model": BACKBONE, "prompt": "hi", **fields})
        assert_envelope(reply, 400, param)
        assert param in reply.json()["error"]["message"]
        assert g.backend.calls == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [USER, {"role": "user", "content": None}]}, "messages[1].content"),
        ({"messages": [{**USER, "name": "me"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"prompt": "hi"}, "prompt"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
async def test_faulty_chat_names_the_field(tmp_path: Path, fields: dict[str, Any], param: str) -> None:
    async with gateway(tmp_path) as g:
        body = {"model": BACKBONE, "messages": [USER], **fields}
        reply = await g.http.post("/v1/chat/completions", json=body)
        assert_envelope(reply, 400, param)
        assert g.backend.calls == []


async def test_harmless_values_of_refused_fields_pass(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        body = {"model": BACKBONE, "prompt": "hi", "echo": False, "suffix": "", "best_of": 2, "n": 2}
        assert (await g.http.post("/v1/completions", json=body)).status_code == 200
        chat = {"model": BACKBONE, "messages": [USER], "tools": None, "tool_choice": "none"}
        chat["response_format"] = {"type": "text"}
        assert (await g.http.post("/v1/chat/completions", json=chat)).status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_none(tmp_path: Path, number: str) -> None:
    async with gateway(tmp_path) as g:
        content = f'{{"model": "{BACKBONE}", "prompt": "hi", "temperature": {number}}}'
        assert_envelope(await post_raw(g, content), 400, "temperature")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '"text"',
        '{"model": "tiny", "prompt": "\\ud800"}',
        '{"model": "tiny", "prompt": "hi", "\\ud800": 1}',
        "[" * 100_000,
        '{"seed": ' + "9" * 5000 + "}",
        b"\xff\xfe",
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_bodies_that_are_no_json_object(tmp_path: Path, content: str | bytes) -> None:
    async with gateway(tmp_path) as g:
        assert_envelope(await post_raw(g, content), 400)
        assert g.backend.calls == []


async def test_every_fault_is_named_up_to_a_bound(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        body = {"prompt": "hi", **{f"unknown_{index}": 1 for index in range(50)}}
        reply = await g.http.post("/v1/completions", json=body)
        error = reply.json()["error"]
        assert error["param"] == "model"
        assert error["code"] == "missing_required_parameter"
        assert "unknown_0: unknown or not supported here." in error["message"]
        assert "(46 more)" in error["message"]


async def test_an_unknown_field_has_its_own_code(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        with pytest.raises(openai.BadRequestError) as caught:
            await g.openai.completions.create(model=BACKBONE, prompt="hi", extra_body={"adapters": []})
        assert (caught.value.code, caught.value.param) == ("unknown_parameter", "adapters")


async def test_a_long_field_name_is_not_echoed_whole(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        body = {"model": BACKBONE, "prompt": "hi", "x" * 10_000: 1}
        reply = await g.http.post("/v1/completions", json=body)
        assert_envelope(reply, 400)
        assert len(reply.text) < 1000


async def test_a_body_without_the_json_type(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.post("/v1/completions", content=b'{"model": "tiny", "prompt": "hi"}')
        assert_envelope(reply, 400)


NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.5, 1e308, 1 << 63, 1 << 200),
    *("", "x", "\x00", "é" * 300),
    *([], [[]], [None], [1], [1, "a"], ["a", "b"], [[1], ["a"]], [USER], [{"role": "user"}]),
    *({}, {"a": {}}, {"1": 1}, {"type": "text"}),
]


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/adapters/delta/aliases/prod"]
)
async def test_no_body_is_answered_with_a_fault_of_the_server(tmp_path: Path, path: str) -> None:
    random = Random(0)
    body, base = {
        "/v1/completions": (CompletionBody, {"model": BACKBONE, "prompt": "hi"}),
        "/v1/chat/completions": (ChatBody, {"model": BACKBONE, "messages": [USER]}),
    }.get(path, (AliasBody, {"version": 1}))
    fields = [*body.model_fields, "unknown"]
    answered = set()
    async with gateway(tmp_path) as g:
        await g.push("delta")
        for _ in range(300):
            changes = {random.choice(fields): random.choice(NASTY) for _ in range(random.randint(1, 3))}
            reply = await g.http.request(
                "PUT" if "aliases" in path else "POST", path, json={**base, **changes}
            )
            answered.add(reply.status_code)
            if reply.status_code != 200:
                assert_envelope(reply, reply.status_code)
    assert answered <= {200, 400, 404, 409}


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_json_body_over_its_limit(tmp_path: Path, chunked: bool) -> None:
    async with gateway(tmp_path, max_body_bytes=1000) as g:
        body = json.dumps({"model": BACKBONE, "prompt": "x" * 1000}).encode()
        reply = await post_raw(g, pieces(body) if chunked else body)
        assert_envelope(reply, 413)
        assert reply.json()["error"]["code"] == "payload_too_large"


async def test_a_json_body_of_more_values_than_may_be_parsed_in_one_go(tmp_path: Path) -> None:
    async with gateway(tmp_path, max_body_values=100) as g:
        fits, too_many = ({"model": BACKBONE, "prompt": [1] * count, "max_tokens": 1} for count in (98, 99))
        assert (await post_raw(g, json.dumps(fits).encode())).status_code != 413
        reply = await post_raw(g, json.dumps(too_many).encode())
        assert_envelope(reply, 413)
        assert "100 values" in reply.json()["error"]["message"]


async def test_reading_stops_at_the_first_excess_byte(tmp_path: Path) -> None:
    async with gateway(tmp_path, max_body_bytes=1000) as g:
        num_read = await read_of_endless_body(
            g.app, "POST", "/v1/completions", b"application/json", b"x" * 400
        )
        assert num_read == 3


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/completions/", 404),
        ("POST", "/invocations", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("POST", "/v1/adapters", 405),
        ("GET", "/v1/adapters?limit=0", 400),
        ("GET", "/v1/adapters?limit=x", 400),
        ("GET", "/v1/adapters?after=../x", 400),
        ("GET", "/v1/adapters/..%2F..%2Fetc", 404),
        ("GET", "/v1/adapters/UPPER", 400),
        ("GET", "/v1/adapters/%00", 400),
        ("GET", "/v1/adapters/%ff", 400),
        ("GET", "/v1/adapters/x/versions/1.5", 400),
        ("GET", "/v1/adapters/x/versions/" + "9" * 30, 400),
    ],
)
async def test_routes_answer_in_the_envelope(tmp_path: Path, method: str, path: str, status: int) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.request(method, path)
        assert_envelope(reply, status)
        if status == 405:
            assert reply.headers["allow"]


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/v1/adapters/x", "DELETE, GET"),
        ("/v1/admin/keys", "GET, POST"),
        ("/v1/models/a/b", "GET"),
        ("/health/live", "GET"),
    ],
)
async def test_a_405_names_every_method_that_its_path_takes(tmp_path: Path, path: str, allow: str) -> None:
    async with gateway(tmp_path) as g:
        reply = await g.http.request("PATCH", path)
        assert_envelope(reply, 405)
        assert reply.headers["allow"] == allow


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unhandled_error_is_a_fixed_text(
    tmp_path: Path, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backend = FakeBackend(script=lambda call: [ValueError(f"{CANARY} at 0x7f")])
    async with gateway(tmp_path, backend) as g:
        with caplog.at_level(logging.DEBUG):
            reply = await g.http.post(
                "/v1/completions",
                json={"model": BACKBONE, "prompt": CANARY, "stream": stream},
                headers={"x-request-id": "r-1"},
            )
        assert_envelope(reply, 500)
        assert reply.json()["error"]["message"] == INTERNAL_MESSAGE
        assert CANARY not in reply.text
        ours = [record.getMessage() for record in caplog.records if record.name.startswith("deltamux")]
        assert len(ours) == 1
        assert "r-1" in ours[0]
        assert "ValueError" in ours[0]
        assert "http_support.py" in ours[0]  # where it happened
        assert CANARY not in caplog.text
        assert CANARY not in (await g.http.get("/metrics")).text


PLANTS: list[Any] = [
    CANARY,
    [CANARY],
    [[CANARY]],
    {"a": CANARY},
    {FIELD: CANARY},
    [{"role": CANARY, "content": CANARY}],
    [{"role": "user", "content": CANARY, FIELD: CANARY}],
    [{"role": "user", "content": [{"type": "text", "text": {"a": CANARY}}]}],
    CANARY * 1000,
]


async def test_what_a_request_says_is_in_no_log_no_metric_no_database_and_in_no_refusal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refusals = 0
    async with gateway(tmp_path, FakeBackend(script=told_by_seed)) as g:
        await g.push("delta")
        with caplog.at_level(logging.DEBUG):
            for path, body, base in (
                ("/v1/completions", CompletionBody, {"model": BACKBONE, "prompt": CANARY}),
                ("/v1/chat/completions", ChatBody, {"model": BACKBONE, "messages": [USER]}),
            ):
                for field in body.model_fields:
                    for plant in PLANTS:
                        reply = await g.http.post(path, json={**base, field: plant})
                        if reply.status_code != 200:
                            refusals += 1
                            # the caller's own model is named to it: which one is not there is what it has to know
                            assert field == "model" or CANARY not in reply.text, (field, plant, reply.text)
                for stream in (False, True):
                    for seed in (0, 1, 2):
                        reply = await g.http.post(path, json={**base, "stream": stream, "seed": seed})
                        assert CANARY not in reply.text
            for content in (f'{{"prompt": "{CANARY}"', f'"{CANARY}"', f'{{"prompt": "{CANARY}\\ud800"}}'):
                reply = await post_raw(g, content)
                assert_envelope(reply, 400)
                assert CANARY not in reply.text
            headers = {"authorization": f"Bearer {CANARY}", "user-agent": CANARY, "cookie": CANARY}
            for path in (f"/{CANARY}", f"/v1/adapters/{CANARY}%00", f"/v1/models?x={CANARY}"):
                await g.http.get(path, headers=headers)
            parts = [("file", (f"{CANARY}.json", b"{}")), ("file", ("adapter_config.json", CANARY.encode()))]
            for name in ("delta", CANARY + "!"):
                for files in (parts, parts[1:], [*pair(), *parts]):
                    reply = await g.http.put(f"/v1/adapters/{name}/versions", files=files)
                    assert reply.status_code == 400
        g.tenancy.ledger.stop()
        page = (await g.http.get("/metrics")).text
        with sqlite3.connect(tmp_path / "registry.db") as raw:
            dump = "\n".join(raw.iterdump())
    assert refusals > 200
    assert "delta" in dump
    clients = ("openai", "httpx", "httpcore")
    ours = [record for record in caplog.records if not record.name.startswith(clients)]
    logged = "".join(f"{record.getMessage()} {record.exc_text}" for record in ours)
    assert "ValueError" in logged
    assert not [word for word in (CANARY, FIELD) for kept in (page, dump, logged) if word in kept]


def told_by_seed(call: Any) -> Any:
    """Answers, breaks off or fails, with the caller's words in the exception."""
    match call.sampling.seed:
        case 1:
            return [*tokens(call)[:1], ValueError(CANARY)]
        case 2:
            return [RuntimeError(CANARY)]
    return tokens(call)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("abc-DEF_1.2", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ('"><x', False),
        ("", False),
    ],
)
async def test_request_ids(tmp_path: Path, sent: str, kept: bool) -> None:
    async with gateway(tmp_path) as g:
        for path in ("/v1/models", "/nope", "/health/live"):
            reply = await g.http.get(path, headers={"x-request-id": sent})
            assert (reply.headers["x-request-id"] == sent) is kept
            assert reply.headers["x-request-id"]


async def test_equal_request_ids_of_callers_do_not_meet(tmp_path: Path) -> None:
    async with gateway(tmp_path) as g:
        for _ in range(2):
            await g.http.post(
                "/v1/completions", json={"model": BACKBONE, "prompt": "hi"}, headers={"x-request-id": "same"}
            )
        assert len({call.request_id for call in g.backend.calls}) == 2


async def test_a_broken_registry_is_503(tmp_path: Path) -> None:
    class Broken(Registry):
        def resolve(self, *args: Any, **kwargs: Any) -> Any:
            raise errors.RegistryUnavailable("The registry's database is locked.")

    async with gateway(tmp_path, registry_type=Broken) as g:
        with pytest.raises(openai.InternalServerError) as caught:
            await g.openai.completions.create(model="delta", prompt="hi")
        assert (caught.value.status_code, caught.value.code) == (503, "unavailable")


async def test_requests_are_counted_by_route_template(tmp_path: Path) -> None:
    async with gateway(tmp_path, FakeBackend(script=tokens)) as g:
        await g.http.get("/v1/models/tiny")
        await g.http.get("/v1/models/a/b")
        await g.http.get("/somewhere/else")
        route = "/v1/models/{model:path}"
        assert g.sample("deltamux_requests_total", route=route, status="200") == 1
        assert g.sample("deltamux_requests_total", route=route, status="404") == 1
        assert g.sample("deltamux_requests_total", route="unmatched", status="404") == 1
        assert g.sample("deltamux_request_seconds_count", route=route) == 2
        assert g.sample("deltamux_requests_in_flight") == 0


def assert_envelope(reply: httpx.Response, status: int, param: str | None = None) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert isinstance(error["message"], str)
    assert isinstance(error["code"], str)
    assert reply.headers["x-request-id"]
    if param is not None:
        assert error["param"] == param


async def post_raw(g: Gateway, content: Any) -> httpx.Response:
    return await g.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})


async def pieces(body: bytes) -> Any:
    """`body` without a declared length."""
    for start in range(0, len(body), 100):
        yield body[start : start + 100]


async def read_of_endless_body(
    app: FastAPI,
    method: str,
    path: str,
    kind: bytes,
    piece: bytes,
    *,
    head: bytes = b"",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> int:
    """How many pieces of a body without end, `head` the first, the application takes before it answers 413."""
    num_read = 0
    statuses = []

    async def receive() -> dict[str, Any]:
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": head if head and num_read == 1 else piece, "more_body": True}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", kind), *headers],
        "root_path": "",
        "scheme": "http",
        "server": ("gateway", 80),
        "client": ("127.0.0.1", 1),
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    assert statuses[0] == 413
    return num_read
