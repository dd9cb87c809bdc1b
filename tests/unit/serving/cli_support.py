"""The commands against a gateway in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from serving.cli import app
from tests.unit.serving.http_support import Gateway

Run = Callable[..., Awaitable[str]]


def commands(g: Gateway, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `deltamux <arguments>` against `g`, with an exit code of 0 or the one given; returns the output."""
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})

    def client(**options: Any) -> httpx.Client:
        return TestClient(g.app, headers=options["headers"])

    monkeypatch.setattr("serving.cli.client.httpx.Client", client)

    async def run(*arguments: str, exit_code: int = 0) -> str:
        result = await asyncio.to_thread(runner.invoke, app, list(arguments))
        assert result.exit_code == exit_code, result.output
        return " ".join(result.output.split())

    return run
