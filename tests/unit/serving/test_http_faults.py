"""Faults of disk, database and object store, through the whole server over a real engine.

Each is a typed error with a remedy; what was served before still is; nothing is half-visible; and once the fault is
gone the same request succeeds.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.object_store import ObjectBlobStore
from adapters.registry import Registry
from adapters.store import LocalBlobStore
from serving.model.backbone import Backbone
from tests import s3
from tests.s3_faults import FaultyProxy
from tests.unit.serving.engine_gateway import (
    complete,
    engine_gateway,
    make_backbone,
    token_ids,
    upload_of,
)
from tests.unit.serving.http_support import Gateway, sse_events

IMPATIENT = partial(Registry, busy_timeout_s=0.2)
"""Waits for other writers for a moment only."""


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone()


async def push(g: Gateway, backbone: Backbone, seed: int, name: str = "delta") -> httpx.Response:
    return await g.http.put(f"/v1/adapters/{name}/versions", files=upload_of(backbone, seed))


async def versions(g: Gateway, name: str = "delta") -> list[int]:
    listed = (await g.http.get(f"/v1/adapters/{name}/versions")).json()
    return [item["version"] for item in listed.get("data", ())]


def assert_unavailable(reply: httpx.Response, reason: str, home: Path) -> None:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (503, "unavailable"), reply.text
    assert error["type"] == "service_unavailable_error"
    assert reason in error["message"]
    assert "try again" in error["message"].lower()
    assert reply.headers["retry-after"]
    assert str(home) not in reply.text


async def the_old_one_serves_until_a_retry(
    g: Gateway,
    backbone: Backbone,
    home: Path,
    *,
    fault: Callable[[], Any],
    mend: Callable[[], Any],
    reason: str,
) -> None:
    """Version 1 is there; the upload of version 2 meets the fault, and succeeds when it is gone."""
    assert (await push(g, backbone, 1)).status_code == 201
    old = token_ids(await complete(g, "delta"))
    fault()
    assert_unavailable(await push(g, backbone, 2), reason, home)
    assert await versions(g) == [1]
    assert token_ids(await complete(g, "delta")) == old
    mend()
    assert await versions(g) == [1]
    again = await push(g, backbone, 2)
    assert (again.status_code, again.json()["version"]) == (201, 2), again.text
    assert token_ids(await complete(g, "delta")) != old
    assert token_ids(await complete(g, "delta@v1")) == old
    live = g.registry.live_digests()
    assert len(live) == 2
    assert set(g.store.iter_digests()) == live


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", [1, 3, 5])
async def test_a_disk_that_fails_while_an_upload_is_stored(
    backbone: Backbone, tmp_path: Path, code: int, step: int
) -> None:
    left: list[int] = []

    def fsync(fd: int) -> None:
        if left:
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(code, os.strerror(code))
        os.fsync(fd)

    async with engine_gateway(tmp_path, backbone, make_store=partial(LocalBlobStore, fsync=fsync)) as g:
        await the_old_one_serves_until_a_retry(
            g, backbone, tmp_path, fault=lambda: left.append(step), mend=left.clear, reason=os.strerror(code)
        )


@pytest.mark.parametrize(("status", "reason"), [
    (409, "another writer was in the way"),
    (412, "another writer was in the way"),
    (503, "did not answer, or answered with an error"),
])  # fmt: skip
async def test_an_object_store_that_refuses(
    backbone: Backbone,
    tmp_path: Path,
    s3_server: s3.S3Server,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    reason: str,
) -> None:
    proxy = FaultyProxy(s3_server.endpoint)
    with proxy.running() as endpoint:
        for name, value in {**s3_server.environment, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        url = s3_server.make_bucket()
        retry = {"max_retries": 1, "retry_timeout": timedelta(seconds=1)}

        def make(_: Path) -> ObjectBlobStore:
            return ObjectBlobStore(url, retry_config=retry)  # type: ignore[arg-type]

        async with engine_gateway(tmp_path, backbone, make_store=make) as g:
            await the_old_one_serves_until_a_retry(
                g,
                backbone,
                tmp_path,
                fault=lambda: proxy.refused.update(PUT=status),
                mend=proxy.refused.clear,
                reason=reason,
            )


@pytest.fixture(scope="module")
def s3_server() -> Any:
    with s3.running() as server:
        yield server


@pytest.fixture
def lock(tmp_path: Path) -> Any:
    """Takes the database's write lock through a connection of its own, and gives it back."""

    class Lock:
        connection: sqlite3.Connection | None = None

        def take(self) -> None:
            path = tmp_path / "registry.db"
            self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self.connection.execute("BEGIN IMMEDIATE")

        def free(self) -> None:
            if self.connection is not None:
                self.connection.execute("ROLLBACK")
                self.connection.close()
                self.connection = None

    made = Lock()
    yield made
    made.free()


