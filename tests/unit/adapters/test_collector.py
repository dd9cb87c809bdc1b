"""Collection: what is used stays, what is not goes after the grace period, however many collect and upload at once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import create_engine, text

from adapters import migrations
from adapters.collector import Collected, Collector
from adapters.errors import Conflict, NotFound, StoreError
from adapters.names import ModelReference
from adapters.registry import DEFAULT_TENANT, Registry, VersionRecord
from adapters.store import Blob, LocalBlobStore

A, B = "a" * 64, "b" * 64
T = DEFAULT_TENANT
GRACE_S = 100.0


@dataclass
class World:
    """A registry and a store with a clock that only the test moves."""

    url: str
    root: Path
    now: float = 1_800_000_000.0
    registry: Registry = field(init=False)
    store: LocalBlobStore = field(init=False)

    def __post_init__(self) -> None:
        self.registry, self.store = self.open()

    def open(self) -> tuple[Registry, LocalBlobStore]:
        """Another process's view of the same state."""
        return Registry(self.url, clock=lambda: self.now), LocalBlobStore(self.root)

    def upload(self, name: str, digest: str, *, tenant: str = T) -> VersionRecord:
        hold = self.registry.blobs.hold(digest, 10)
        self.store.put(digest, b"m", digest.encode())
        return self.publish(name, digest, tenant=tenant, hold=hold)

    def publish(self, name: str, digest: str, *, tenant: str = T, hold: str | None = None) -> VersionRecord:
        return self.registry.publish(
            tenant, name, digest, method="LORA", backbone_digest="", task="causal-lm", size_bytes=1, labels={},
            proof={}, hold=hold,
        )  # fmt: skip

    def collect(self, *, after_s: float = 0.0) -> Collected:
        self.now += after_s
        return Collector(self.registry, self.store, grace_s=GRACE_S).collect()

    def stored(self) -> set[str]:
        return set(self.store.iter_digests())


@pytest.fixture
def world(url: str, tmp_path: Path) -> Iterator[World]:
    made = World(url, tmp_path / "blobs")
    yield made
    made.registry.close()


def test_what_is_used_stays(world: World) -> None:
    world.upload("sql", A)
    for _ in range(3):
        assert world.collect(after_s=1000) == Collected(marked=0, swept=0)
    assert world.stored() == {A}


def test_a_deleted_version_goes_after_the_grace_period_and_not_before(world: World) -> None:
    world.upload("sql", A)
    world.upload("sql", B)
    world.registry.delete_version(T, "sql", 1)
    assert world.collect() == Collected(marked=1, swept=0)
    assert world.collect(after_s=GRACE_S - 1) == Collected(marked=0, swept=0)
    assert world.stored() == {A, B}
    assert world.collect(after_s=1) == Collected(marked=0, swept=1)
    assert world.stored() == {B}
    assert world.collect(after_s=1000) == Collected(marked=0, swept=0)


def test_content_that_anyone_else_uses_stays(world: World) -> None:
    world.upload("sql", A)
    world.upload("other", A, tenant="acme")
    world.registry.delete_adapter(T, "sql")
    world.collect()
    assert world.collect(after_s=1000).swept == 0
    assert world.stored() == {A}
    world.registry.delete_adapter("acme", "other")
    world.collect()
    assert world.collect(after_s=1000).swept == 1
    assert world.stored() == set()


class TestUndelete:
    def test_brings_a_version_back(self, world: World) -> None:
        published = world.upload("sql", A)
        world.registry.delete_version(T, "sql", 1)
        world.collect()
        world.collect(after_s=GRACE_S / 2)
        assert world.registry.undelete_version(T, "sql", 1) == published
        assert world.registry.resolve(ModelReference.parse("sql")) == published
        assert world.collect(after_s=1000) == Collected(marked=0, swept=0)
        assert world.store.read(A) == Blob(b"m", A.encode())

    def test_a_mark_from_before_does_not_count_after_the_next_deletion(self, world: World) -> None:
        world.upload("sql", A)
        world.registry.delete_version(T, "sql", 1)
        world.collect()
        world.registry.undelete_version(T, "sql", 1)
        world.registry.delete_version(T, "sql", 1)
        assert world.collect(after_s=1000) == Collected(marked=1, swept=0)
        world.registry.undelete_version(T, "sql", 1)

    def test_a_newer_latest_stays(self, world: World) -> None:
        world.upload("sql", A)
        world.registry.delete_version(T, "sql", 1)
        world.upload("sql", B)
        world.registry.undelete_version(T, "sql", 1)
        assert world.registry.resolve(ModelReference.parse("sql")).version == 2

    def test_after_collection_it_is_too_late(self, world: World) -> None:
        world.upload("sql", A)
        world.registry.delete_version(T, "sql", 1)
        world.collect()
        world.collect(after_s=GRACE_S)
        with pytest.raises(StoreError, match="are collected"):
            world.registry.undelete_version(T, "sql", 1)
        with pytest.raises(NotFound):
            world.registry.get_version(T, "sql", 1)
        assert world.upload("sql", A).version == 2
        with pytest.raises(Conflict, match="Version 2 of 'sql' has the same content as 1"):
            world.registry.undelete_version(T, "sql", 1)

    @pytest.mark.parametrize(("name", "version"), [("sql", 1), ("sql", 2), ("other", 1)])
    def test_of_what_is_not_deleted(self, world: World, name: str, version: int) -> None:
        world.upload("sql", A)
        with pytest.raises(NotFound):
            world.registry.undelete_version(T, name, version)


