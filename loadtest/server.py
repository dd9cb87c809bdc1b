"""Servers for scenarios over HTTP: `deltamux serve` with all its processes, or the same application in this process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters.registry import DEFAULT_TENANT, Registry
from adapters.store import open_store
from loadtest.backbones import random_llama
from loadtest.workload import VOCAB_SIZE
from serving.config import Settings
from serving.engine.backend import LocalBackend
from serving.http.app import create_app
from serving.metrics import GatewayMetrics
from serving.model.backbone import load_backbone
from serving.tenancy.principal import Scope
from serving.tenancy.tenancy import Tenancy

START_TIMEOUT_S = 150.0
REPLICA = "ray::ServeReplica:deltamux:backbone"
"""How the processes of the backbone's replicas are called."""


def write_backbone(size: str, directory: Path) -> None:
    """Save `random_llama` in fp32, with a tokenizer of the words w0, w1, ..."""
    random_llama(size, torch.float32).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)


@dataclass
class ServerProcess:
    """`deltamux serve` in a home of its own, by which all of its processes are known.

    `environment`: settings as variables. Port 0: a free one, which the next start takes again.
    """

    backbone: Path
    home: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    start_s: float = 0.0

    @property
    def url(self) -> str:
        """Base URL, without /v1."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """What the command has printed since its last start."""
        return (self.home / "output").read_text()

    def start(self, *, replicas: int = 2) -> None:
        """Start and wait until it says that it is ready. Raises RuntimeError with its output where it does not."""
        self.home.mkdir(exist_ok=True)
        command = [_deltamux(), "serve", "--backbone", str(self.backbone)]
        command += ["--port", str(self.port), "--replicas", str(replicas), "--device", "cpu"]
        with (self.home / "output").open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=self.home,
                env=self._variables(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (ready := re.search(r"ready in ([\d.]+) s: http://127\.0\.0\.1:(\d+)", self.output)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The server did not start: {self.output}")
            time.sleep(0.1)
        self.start_s, self.port = float(ready[1]), int(ready[2])

    def bootstrap(self) -> str:
        """Make an administrator's key; from then on the server wants one from every caller."""
        self.home.mkdir(exist_ok=True)
        command = [_deltamux(), "keys", "bootstrap"]
        done = subprocess.run(
            command, cwd=self.home, env=self._variables(), capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

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

    def replicas(self) -> list[int]:
        """Process ids of the backbone's replicas."""
        return sorted(pid for pid, name in self.processes().items() if name.startswith(REPLICA))

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

    def _variables(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        return {**kept, "HOME": str(self.home), **self.environment}


@asynccontextmanager
async def application(settings: Settings) -> AsyncIterator[tuple[FastAPI, str]]:
    """The gateway over an engine of this process, and an administrator's key for it. No Ray, one replica."""
    backbone = load_backbone(
        settings.backbone.path, name=settings.backbone.served_name, device="cpu", dtype="float32"
    )
    store = open_store(settings.store.path)
    backend = LocalBackend(backbone, store, settings.engine)
    with Registry(settings.database.url) as registry, Tenancy(settings) as tenancy:
        _, made = tenancy.keys.create(DEFAULT_TENANT, [Scope.ADMIN], label="loadtest", actor="loadtest")
        backend.start()
        try:
            yield (
                create_app(
                    backend=backend,
                    registry=registry,
                    store=store,
                    tenancy=tenancy,
                    settings=settings,
                    metrics=GatewayMetrics(CollectorRegistry()),
                ),
                made.text,
            )
        finally:
            backend.stop()


def _deltamux() -> str:
    return str(Path(sys.executable).with_name("deltamux"))
