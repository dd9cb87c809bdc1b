"""Servers as fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.support import ServerProcess
from tests.integration.world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A running server of the laptop profile; tests may end and start it, and leave it running."""
    made = ServerProcess(world.backbone, tmp_path_factory.mktemp("home"))
    made.start()
    yield made
    made.kill_all()
