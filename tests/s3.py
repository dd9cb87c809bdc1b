"""An S3 API server of one's own for tests: moto's, as a process on a free port of 127.0.0.1."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@dataclass(frozen=True)
class S3Server:
    """A running server; its buckets are made on demand."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a client finds it."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint, "AWS_ALLOW_HTTP": "true"}

    def make_bucket(self) -> str:
        """The URL of a prefix in a new bucket."""
        name = f"b{uuid.uuid4().hex}"
        httpx.put(f"{self.endpoint}/{name}").raise_for_status()
        return f"s3://{name}/deltas"


@contextmanager
def running() -> Iterator[S3Server]:
    """Start a server and end it with the block, and with this process whatever ends that."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "moto.server", "-H", "127.0.0.1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "-p", str(port)], **quiet)
    server = S3Server(f"http://127.0.0.1:{port}")
    try:
        while True:
            try:
                httpx.get(f"{server.endpoint}/moto-api/").raise_for_status()
                break
            except httpx.TransportError:
                assert process.poll() is None, "moto's server has ended"
                time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()
