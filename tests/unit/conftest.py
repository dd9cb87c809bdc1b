"""Databases: each test that takes `url` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.registry import Registry
from tests.postgres import PostgresServer, find_binaries, running


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server of this run, with two databases that have the registry's tables: a template, and one to share."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    with running(binaries) as server:
        Registry(server.make_database("migrated")).close()
        server.make_database("shared", template="migrated")
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Makes the URL of a new empty database per call."""
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.make_database
    made: list[str] = []

    def make() -> str:
        made.append(f"sqlite:///{tmp_path}/srv/registry{len(made)}.db")
        return made[-1]

    return make


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database of this test, without rows."""
    if request.param == "postgresql":
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.clear("shared")
    return f"sqlite:///{tmp_path}/srv/registry.db"
