"""The gateway deployment's application, built without Ray."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import adapters.store
from adapters.store import LocalBlobStore
from serving.config import Auth, Backbone, Database, Settings, Store
from serving.deployments import collection, handle, ingress
from tests.unit.serving.http_support import FakeBackend


class ElsewhereStore:
    """A store that is no local one, like an object store."""

    def __init__(self, root: Path) -> None:
        self._local = LocalBlobStore(root)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._local, name)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ingress, "write_to_serves_file", lambda: None)
    yield
    gc.unfreeze()


@pytest.mark.parametrize("store", [LocalBlobStore, ElsewhereStore])
async def test_it_is_built_over_any_store_and_shows_what_collections_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: type[Any]
) -> None:
    monkeypatch.setattr(adapters.store, "open_store", lambda location: store(Path(location)))
    monkeypatch.setattr(
        collection, "start_collecting", lambda _, metrics, __: metrics.scrape_failures.inc(41)
    )
    monkeypatch.setattr(handle, "RayBackend", lambda *_, **__: FakeBackend())
    settings = Settings(
        backbone=Backbone(path="tiny"),
        store=Store(path=str(tmp_path / "blobs")),
        database=Database(url=f"sqlite:///{tmp_path}/registry.db"),
        auth=Auth(secret_file=tmp_path / "secret"),
    )
    app = ingress.Gateway(settings, backbone=None).__serve_build_asgi_app__()  # type: ignore[arg-type]
    assert gc.get_freeze_count() > 1000
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway") as http:
        assert (await http.get("/v1/adapters")).json()["data"] == []
        page = (await http.get("/metrics")).text
    assert "deltamux_scrape_failures_total 4" in page
