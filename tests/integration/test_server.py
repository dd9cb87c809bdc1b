"""One real server, end to end: its ports, uploads, mixed batches, clients that go away, and every way to end.

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
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import torch
from peft import FourierFTConfig, get_peft_model
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from loadtest.server import REPLICA
from serving.cli import app
from serving.cli.sockets import listeners
from serving.offline import convert as converter
from serving.offline import worker
from tests.cases import quiet
from tests.integration.support import (
    AGENTS,
    LONG,
    ServerProcess,
    all_at_once,
    gauge,
    post_and_leave,
    token_ids,
    upload,
    wait_for,
)
from tests.integration.world import BACKBONE, DELTAS, PROMPTS, World, byte_tokenizer, greedy

pytestmark = pytest.mark.cluster


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


def test_a_replicas_kernel_threads_sleep_soon(server: ServerProcess) -> None:
    replicas = [pid for pid, name in server.processes().items() if name.startswith(REPLICA)]
    assert replicas
    for pid in replicas:
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        assert {"OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=1000"} <= set(variables)


# -- uploads ---------------------------------------------------------------------------------------------------


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
        "max_tokens": LONG,
        "ignore_eos": True,
        "stream": stream,
    }
    running, generated = "vllm:num_requests_running", "deltamux_generated_tokens_total"
    before = gauge(http, generated)
    post_and_leave(server.port, body, lambda: wait_for(lambda: gauge(http, running) > 0))
    wait_for(lambda: gauge(http, running) == 0)
    assert gauge(http, generated) - before < 8 * LONG / 2
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
    assert "no earlier version" in failed.output
    assert "deleted" in run("adapters", "delete", "cli", "--yes")
    assert "cli" not in run("adapters", "list")
    assert "ready" in runner.invoke(app, ["doctor", "--server", server.url]).output


def test_cli_push_converts_what_the_server_can_not_read(
    server: ServerProcess,
    client: openai.OpenAI,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(converter, "run_job", lambda job, report: worker.run(job))
    config = FourierFTConfig(task_type="CAUSAL_LM", n_frequency=60, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(8)
    with quiet():
        model = get_peft_model(LlamaForCausalLM.from_pretrained(world.backbone), config)
        model.save_pretrained(tmp_path)
    options = ["--server", server.url]
    plain = CliRunner().invoke(app, ["push", str(tmp_path), "fourier", *options])
    assert plain.exit_code == 1
    assert "--backbone" in plain.output
    pushed = CliRunner().invoke(
        app, ["push", str(tmp_path), "fourier", "--backbone", str(world.backbone), *options]
    )
    assert pushed.exit_code == 0, pushed.output
    assert "its converted form is sent" in pushed.output
    assert "proof: parity" in pushed.output
    reference = greedy(model.eval(), byte_tokenizer(), "hello")
    assert reference != world.reference[BACKBONE, "hello"]
    assert token_ids(client, "fourier", "hello") == reference


# -- a replica's death -----------------------------------------------------------------------------------------


def test_a_replicas_death_ends_its_streams_with_an_error_and_no_others(server: ServerProcess) -> None:
    victim = min(p for p, name in server.processes().items() if name.startswith(REPLICA))

    async def streams_around_a_kill() -> list[str]:
        ended: list[str] = []
        speaking: set[int] = set()
        killed = asyncio.Event()
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(worker: int) -> str:
                reason = "nothing"
                try:
                    stream = await client.completions.create(
                        model=BACKBONE,
                        prompt="hello",
                        max_tokens=LONG,
                        stream=True,
                        extra_body={"ignore_eos": True},
                    )
                    async for chunk in stream:
                        speaking.add(worker)
                        reason = chunk.choices[0].finish_reason or reason
                except openai.APIError as error:
                    reason = f"{error.code} {'after the first token' if worker in speaking else 'at once'}"
                speaking.discard(worker)
                return reason

            async def one_after_another(worker: int) -> None:
                while not killed.is_set():
                    ended.append(await one(worker))

            async def kill_one() -> None:
                # Most streams speak and none is about to end: some are on the replica that dies. They run in step.
                while len(speaking) < 10:
                    await asyncio.sleep(0.001)
                os.kill(victim, signal.SIGKILL)
                killed.set()

            await asyncio.gather(*(one_after_another(worker) for worker in range(12)), kill_one())
            again = await client.completions.create(model=BACKBONE, prompt="hello", max_tokens=4)
            assert again.choices[0].finish_reason
        return ended

    ends = set(asyncio.run(streams_around_a_kill()))
    assert {"length", "unavailable after the first token"} <= ends
    # a call that met only dying replicas, retries included, is refused in time to be sent again
    assert ends <= {"length", "unavailable after the first token", "unavailable at once"}
    logs = Path(re.search(r"logs in (\S+)", server.output)[1])  # type: ignore[index]
    written = "".join(file.read_text() for file in (logs / "serve").glob("replica_deltamux_gateway_*"))
    assert "a call to the backbone failed" in written


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
