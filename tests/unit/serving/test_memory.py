"""Host cache and residency: single flight, budgets, leases."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest
import torch

from adapters.errors import NotFound, StoreError
from adapters.normal_form import Delta, VirtualTokens
from serving.memory.host_cache import HostCache
from serving.memory.residency import Residency


def delta(rows: int) -> Delta:
    return Delta(method="PROMPT_TUNING", ops=(VirtualTokens(embeddings=torch.ones(rows, 4)),))


def test_concurrent_requests_for_one_digest_load_it_once() -> None:
    calls, gate = [], threading.Event()

    def load(digest: str) -> Delta:
        calls.append(digest)
        gate.wait(5)
        return delta(2)

    cache = HostCache(load, capacity_bytes=1 << 20)
    futures = [cache.request("d") for _ in range(5)]
    gate.set()
    assert len({id(f.result(5)) for f in futures}) == 1
    assert calls == ["d"]
    cache.close()


def test_failed_load_reaches_the_caller_and_is_tried_again() -> None:
    attempts = []

    def load(digest: str) -> Delta:
        attempts.append(digest)
        if len(attempts) == 1:
            raise StoreError("disk")
        return delta(1)

    cache = HostCache(load, capacity_bytes=1 << 20)
    with pytest.raises(StoreError):
        cache.request("d").result(5)
    while "d" in cache._entries:  # the failure is forgotten by a callback that runs after the result is set
        pass
    assert cache.request("d").result(5).num_virtual_tokens == 1
    cache.close()


def test_host_budget_evicts_the_least_recently_used() -> None:
    loads = []

    def load(digest: str) -> Delta:
        loads.append(digest)
        return delta(1)  # 16 bytes

    cache = HostCache(load, capacity_bytes=32, num_threads=1)
    for digest in ("a", "b", "a", "c", "a", "b"):
        cache.request(digest).result(5)
        cache.request(digest).result(5)
        while digest not in cache._sizes:
            pass
    assert loads == ["a", "b", "c", "b"]
    assert cache.used_bytes == 32
    cache.close()


@dataclass
class Weights:
    digest: str
    device_bytes: int


def test_leased_weights_are_never_evicted() -> None:
    residency: Residency[Weights] = Residency(capacity_bytes=100)
    for name in ("a", "b"):
        assert residency.make_room(40)
        residency.insert(Weights(name, 40))
    assert residency.lease("a") is not None
    assert not residency.make_room(80)
    assert residency.make_room(60)
    assert "a" in residency
    assert "b" not in residency
    assert (residency.used_bytes, residency.num_evictions) == (40, 1)


def test_eviction_takes_the_least_recently_leased() -> None:
    residency: Residency[Weights] = Residency(capacity_bytes=30)
    for name in "abc":
        residency.make_room(10)
        residency.insert(Weights(name, 10))
    residency.lease("a")
    residency.end_lease("a")
    residency.make_room(10)
    assert [name for name in "abc" if name in residency] == ["a", "c"]


def test_release_waits_for_the_last_lease_and_takes_no_new_one() -> None:
    residency: Residency[Weights] = Residency(capacity_bytes=100)
    residency.make_room(40)
    residency.insert(Weights("a", 40))
    residency.lease("a")
    residency.start_release("a")
    assert residency.finish_release("a") is None
    with pytest.raises(NotFound, match="being unloaded"):
        residency.lease("a")
    residency.end_lease("a")
    assert residency.finish_release("a") == 40
    assert residency.used_bytes == 0
    assert residency.lease("a") is None
