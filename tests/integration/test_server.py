"""One real server, end to end: the unmodified openai SDK, uploads, mixed batches, disconnects, and every way to end.

The tests run in file order against one process; those at the end kill it and start it again.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from typer.testing import CliRunner

from serving.cli import app
from serving.cli.sockets import listeners
from tests.integration.support import (
    AGENTS,
    GREEDY,
    LONG,
    REPLICA,
    ServerProcess,
    all_at_once,
    gauge,
    post_and_leave,
    token_ids,
    upload,
    wait_for,
)
from tests.integration.world import BACKBONE, CONTEXT, DELTAS, NUM_TOKENS, PROMPTS, World

pytestmark = pytest.mark.cluster


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def deltas(server: ServerProcess, world: World) -> dict[str, dict[str, Any]]:
    """The three deltas, uploaded once: name -> version."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        return {name: upload(http, name, world.delta(name)).json() for name in DELTAS}


# -- the start -------------------------------------------------------------------------------------------------


def test_start(server: ServerProcess) -> None:
    print(f"start to ready: {server.start_s:.1f} s")
    assert "single tenant" in server.output
    assert "Traceback" not in server.output


def test_only_http_answers_without_a_token(server: ServerProcess, tmp_path: Path) -> None:
    assert server.process is not None
    found = listeners(server.process.pid)
    assert (server.port, True) in [(item.port, item.is_loopback) for item in found]
    wide = [item for item in found if not item.is_loopback]
    assert {item.process.rpartition(":")[2] for item in wide} <= {"backbone", "gateway"}, wide
    # what these ports would unpickle for whoever has Ray's token
    canary = tmp_path / "ran"
    payload = f"cos\nmkdir\n(V{canary}\ntR.".encode()
    message = b"\x0a" + bytes([0x80 | len(payload) & 0x7F, len(payload) >> 7]) + payload
    for item in wide:
        with grpc.insecure_channel(f"127.0.0.1:{item.port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(message, timeout=10)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED, item
    assert not canary.exists()


# -- the SDK ---------------------------------------------------------------------------------------------------


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


def test_a_refused_upload_lists_its_problems_and_leaves_nothing(
    client: openai.OpenAI, http: httpx.Client, world: World, tmp_path: Path
) -> None:
    source = world.delta("lora-a")
    config = json.loads((source / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True, "r": 5}))
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    refused = upload(http, "broken", tmp_path)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "invalid_adapter"
    assert len(refused.json()["error"]["problems"]) > 1
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="broken", prompt="hello")


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


# -- batches, clients that go away, headers ----------------------------------------------------------------------


def test_mixed_concurrent_requests_equal_each_alone(
    server: ServerProcess, world: World, deltas: dict[str, Any]
) -> None:
    cases = [(model, prompt) for model in (BACKBONE, *DELTAS) for prompt in PROMPTS]

    assert asyncio.run(all_at_once(server.url, cases)) == [world.reference[case] for case in cases]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_requests(
    server: ServerProcess, http: httpx.Client, stream: bool
) -> None:
    body = {
        "model": BACKBONE,
        "prompt": ["hello"] * 8,
        "max_tokens": 240,
        "ignore_eos": True,
        "stream": stream,
    }
    post_and_leave(server.port, body, lambda: wait_for(lambda: gauge(http, "vllm:num_requests_running") > 0))
    before = gauge(http, "deltamux_generated_tokens_total")
    wait_for(lambda: gauge(http, "vllm:num_requests_running") == 0, timeout_s=2.0)
    assert gauge(http, "deltamux_generated_tokens_total") - before < 8 * LONG / 2
    assert gauge(http, "vllm:kv_cache_usage_perc") == 0


def test_clients_do_not_steer_serve(http: httpx.Client) -> None:
    headers = {
        "x-request-timeout-seconds": "0.001",
        "serve_multiplexed_model_id": "x",
        "x-request-id": "mine-1",
    }
    body = {"model": BACKBONE, "prompt": "hello", "max_tokens": 200, "ignore_eos": True}
    answer = http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers.get_list("x-request-id") == ["mine-1"]


def test_replicas_have_a_gauge_each(http: httpx.Client) -> None:
    page = http.get("/metrics").text
    assert set(re.findall(r'^vllm:num_requests_running{replica="(\d+)"}', page, re.MULTILINE)) == {"0", "1"}