class TestUploads:
    def test_bytes_without_a_row_are_found(self, world: World) -> None:
        world.store.put(A, b"m", b"t")
        assert world.collect() == Collected(marked=1, swept=0)
        assert world.collect(after_s=GRACE_S) == Collected(marked=0, swept=1)
        assert world.stored() == set()

    def test_an_open_upload_is_safe_until_its_hold_ends(self, world: World) -> None:
        hold = world.registry.blobs.hold(A, 5 * GRACE_S)
        world.store.put(A, b"m", b"t")
        for _ in range(4):
            assert world.collect(after_s=GRACE_S) == Collected(marked=0, swept=0)
        assert world.publish("sql", A, hold=hold).version == 1
        assert world.collect(after_s=1000) == Collected(marked=0, swept=0)

    def test_a_killed_upload_goes_when_its_hold_has_ended(self, world: World) -> None:
        world.registry.blobs.hold(A, 10)
        world.store.put(A, b"m", b"t")
        assert world.collect(after_s=9) == Collected(marked=0, swept=0)
        assert world.collect(after_s=1) == Collected(marked=0, swept=1)
        assert world.stored() == set()

    def test_one_that_was_killed_before_its_first_byte_leaves_nothing_to_do(self, world: World) -> None:
        world.registry.blobs.hold(A, 10)
        assert world.collect(after_s=10 + GRACE_S) == Collected(marked=0, swept=0)

    def test_one_that_was_killed_before_its_first_byte_does_not_make_collected_bytes_seem_stored(
        self, world: World
    ) -> None:
        world.upload("sql", A)
        world.registry.delete_version(T, "sql", 1)
        world.collect()
        world.collect(after_s=GRACE_S)
        world.registry.blobs.hold(A, 10)
        with pytest.raises(StoreError, match="are collected"):
            world.registry.undelete_version(T, "sql", 1)

    def test_one_that_outlived_its_hold_is_refused_and_nothing_is_visible(self, world: World) -> None:
        hold = world.registry.blobs.hold(A, 10)
        world.store.put(A, b"m", b"t")
        world.collect(after_s=10)
        world.collect(after_s=GRACE_S)
        with pytest.raises(StoreError, match="are collected"):
            world.publish("sql", A, hold=hold)
        with pytest.raises(NotFound):
            world.registry.get_adapter(T, "sql")
        assert world.upload("sql", A).version == 1

    def test_the_same_content_uploaded_again_loses_its_mark(self, world: World) -> None:
        world.upload("sql", A)
        world.registry.delete_version(T, "sql", 1)
        world.collect()
        world.now += GRACE_S
        hold = world.registry.blobs.hold(A, 10)  # due to be swept, and held at the last moment
        assert world.collect() == Collected(marked=0, swept=0)
        world.store.put(A, b"m", A.encode())
        assert world.publish("sql", A, hold=hold).version == 2
        assert world.stored() == {A}

    def test_a_failed_one_is_removed_at_once(self, world: World) -> None:
        hold = world.registry.blobs.hold(A, 10)
        world.store.put(A, b"m", b"t")
        assert world.registry.blobs.discard(A, hold, world.store.delete)
        assert world.stored() == set()
        assert world.upload("sql", A).version == 1

    def test_a_failed_one_spares_what_others_use(self, world: World) -> None:
        blobs = world.registry.blobs
        mine, other = blobs.hold(A, 10), blobs.hold(A, 10)
        world.store.put(A, b"m", A.encode())
        assert not blobs.discard(A, mine, world.store.delete)
        world.publish("sql", A, hold=other)
        assert not blobs.discard(A, blobs.hold(A, 10), world.store.delete)
        world.registry.delete_version(T, "sql", 1)
        assert not blobs.discard(A, blobs.hold(A, 10), world.store.delete), "it can still be undeleted"
        world.registry.undelete_version(T, "sql", 1)
        assert world.store.read(A) == Blob(b"m", A.encode())


