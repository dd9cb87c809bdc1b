"""A real server with keys, administered on a port of its own, that counts in its database: nobody without a key,
tenants apart, limits, no secret in any log, and a killed gateway.

The tests run in file order against one process; the last one kills its gateway.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loadtest.server import REPLICA
from serving.http.access import PUBLIC
from serving.tenancy.places import LEASE_S
from tests.integration.support import GREEDY, LONG, ServerProcess, upload, wait_for
from tests.integration.world import BACKBONE, World

pytestmark = pytest.mark.cluster

GATEWAY = "ray::ServeReplica:deltamux:gateway"
CANARY = "canary-5d1f-prompt"


@pytest.fixture(scope="module")
def guarded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    settings = {"DELTAMUX_SERVER__ADMIN_PORT": "0", "DELTAMUX_LIMITS__COUNTED_IN": "database"}
    made = ServerProcess(world.backbone, tmp_path_factory.mktemp("home"), settings)
    try:
        made.start()
        yield made
    finally:  # also where it did not get ready in time
        made.kill_all()


class Callers:
    """Clients by tenant."""

    def __init__(self, url: str, admin_url: str, admin: str) -> None:
        self.url = url
        self.admin_url = admin_url
        self.keys = {"admin": admin}

    def http(self, who: str, *, url: str = "") -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[who]}"}
        return httpx.Client(base_url=url or self.url, timeout=60, headers=headers)

    def administration(self) -> httpx.Client:
        return self.http("admin", url=self.admin_url)

    def limit(self, tenant: str, **limits: Any) -> None:
        with self.administration() as http:
            http.put(f"/v1/admin/tenants/{tenant}/limits", json=limits).raise_for_status()

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
    admin_url = re.search(r"administration at (http://127\.0\.0\.1:\d+)", guarded.output)
    assert admin_url is not None, guarded.output
    made = Callers(guarded.url, admin_url[1], done.stdout.strip())
    with made.administration() as http:
        for tenant in ("acme", "globex"):
            http.post("/v1/admin/tenants", json={"name": tenant}).raise_for_status()
            body = {"tenant": tenant, "scopes": ["infer", "upload", "manage"]}
            made.keys[tenant] = http.post("/v1/admin/keys", json=body).raise_for_status().json()["key"]
        body = {"tenant": "acme", "scopes": ["infer"]}
        made.keys["narrow"] = http.post("/v1/admin/keys", json=body).raise_for_status().json()["key"]
    with made.http("acme") as http:
        assert upload(http, "private", world.delta("lora-a")).status_code == 201
    return made


def test_the_server_wants_a_key_from_its_first_key_on_for_every_route(callers: Callers) -> None:
    walked = {}
    for url in (callers.url, callers.admin_url):
        with httpx.Client(base_url=url) as http:
            paths = http.get("/openapi.json").raise_for_status().json()["paths"]
            for path, methods in paths.items():
                for method in methods:
                    status = http.request(method.upper(), re.sub(r"[{}]", "", path)).status_code
                    walked[url, path] = status
                    assert status == (200 if path in PUBLIC else 401), (url, path, status)
    assert len(walked) > 20
    # administration is on its own port alone, also for who may
    admin = [path for url, path in walked if url == callers.admin_url]
    assert admin
    assert all(path.startswith("/v1/admin/") for path in admin)
    with callers.http("admin") as public:
        assert {public.get(re.sub(r"[{}]", "", path)).status_code for path in admin} == {404}


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


TEN: dict[str, Any] = {"model": BACKBONE, "prompt": [2, 3, 4], "max_tokens": 7}
"""Comes to ten tokens, which it reserves and, told to ignore the end, uses."""


def test_100_tokens_a_minute_are_100_for_20_requests_at_once(callers: Callers) -> None:
    callers.limit("globex", tokens_per_min=100)

    async def ask(client: openai.AsyncOpenAI) -> bool:
        try:
            answer = await client.completions.create(**TEN, extra_body={"ignore_eos": True})
        except openai.RateLimitError as refused:
            assert refused.code == "rate_limit_exceeded"  # noqa: PT017
            return False
        assert answer.usage is not None
        return answer.usage.total_tokens == 10

    async def at_once() -> int:
        async with openai.AsyncOpenAI(
            base_url=f"{callers.url}/v1", api_key=callers.keys["globex"], max_retries=0
        ) as client:
            return sum(await asyncio.gather(*(ask(client) for _ in range(20))))

    began = time.monotonic()
    passed = asyncio.run(at_once())
    refilled = (time.monotonic() - began) * 100 / 60
    assert 100 <= 10 * passed <= 100 + refilled

    with closing(callers.openai("globex")) as client:  # the SDK waits as long as it is told, and passes
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**TEN)
        headers = refused.value.response.headers
        assert 0 < float(headers["retry-after-ms"]) <= 6000
        assert headers["x-ratelimit-limit-tokens"] == "100"
        small = client.with_options(max_retries=2).completions.with_raw_response
        began = time.monotonic()
        while (answer := small.create(**{**TEN, "max_tokens": 1})).retries_taken == 0:
            assert time.monotonic() - began < 30
        assert answer.parse().choices
    callers.limit("globex")


def test_requests_a_minute_and_requests_at_once(callers: Callers) -> None:
    with closing(callers.openai("globex")) as globex:
        callers.limit("globex", requests_per_min=2, max_concurrency=1)
        for _ in range(2):  # one after another: the first one's place is free again
            globex.completions.create(**TEN)
        with pytest.raises(openai.RateLimitError) as refused:
            globex.completions.create(**TEN)
        assert 0 < float(refused.value.response.headers["retry-after-ms"]) <= 30_000
        callers.limit("globex", max_concurrency=1)
        body = {**TEN, "max_tokens": LONG, "stream": True, "extra_body": {"ignore_eos": True}}
        with globex.completions.create(**body) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError, match="in progress"):
                globex.completions.create(**TEN)
        wait_for(lambda: bool(globex.with_options(max_retries=3).completions.create(**TEN).choices))
        callers.limit("globex")


def test_errors_of_access_as_the_sdk_types_them(callers: Callers) -> None:
    with closing(callers.openai("acme")) as client:
        for key in ("sk-none", callers.keys["acme"][:-1] + "x"):
            with pytest.raises(openai.AuthenticationError) as unknown:
                client.with_options(api_key=key).models.list()
            assert (unknown.value.code, unknown.value.status_code) == ("invalid_api_key", 401)
        with pytest.raises(openai.PermissionDeniedError) as denied:
            client.with_options(api_key=callers.keys["narrow"]).delete("/adapters/private", cast_to=object)
        assert denied.value.code == "insufficient_permissions"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**{**TEN, "model": "globex/private"})


def counters(page: str) -> dict[str, float]:
    """Usage as `/metrics` has it: by outcome, and by kind of token."""
    found = re.findall(r'^deltamux_usage_(?:requests|tokens)_total{\w+="(\w+)"} (\S+)$', page, re.MULTILINE)
    return {name: float(value) for name, value in found}


def ledger(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The same from `/v1/usage`, grouped by outcome."""
    kinds = {kind: sum(row[f"{kind}_tokens"] for row in rows) for kind in ("prompt", "cached", "completion")}
    return {row["outcome"]: row["requests"] for row in rows if row["outcome"] != "open"} | kinds


