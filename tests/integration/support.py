"""What the tests against real servers share: the process itself, and how to talk to it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import openai

from loadtest import server
from tests.integration.world import CONTEXT, NUM_TOKENS

LONG = CONTEXT - 100
"""Tokens of an answer that takes a second or more."""
SMALL = {
    "DELTAMUX_ENGINE__MAX_NUM_SEQS": "8",
    "DELTAMUX_ENGINE__MAX_QUEUE": "16",
    "DELTAMUX_ENGINE__NUM_THREADS": "1",
}
"""Settings of the servers: a queue that can be filled, and no more threads than the machine has cores."""
GREEDY: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0}
TOKENS: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""These two try for a minute to report that their parent was killed before they end; they serve nobody."""


class ServerProcess(server.ServerProcess):
    """A server with SMALL's settings, unless `environment` says otherwise."""

    def __init__(
        self, backbone: Path, home: Path, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        super().__init__(backbone, home, {**SMALL, **environment})


def upload(http: httpx.Client, name: str, directory: Path, **fields: str) -> httpx.Response:
    files = [("file", (path.name, path.read_bytes())) for path in sorted(directory.glob("adapter_*"))]
    return http.put(f"/v1/adapters/{name}/versions", files=files, data=fields)


def token_ids(client: openai.OpenAI, model: str, prompt: str) -> list[int]:
    answer = client.completions.create(model=model, prompt=prompt, **GREEDY, extra_body=TOKENS)
    return answer.choices[0].token_ids  # type: ignore[attr-defined, no-any-return]


def gauge(http: httpx.Client, name: str) -> float:
    """A gauge, summed over the replicas."""
    page = http.get("/metrics").raise_for_status().text
    values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", page, re.MULTILINE)
    assert values, f"{name} is not on the page"
    return sum(map(float, values))


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def post_and_leave(port: int, body: dict[str, Any], meanwhile: Callable[[], None]) -> None:
    """Send a completion request, wait for `meanwhile` to return, and close the connection without a word."""
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
        # a client must not be able to switch the cancellation off
        head += "content-type: application/json\r\nx-request-disconnect-disabled: ?1\r\n\r\n"
        connection.sendall(head.encode() + data)
        meanwhile()


async def all_at_once(url: str, cases: Sequence[tuple[str, str]]) -> list[list[int]]:
    """The tokens of every (model, prompt), all requests in flight together."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def one(model: str, prompt: str) -> list[int]:
            answer = await client.completions.create(model=model, prompt=prompt, **GREEDY, extra_body=TOKENS)
            return answer.choices[0].token_ids  # type: ignore[attr-defined, no-any-return]

        return await asyncio.gather(*(one(*case) for case in cases))
