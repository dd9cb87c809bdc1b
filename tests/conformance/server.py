"""The server under test: the real gateway and a real engine over a tiny backbone, on a real socket, in a thread.

Everything but Ray is what `deltamux serve` runs. It has keys: the caller's has every scope, so that no request made
up by chance can shut the suite out by making the first key.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from serving.http.openapi import EXAMPLES
from serving.model.backbone import Backbone
from serving.tenancy.principal import Scope
from tests.unit.serving.engine_gateway import Files, engine_gateway, upload_of
from tests.unit.serving.http_support import listening

CONTEXT = 64
"""Tokens. A chat without `max_tokens` fills it, and there are thousands of them."""
NUM_CONTENTS = 8
CALLER = "suite"
"""The tenant that calls."""


@dataclass(frozen=True)
class Server:
    """A running server, a key with every scope, one of another tenant, and uploads that it accepts."""

    url: str
    key: str
    key_id: str
    other_key_id: str
    uploads: tuple[Files, ...]

    @property
    def headers(self) -> dict[str, str]:
        """What shows the key."""
        return {"authorization": f"Bearer {self.key}"}

    def answer(self) -> str:
        """Upload a delta under the documented name and alias, and ask it something; what it says."""
        name, alias = EXAMPLES["name"], EXAMPLES["alias"]
        with httpx.Client(base_url=self.url, headers=self.headers, timeout=60) as http:
            done = http.put(
                f"/v1/adapters/{name}/versions", files=self.uploads[0], data={"alias": str(alias)}
            )
            version = done.raise_for_status().json()["id"]
            body = {"model": version, "prompt": "and now?", "max_tokens": 8, "temperature": 0}
            text: str = (
                http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]
            )
            http.get("/health/ready").raise_for_status()
            return text


@contextmanager
def running(home: Path, backbone: Backbone) -> Iterator[Server]:
    """Serve below `home` until the end of the block."""
    serving = _Serving(home, backbone)
    thread = threading.Thread(target=asyncio.run, args=(serving.serve(),), name="server")
    thread.start()
    try:
        yield serving.wait()
    finally:
        serving.end()
        thread.join()


class _Serving:
    def __init__(self, home: Path, backbone: Backbone) -> None:
        self._home, self._backbone = home, backbone
        self._started = threading.Event()
        self._server: Server | None = None

    async def serve(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with (
                engine_gateway(self._home, self._backbone, max_open_uploads=4) as made,
                listening(made.app) as (host, port),
            ):
                other = str(EXAMPLES["tenant"])
                key, _ = made.key(CALLER, *Scope), made.key(other)
                key_id, other_key_id = (made.tenancy.keys.list(tenant)[0].id for tenant in (CALLER, other))
                uploads = tuple(upload_of(self._backbone, seed) for seed in range(NUM_CONTENTS))
                self._server = Server(f"http://{host}:{port}", key, key_id, other_key_id, uploads)
                self._started.set()
                await self._ended.wait()
        finally:
            self._started.set()

    def wait(self) -> Server:
        self._started.wait()
        assert self._server is not None, "the server did not start"
        return self._server

    def end(self) -> None:
        if self._server is not None:
            self._loop.call_soon_threadsafe(self._ended.set)