def test_no_prompt_no_answer_and_no_key_is_in_a_log_a_metric_an_error_or_a_file(
    guarded: ServerProcess, callers: Callers, world: World
) -> None:
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
        for stream in (False, True):
            reply = http.post("/v1/chat/completions", json={**chat, "stream": stream})
            answers.append(reply.raise_for_status().text)
        for bad in (
            {"max_tokens": 10_000},
            {"temperature": 9},
            {"stop": [CANARY * 50]},
            {"seed": CANARY},
            {"logit_bias": {CANARY: 1}},
            {"n": 17},
            {"prompt": [CANARY, 1]},
            {"prompt": CANARY * 100},
            {"prompt": CANARY * 100, "stream": True},
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
        # names and contents of files, of which the refusal may speak to their sender
        config = (world.delta("lora-a") / "adapter_config.json").read_bytes()
        for parts in (
            {f"{CANARY}.json": b"{}", "adapter_config.json": config},
            {"adapter_config.json": CANARY.encode(), "adapter_model.safetensors": CANARY.encode()},
            {"adapter_config.json": config.replace(b"q_proj", CANARY.encode())},
        ):
            files = [("file", part) for part in parts.items()]
            assert http.put("/v1/adapters/private/versions", files=files).status_code == 400
        metrics = http.get("/metrics").text
    assert len(answers) == 4
    assert len(errors) > 20
    texts = re.findall(r'"text":"((?:[^"\\]|\\.)+)"', answers[0])
    assert len(texts[0]) >= 12  # long enough to be told from chance
    SECRETS.extend([CANARY, wrong, texts[0], *(key.split("_")[2] for key in callers.keys.values())])
    for text in (*errors, metrics):
        assert not [secret for secret in SECRETS if secret in text], text
    assert planted(guarded) == {}


SECRETS: list[str] = []


def planted(server: ServerProcess) -> dict[str, str]:
    """File -> secret found in it: what the server printed, all of its session, its data."""
    logs = Path(re.search(r"logs in (\S+)", server.output)[1])  # type: ignore[index]
    session = logs.parents[1]
    files = [server.home / "output", *session.rglob("*"), *(server.home / "deltamux-data").rglob("*")]
    names = {file.name for file in files}
    assert {"registry.db", "server.json"} <= names
    assert any(name.startswith("replica_deltamux_gateway") for name in names)
    assert SECRETS
    contents = {file: file.read_bytes() for file in files if file.is_file()}
    assert any(
        b"private" in content for content in contents.values()
    )  # a delta's name: what is there is found
    return {
        str(file): secret
        for file, content in contents.items()
        for secret in SECRETS
        if secret.encode() in content or secret in file.name
    }


def test_no_secret_is_in_a_log_after_a_replica_was_killed_with_them_at_work(
    guarded: ServerProcess, callers: Callers
) -> None:
    victim = min(p for p, name in guarded.processes().items() if name.startswith(REPLICA))

    async def all_cut() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{callers.url}/v1", api_key=callers.keys["acme"], max_retries=0
        ) as client:
            body = {
                "model": BACKBONE,
                "prompt": CANARY,
                "max_tokens": LONG,
                "extra_body": {"ignore_eos": True},
            }
            streams = [await client.completions.create(**body, stream=True) for _ in range(12)]
            whole = [asyncio.create_task(client.completions.create(**body)) for _ in range(6)]
            for stream in streams:
                await anext(aiter(stream))
            os.kill(victim, signal.SIGKILL)
            ends = []
            for stream in streams:
                try:
                    ends.append(str([chunk async for chunk in stream][-1].choices[0].finish_reason))
                except openai.APIError as error:
                    ends.append(f"{error.code} {error.message}")
            whole_ends = await asyncio.gather(*whole, return_exceptions=True)
            ends += [f"{end.code} {end.message}" for end in whole_ends if isinstance(end, openai.APIError)]
            return ends

    ends = asyncio.run(all_cut())
    assert any("unavailable" in end for end in ends), ends
    assert not [end for end in ends if CANARY in end]
    assert planted(guarded) == {}


