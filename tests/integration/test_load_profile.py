"""The load profile: the same answers through HAProxy and the replicas' own HTTP ports."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.integration.support import (
    GREEDY,
    LONG,
    ServerProcess,
    all_at_once,
    gauge,
    post_and_leave,
    upload,
    wait_for,
)
from tests.integration.world import BACKBONE, PROMPTS, World

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def loaded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    made = ServerProcess(world.backbone, tmp_path_factory.mktemp("home"), {"DELTAMUX_PROFILE": "load"})
    try:
        made.start()
        yield made
    finally:
        made.kill_all()


def test_the_load_profile(loaded: ServerProcess, world: World) -> None:
    print(f"start to ready: {loaded.start_s:.1f} s")
    with httpx.Client(base_url=loaded.url, timeout=60) as http:
        assert upload(http, "lora-a", world.delta("lora-a")).status_code == 201
        cases = [(model, prompt) for model in (BACKBONE, "lora-a") for prompt in PROMPTS]
        assert asyncio.run(all_at_once(loaded.url, cases)) == [world.reference[case] for case in cases]

        with openai.OpenAI(base_url=f"{loaded.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.completions.create(model="lora-a", prompt="hello", **GREEDY)
            parts = client.completions.create(model="lora-a", prompt="hello", **GREEDY, stream=True)
            assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="absent", prompt="hello")

        body = {"model": BACKBONE, "prompt": "hello", "max_tokens": LONG, "ignore_eos": True, "stream": True}
        running, generated = "vllm:num_requests_running", "deltamux_generated_tokens_total"
        before = gauge(http, generated)
        post_and_leave(loaded.port, body, lambda: wait_for(lambda: gauge(http, running) > 0))
        wait_for(lambda: gauge(http, running) == 0)
        assert gauge(http, generated) - before < LONG / 2

        headers = {"x-request-timeout-seconds": "0.001", "x-request-id": "mine-1"}
        answer = http.post("/v1/completions", json={**body, "stream": False}, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert loaded.end(signal.SIGTERM) == 0
    loaded.wait_until_gone(5.0)
