"""How a gateway puts its parts together, without Ray."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from adapters.store import BlobStore, LocalBlobStore
from serving.config import Auth, Backbone, Database, Settings, Store
from serving.deployments.ingress import Gateway
from serving.tenancy.ledger import Tokens
from serving.tenancy.tenancy import Tenancy


class Elsewhere:
    """Stands for a store that is not a directory of this machine."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        backbone=Backbone(path="none"),
        database=Database(url=f"sqlite:///{tmp_path}/registry.db"),
        auth=Auth(secret_file=tmp_path / "secret"),
        store=Store(path=str(tmp_path / "blobs")),
    )


@pytest.mark.parametrize("local", [True, False])
def test_parts_share_their_metrics_and_only_a_lone_gateway_takes_open_rows_for_abandoned(
    tmp_path: Path, settings: Settings, local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tenancy(settings) as before:
        before.ledger.open("left", "acme", "k", adapter_digest=None, reserved_tokens=1).result(5)
    kept: dict[str, Any] = {}
    threads = set(threading.enumerate())

    def store_of(path: str) -> BlobStore:
        return LocalBlobStore(Path(path)) if local else Elsewhere()  # type: ignore[return-value]

    monkeypatch.setattr("adapters.store.open_store", store_of)
    monkeypatch.setattr(
        "serving.deployments.collection.start_collecting", lambda *args: kept.update(collected=args)
    )
    monkeypatch.setattr(
        "serving.deployments.housekeeping.start_keeping", lambda *args, **options: kept.update(options)
    )
    monkeypatch.setattr("serving.http.app.create_app", lambda **parts: kept.update(parts))
    Gateway(settings, None).__serve_build_asgi_app__()
    try:
        _, metrics, every_s = kept["collected"]
        assert metrics is kept["metrics"]
        assert every_s == settings.store.collect_every_s
        assert kept["keep_days"] == settings.ledger.keep_days
        assert kept["abandoned_after_s"] > settings.limits.request_timeout_s
        outcomes = {'outcome="crashed"} 1.0': local}
        kept["tenancy"].ledger._on_closed("completed", Tokens(prompt=7))
        page = generate_latest(kept["metrics"].registry).decode()
        assert 'kind="prompt"} 7.0' in page
        assert {text: text in page for text in outcomes} == outcomes
    finally:
        kept["tenancy"].close()
        kept["registry"].close()
    new = {thread.name for thread in set(threading.enumerate()) - threads}
    assert not new & {"collection", "housekeeping"}