class TestFailures:
    @pytest.mark.parametrize("removed", [False, True])
    def test_a_sweep_that_breaks_off_is_finished_by_the_next(self, world: World, removed: bool) -> None:
        """Broken off before or after the bytes are gone, as a kill leaves it: nothing may rely on them any more."""
        world.upload("sql", A)
        world.registry.delete_version(T, "sql", 1)
        world.collect()
        world.now += GRACE_S

        def breaks(digest: str) -> None:
            if removed:
                world.store.delete(digest)
            raise StoreError("out of order")

        with pytest.raises(StoreError, match="out of order"):
            world.registry.blobs.sweep(A, GRACE_S, breaks)
        with pytest.raises(StoreError, match="are collected"):
            world.registry.undelete_version(T, "sql", 1)
        assert world.collect() == Collected(marked=0, swept=0 if removed else 1)
        assert world.stored() == set()

    def test_an_upload_after_a_sweep_that_broke_off_stores_its_bytes_again(self, world: World) -> None:
        world.upload("sql", A)
        world.registry.delete_version(T, "sql", 1)
        world.collect()
        world.now += GRACE_S

        def breaks(digest: str) -> None:
            world.store.delete(digest)
            raise StoreError("out of order")

        with pytest.raises(StoreError, match="out of order"):
            world.registry.blobs.sweep(A, GRACE_S, breaks)
        world.upload("sql", A)
        assert world.collect(after_s=1000) == Collected(marked=0, swept=0)
        assert world.store.read(A) == Blob(b"m", A.encode())

    def test_bytes_that_come_back_after_a_power_cut_are_collected_again(self, world: World) -> None:
        world.upload("sql", A)
        world.registry.delete_version(T, "sql", 1)
        world.collect()
        world.collect(after_s=GRACE_S)
        world.store.put(A, b"m", b"t")
        assert world.collect() == Collected(marked=0, swept=1)
        assert world.stored() == set()


def test_uploads_deletions_and_collections_at_once_lose_nothing(url: str, tmp_path: Path) -> None:
    """Four uploaders of two contents against two collectors without any grace: each step can cross each other."""
    world = World(url, tmp_path / "blobs")
    digests, stop, failed = (A, B), threading.Event(), []

    def uploader(who: int) -> int:
        mine = World(url, world.root)
        choose = random.Random(who)
        acknowledged = 0
        for _ in range(12):
            digest = choose.choice(digests)
            record = mine.upload(f"n{who}", digest)
            acknowledged += 1
            if mine.store.read(digest) != Blob(b"m", digest.encode()):
                failed.append(digest)
            if choose.random() < 0.8:
                mine.registry.delete_version(T, f"n{who}", record.version)
        mine.registry.close()
        return acknowledged

    def collector(_: int) -> None:
        mine, store = world.open()
        while not stop.is_set():
            Collector(mine, store, grace_s=0).collect()
        mine.close()

    with ThreadPoolExecutor(6) as pool:
        collectors = [pool.submit(collector, who) for who in range(2)]
        try:
            assert sum(pool.map(uploader, range(4))) == 48
        finally:
            stop.set()
        for done in collectors:
            done.result()
    assert failed == []
    live = world.registry.live_digests()
    for _ in range(2):
        Collector(world.registry, world.store, grace_s=0).collect()
    assert world.stored() == live
    assert all(world.store.read(digest) == Blob(b"m", digest.encode()) for digest in live)
    world.registry.close()


def test_what_was_stored_before_collection_existed_is_known_after_the_migration(
    make_url: Callable[[], str], tmp_path: Path
) -> None:
    url = make_url()
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True)
    with engine.begin() as connection:
        config = migrations._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(
            text("INSERT INTO adapters (id, tenant, name, created_at) VALUES (1, 'default', 'sql', 0)")
        )
        row = "INSERT INTO versions VALUES (1, 1, :digest, 'ready', 'LORA', '', 'causal-lm', 1, '{}', '{}', 0, NULL)"
        connection.execute(text(row), {"digest": A})
    engine.dispose()
    world = World(url, tmp_path / "blobs")
    world.store.put(A, b"m", A.encode())
    assert world.collect(after_s=1000) == Collected(marked=0, swept=0)
    world.registry.delete_version(T, "sql", 1)
    assert world.collect() == Collected(marked=1, swept=0)
    assert world.collect(after_s=GRACE_S) == Collected(marked=0, swept=1)
    world.registry.close()
