"""Servers as fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.integration.support import ServerProcess, upload
from tests.integration.world import DELTAS, World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A running server of the laptop profile; tests may end and start it, and leave it running."""
    made = ServerProcess(world.backbone, tmp_path_factory.mktemp("home"))
    try:
        made.start()
        yield made
    finally:
        made.kill_all()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def deltas(server: ServerProcess, world: World) -> dict[str, dict[str, Any]]:
    """The three deltas, uploaded once: name -> version."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        return {name: upload(http, name, world.delta(name)).json() for name in DELTAS}