# -- the command line ------------------------------------------------------------------------------------------


def test_cli_push_promote_rollback_delete(server: ServerProcess, world: World) -> None:
    runner = CliRunner(env={"COLUMNS": "200"})

    def run(*arguments: str) -> str:
        result = runner.invoke(app, [*arguments, "--server", server.url])
        assert result.exit_code == 0, result.output
        return result.output

    assert "proof: effect" in run("push", str(world.delta("lora-a")), "cli", "--alias", "prod")
    run("push", str(world.delta("lora-b")), "cli")
    run("adapters", "promote", "cli", "2")
    assert "prod -> v2" in run("adapters", "list")
    assert "points at version 1" in run("adapters", "rollback", "cli")
    assert "prod -> v1" in run("adapters", "show", "cli")
    failed = runner.invoke(app, ["adapters", "rollback", "cli", "--server", server.url])
    assert failed.exit_code == 1
    assert "no ready version before v1" in failed.output
    assert "deleted" in run("adapters", "delete", "cli", "--yes")
    assert "cli" not in run("adapters", "list")
    assert "ready" in runner.invoke(app, ["doctor", "--server", server.url]).output


# -- a replica's death -----------------------------------------------------------------------------------------


def test_a_replicas_death_ends_its_streams_with_an_error_and_no_others(server: ServerProcess) -> None:
    async def streams_until_a_kill() -> list[str]:
        begun = [asyncio.Event() for _ in range(8)]
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(first: asyncio.Event) -> str:
                stream = await client.completions.create(
                    model=BACKBONE,
                    prompt="hello",
                    max_tokens=LONG,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                reason = None
                try:
                    async for chunk in stream:
                        first.set()
                        reason = chunk.choices[0].finish_reason or reason
                except openai.APIError as error:
                    return str(error.code)
                return str(reason)

            async def kill_one() -> None:
                await asyncio.gather(*(event.wait() for event in begun))
                os.kill(
                    min(p for p, name in server.processes().items() if name.startswith(REPLICA)),
                    signal.SIGKILL,
                )

            ended = await asyncio.gather(*(one(event) for event in begun), kill_one())
            again = await client.completions.create(model=BACKBONE, prompt="hello", max_tokens=4)
            assert again.choices[0].finish_reason
            return [str(item) for item in ended[:-1]]

    assert set(asyncio.run(streams_until_a_kill())) == {"unavailable", "length"}


# -- the end ---------------------------------------------------------------------------------------------------


def test_killed_right_after_an_acknowledged_upload_and_during_another(
    server: ServerProcess, client: openai.OpenAI, http: httpx.Client, world: World
) -> None:
    threading.Thread(target=upload_slowly, args=(server.port, world.delta("lora-b")), daemon=True).start()
    wait_for(lambda: gauge(http, "deltamux_uploads_open") == 1)
    assert upload(http, "kept", world.delta("lora-b")).status_code == 201
    server.end(signal.SIGKILL)
    server.wait_until_gone(15.0, but=AGENTS)

    server.start()
    print(f"restart to ready: {server.start_s:.1f} s")
    assert token_ids(client, "kept@v1", "hello") == world.reference["lora-b", "hello"]
    assert token_ids(client, "lora-a", "hello") == world.reference["lora-a", "hello"]
    assert http.get("/v1/adapters/halfway").status_code == 404
    assert list((server.home / "deltamux-data" / "blobs" / "staging").iterdir()) == []


def upload_slowly(port: int, directory: Path) -> None:
    """Send an upload's body but for its last bytes, and hold the connection."""
    request = httpx.Request(
        "PUT",
        f"http://127.0.0.1:{port}/v1/adapters/halfway/versions",
        files=[("file", (path.name, path.read_bytes())) for path in sorted(directory.glob("adapter_*"))],
    )
    head = f"PUT {request.url.path} HTTP/1.1\r\n" + "".join(
        f"{k}: {v}\r\n" for k, v in request.headers.items()
    )
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + b"\r\n" + request.read()[:-40])
        connection.recv(1)  # until the server is gone


def test_sigterm_leaves_no_process(server: ServerProcess) -> None:
    assert server.end(signal.SIGTERM) == 0
    server.wait_until_gone(5.0, but=AGENTS)  # those of the server killed above
    assert "Traceback" not in server.output
