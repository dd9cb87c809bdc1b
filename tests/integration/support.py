"""What the tests against real servers share: the process itself, and how to talk to it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.integration.world import CONTEXT, NUM_TOKENS

START_TIMEOUT_S = 150.0
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
REPLICA = "ray::ServeReplica:deltamux:backbone"


@dataclass
class ServerProcess:
    """`deltamux serve` in a home of its own, by which all of its processes are known."""

    backbone: Path
    home: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    start_s: float = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        return (self.home / "output").read_text()

    def start(self) -> None:
        """Start and wait until it says that it is ready; a second start takes the first one's port."""
        self.home.mkdir(exist_ok=True)
        command = [str(Path(sys.executable).with_name("deltamux")), "serve", "--backbone", str(self.backbone)]
        command += ["--port", str(self.port), "--replicas", "2", "--device", "cpu"]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), **SMALL, **self.environment}
        if "PYTHONPATH" in os.environ:  # a checkout that is not the installed one
            environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        with (self.home / "output").open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=self.home,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (ready := re.search(r"ready in ([\d.]+) s: http://127\.0\.0\.1:(\d+)", self.output)):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)
        self.start_s, self.port = float(ready[1]), int(ready[2])

    def end(self, number: signal.Signals) -> int:
        """Send a signal to the one process that was started, and wait for its end."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def processes(self) -> dict[int, str]:
        """Every living process of this server: pid -> command line."""
        mark = f"HOME={self.home}".encode()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # ended, or not ours
                continue
        return found

    def kill_all(self) -> None:
        """End whatever is left of it."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def wait_until_gone(self, timeout_s: float, *, but: tuple[str, ...] = ()) -> None:
        """Wait for the end of all its processes, those called `but` apart."""
        deadline = time.monotonic() + timeout_s
        while left := {
            pid: name for pid, name in self.processes().items() if not name.startswith(but or " ")
        }:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


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