def test_rows_equal_counters_also_of_requests_that_were_cancelled(callers: Callers) -> None:
    with closing(callers.openai("globex")) as client:
        body = {**TEN, "max_tokens": LONG, "stream": True, "extra_body": {"ignore_eos": True}}
        for _ in range(2):
            with client.completions.create(**body) as stream:
                next(iter(stream))  # and goes

    def agree() -> bool:
        with callers.http("admin") as http:
            page = counters(http.get("/metrics").text)
        return page.get("cancelled", 0) >= 2 and page == ledger(callers.usage(group_by="outcome"))

    wait_for(agree)
    kept = callers.usage(group_by="outcome")
    assert {row["outcome"] for row in kept} == {"completed", "failed", "cancelled"}
    for group in ("tenant", "key", "adapter", "hour"):
        assert sum(row["requests"] for row in callers.usage(group_by=group)) == sum(
            row["requests"] for row in kept
        )


@pytest.mark.slow
def test_requests_of_a_killed_gateway_are_in_the_ledger_and_their_places_free(
    guarded: ServerProcess, callers: Callers
) -> None:
    callers.limit("globex", max_concurrency=3)
    with callers.http("admin") as http:
        before = counters(http.get("/metrics").text)
    with closing(callers.openai("globex")) as client:
        streams = [
            client.completions.create(
                model=BACKBONE, prompt=CANARY, max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}
            )
            for _ in range(3)
        ]
        for stream in streams:
            next(iter(stream))  # its row is durable
        for pid, name in guarded.processes().items():
            if name.startswith(GATEWAY):
                os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
        for stream in streams:
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                list(stream)

    def answers() -> bool:
        with callers.http("admin") as http:
            return http.get("/v1/models").status_code == 200

    with callers.administration() as http:  # needs no gateway
        assert http.get("/v1/admin/tenants").status_code == 200
    wait_for(answers, timeout_s=60)
    free_at = max(time.monotonic(), killed_at + LEASE_S)
    after = {row["outcome"]: row["requests"] for row in callers.usage(group_by="outcome", tenant="globex")}
    assert after["crashed"] == 3

    def passes() -> bool:
        with closing(callers.openai("globex")) as client:
            try:
                return bool(client.completions.create(**TEN).choices)
            except openai.RateLimitError:
                return False

    wait_for(passes, timeout_s=30)
    assert time.monotonic() < free_at + 10

    def agree() -> bool:  # what the killed one had counted, and what its successor has
        with callers.http("admin") as http:
            page = counters(http.get("/metrics").text)
        both = {name: before.get(name, 0) + page.get(name, 0) for name in {*before, *page}}
        return both == ledger(callers.usage(group_by="outcome"))

    wait_for(agree)
    assert planted(guarded) == {}
