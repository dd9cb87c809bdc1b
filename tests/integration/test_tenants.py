"""A real server with keys: nobody without one, tenants apart, limits, no secret in any log, and a killed gateway.

The tests run in file order against one process; the last one kills its gateway.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.support import GREEDY, LONG, ServerProcess, upload, wait_for
from tests.integration.world import BACKBONE, World

pytestmark = pytest.mark.cluster

GATEWAY = "ray::ServeReplica:deltamux:gateway"
CANARY = "canary-5d1f-prompt"


@pytest.fixture(scope="module")
def guarded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    made = ServerProcess(world.backbone, tmp_path_factory.mktemp("home"))
    made.start()
    yield made
    made.kill_all()


class Callers:
    """Clients by tenant."""

    def __init__(self, url: str, admin: str) -> None:
        self.url = url
        self.keys = {"admin": admin}

    def http(self, who: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[who]}"}
        return httpx.Client(base_url=self.url, timeout=60, headers=headers)

    def openai(self, who: str, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[who], max_retries=0, **options)

    def usage(self, **query: Any) -> list[dict[str, Any]]:
        with self.http("admin") as http:
            return list(http.get("/v1/usage", params=query).raise_for_status().json()["data"])


@pytest.fixture(scope="module")
def callers(guarded: ServerProcess, world: World) -> Callers:
    """The first key, made beside the running server, and through it two tenants; `acme` has a delta."""
    assert "single tenant" in guarded.output
    command = [str(Path(sys.executable).with_name("deltamux")), "keys", "bootstrap"]
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment = {**kept, "HOME": str(guarded.home)}
    done = subprocess.run(
        command, cwd=guarded.home, env=environment, capture_output=True, text=True, check=True
    )
    made = Callers(guarded.url, done.stdout.strip())
    with made.http("admin") as http:
        for tenant in ("acme", "globex"):
            http.post("/v1/admin/tenants", json={"name": tenant}).raise_for_status()
            body = {"tenant": tenant, "scopes": ["infer", "upload", "manage"]}
            made.keys[tenant] = http.post("/v1/admin/keys", json=body).raise_for_status().json()["key"]
    with made.http("acme") as http:
        assert upload(http, "private", world.delta("lora-a")).status_code == 201
    return made


def test_the_server_wants_a_key_from_its_first_key_on(guarded: ServerProcess, callers: Callers) -> None:
    with httpx.Client(base_url=guarded.url) as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/health/ready").status_code == 200


def test_tenants_do_not_see_one_another(callers: Callers) -> None:
    with closing(callers.openai("acme")) as acme, closing(callers.openai("globex")) as globex:
        assert acme.completions.create(model="private", prompt="hello", **GREEDY).choices
        for model in ("private", "acme/private"):
            with pytest.raises(openai.NotFoundError):
                globex.completions.create(model=model, prompt="hello", **GREEDY)
        with callers.http("acme") as http:
            http.put("/v1/adapters/private/grants/globex").raise_for_status()
        shared = globex.completions.create(model="acme/private", prompt="hello", **GREEDY)
        assert (
            shared.choices[0].text
            == acme.completions.create(model="private", prompt="hello", **GREEDY).choices[0].text
        )


def test_limits(callers: Callers) -> None:
    with callers.http("admin") as http, closing(callers.openai("globex")) as globex:
        path = "/v1/admin/tenants/globex/limits"
        http.put(path, json={"requests_per_min": 2}).raise_for_status()
        for _ in range(2):
            globex.completions.create(model=BACKBONE, prompt="hello", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as refused:
            globex.completions.create(model=BACKBONE, prompt="hello", max_tokens=1)
        assert 0 < float(refused.value.response.headers["retry-after-ms"]) <= 30_000
        http.put(path, json={}).raise_for_status()


def test_no_prompt_no_answer_and_no_key_is_in_a_log_a_metric_or_an_error(
    guarded: ServerProcess, callers: Callers, world: World
) -> None:
    logs = Path(re.search(r"logs in (\S+)", guarded.output)[1])  # type: ignore[index]
    wrong = "dmx_" + "1" * 16 + "_" + "2" * 64 + "_" + "3" * 8
    answers, errors = [], []
    with callers.http("acme") as http:

        def post(path: str = "/v1/completions", **body: Any) -> None:
            reply = http.post(path, json={"model": "private", "prompt": CANARY, "max_tokens": 24, **body})
            (answers if reply.status_code == 200 else errors).append(reply.text)

        post(ignore_eos=True, temperature=0)
        post(stream=True)
        post("/v1/chat/completions", prompt=None, messages=[{"role": "user", "content": CANARY}])
        chat = {"model": "private", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 4}
        answers.append(http.post("/v1/chat/completions", json=chat).raise_for_status().text)
        for bad in (
            {"max_tokens": 10_000},
            {"temperature": 9},
            {"stop": [CANARY * 50]},
            {"seed": CANARY},
            {"logit_bias": {CANARY: 1}},
            {"n": 17},
            {"prompt": [CANARY, 1]},
            {"prompt": CANARY * 100},
            {"messages": CANARY},
            {"user": CANARY, "model": "absent"},
        ):
            post(**bad)
        broken = {"content-type": "application/json"}
        errors.append(http.post("/v1/completions", content=f'{{"prompt": "{CANARY}"', headers=broken).text)
        errors.append(http.put("/v1/adapters/x/versions", content=CANARY.encode()).text)
        for path in ("/v1/completions", "/v1/admin/keys", f"/v1/adapters/x/{wrong}"):
            for key in (wrong, CANARY, callers.keys["globex"]):
                headers = {"authorization": f"Bearer {key}"}
                errors.append(http.post(path, json={"prompt": CANARY}, headers=headers).text)
        metrics = http.get("/metrics").text
    assert len(answers) == 3
    assert len(errors) > 20
    texts = re.findall(r'"text":"((?:[^"\\]|\\.)+)"', answers[0])
    assert len(texts[0]) >= 12  # long enough to be told from chance

    secrets = [CANARY, wrong, *(key.split("_")[2] for key in callers.keys.values())]
    for text in (*errors, metrics):
        assert not [secret for secret in secrets if secret in text], text
    files = [file for file in [guarded.home / "output", *logs.rglob("*")] if file.is_file()]
    assert len(files) > 5
    needles = [secret.encode() for secret in (*secrets, texts[0])]
    found = {file.name: needle for file in files for needle in needles if needle in file.read_bytes()}
    assert found == {}
    database = [file.read_bytes() for file in (guarded.home / "deltamux-data").glob("registry.db*")]
    assert not [needle for data in database for needle in needles if needle in data]


@pytest.mark.slow
def test_requests_of_a_killed_gateway_are_in_the_ledger(guarded: ServerProcess, callers: Callers) -> None:
    before = {row["outcome"]: row["requests"] for row in callers.usage(group_by="outcome")}
    assert set(before) <= {"completed", "failed"}
    assert before["completed"] > 5
    with closing(callers.openai("globex")) as client:
        streams = [
            client.completions.create(
                model=BACKBONE, prompt="hello", max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in range(3)
        ]
        for stream in streams:
            next(iter(stream))  # its row is durable
        for pid, name in guarded.processes().items():
            if name.startswith(GATEWAY):
                os.kill(pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                list(stream)

    def answers() -> bool:
        with callers.http("admin") as http:
            return http.get("/v1/models").status_code == 200

    wait_for(answers, timeout_s=60)
    after = {row["outcome"]: row["requests"] for row in callers.usage(group_by="outcome", tenant="globex")}
    assert after["crashed"] == 3