async def test_a_locked_database(backbone: Backbone, tmp_path: Path, lock: Any) -> None:
    async with engine_gateway(tmp_path, backbone, registry_type=IMPATIENT) as g:
        assert (await push(g, backbone, 1)).status_code == 201
        old = token_ids(await complete(g, "delta", max_tokens=200))
        body = {
            "model": "delta",
            "prompt": "and now?",
            "max_tokens": 200,
            "temperature": 0,
            "ignore_eos": True,
        }
        begun, running = asyncio.Event(), []

        async def stream() -> list[Any]:
            async with g.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
                async for line in reply.aiter_lines():
                    begun.set()
                    running.append(line)
            return sse_events("\n".join(running) + "\n")

        task = asyncio.create_task(stream())
        await begun.wait()
        lock.take()
        assert_unavailable(await push(g, backbone, 2), "another writer kept it locked", tmp_path)
        assert (await task)[-1] == "[DONE]"  # what runs ends as if nothing were
        waiting = asyncio.create_task(complete(g, "delta", max_tokens=200))
        assert await versions(g) == [1]
        lock.free()
        assert token_ids(await waiting) == old
        again = await push(g, backbone, 2)
        assert (again.status_code, again.json()["version"]) == (201, 2)


async def test_a_database_that_is_locked_between_the_bytes_and_the_row(
    backbone: Backbone, tmp_path: Path, lock: Any
) -> None:
    class LocksBehind(LocalBlobStore):
        armed = False

        def put(self, *args: Any) -> None:
            super().put(*args)
            if self.armed:
                lock.take()

    store = LocksBehind(tmp_path / "blobs")
    async with engine_gateway(tmp_path, backbone, make_store=lambda _: store, registry_type=IMPATIENT) as g:
        assert (await push(g, backbone, 1)).status_code == 201
        old = token_ids(await complete(g, "delta"))
        store.armed = True
        assert_unavailable(await push(g, backbone, 2), "another writer kept it locked", tmp_path)
        assert await versions(g) == [1]
        store.armed = False
        lock.free()
        assert token_ids(await complete(g, "delta")) == old
        again = await push(g, backbone, 2)
        assert (again.status_code, again.json()["version"]) == (201, 2)


async def test_a_cold_delta_that_can_not_be_read_fails_alone(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_gateway(tmp_path, backbone) as g:
        for name, seed in (("warm", 1), ("cold", 2)):
            assert (await push(g, backbone, seed, name)).status_code == 201
        replies = {name: await complete(g, name, max_tokens=200) for name in ("warm", "cold")}
    answers = {name: token_ids(reply) for name, reply in replies.items()}
    digest = replies["cold"].headers["x-adapter-digest"]
    read_bytes = Path.read_bytes
    broken = [True]

    def failing(path: Path) -> bytes:
        if broken and digest.removeprefix("sha256:") in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    async with engine_gateway(tmp_path, backbone) as g:  # a new process: nothing is in memory
        runs = asyncio.create_task(complete(g, "warm", max_tokens=200))
        reply = await complete(g, "cold", max_tokens=200)
        assert_unavailable(reply, os.strerror(errno.EIO), tmp_path)
        assert reply.headers["x-adapter-digest"] == digest
        assert token_ids(await runs) == answers["warm"]
        broken.clear()
        assert token_ids(await complete(g, "cold", max_tokens=200)) == answers["cold"]
