"""Host cache, residency and the budget that it shares: single flight, leases, who goes first."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field

import pytest
import torch

from adapters.errors import NotFound, StoreError
from adapters.normal_form import Delta, VirtualTokens
from serving.memory.budget import MemoryBudget, auto_capacity
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


class Deltas:
    """A residency over a budget of its own."""

    def __init__(self, capacity_bytes: int) -> None:
        self.budget = MemoryBudget(capacity_bytes)
        self.evicted: list[str] = []
        self.residency: Residency[Weights] = Residency(self.budget, self.evicted.append)

    def load(self, digest: str, size: int, *, load_s: float = 1.0) -> bool:
        if not self.residency.reserve(size):
            return False
        self.residency.insert(Weights(digest, size), reserved_bytes=size, load_s=load_s)
        return True

    def use(self, digest: str) -> None:
        assert self.residency.lease(digest) is not None
        self.residency.end_lease(digest)


def test_leased_weights_are_never_evicted() -> None:
    deltas = Deltas(100)
    assert deltas.load("a", 40)
    assert deltas.load("b", 40)
    assert deltas.residency.lease("a") is not None
    assert not deltas.load("c", 80)
    assert deltas.evicted == []
    assert deltas.load("c", 60)
    assert deltas.evicted == ["b"]
    assert (deltas.residency.used_bytes, deltas.residency.num_evictions) == (100, 1)


def test_among_equals_the_least_recently_leased_goes_first() -> None:
    deltas = Deltas(30)
    for name in "abc":
        deltas.load(name, 10)
    deltas.use("a")
    deltas.load("d", 10)
    deltas.load("e", 10)
    assert deltas.evicted == ["b", "c"]


def test_a_delta_that_is_dear_to_load_stays_longer_but_not_for_ever() -> None:
    deltas = Deltas(20)
    deltas.load("dear", 10, load_s=3.0)
    for index in range(6):
        deltas.load(f"cheap {index}", 10, load_s=1.0)
    assert deltas.evicted == ["cheap 0", "cheap 1", "dear", "cheap 2", "cheap 3"]


def test_a_delta_may_turn_out_smaller_than_its_reservation() -> None:
    deltas = Deltas(100)
    assert deltas.residency.reserve(80)
    deltas.residency.insert(Weights("a", 30), reserved_bytes=80, load_s=1.0)
    assert deltas.residency.used_bytes == 30
    assert deltas.residency.reserve(70)
    deltas.residency.cancel(70)
    assert deltas.budget.used_bytes == 30


def test_release_waits_for_the_last_lease_and_takes_no_new_one() -> None:
    deltas = Deltas(100)
    deltas.load("a", 40)
    residency = deltas.residency
    residency.lease("a")
    residency.start_release("a")
    assert residency.finish_release("a") is None
    with pytest.raises(NotFound, match="being unloaded"):
        residency.lease("a")
    residency.end_lease("a")
    assert residency.finish_release("a") == 40
    assert (residency.used_bytes, residency.idle_bytes) == (0, 0)
    assert residency.lease("a") is None


@dataclass
class Pieces:
    """A consumer whose pieces are all idle: (worth, size), dropped in order of worth."""

    budget: MemoryBudget
    name: str
    held: list[tuple[float, int]] = field(default_factory=list)

    def take(self, worth: float, size: int) -> bool:
        if taken := self.budget.reserve(self.name, size):
            self.held.append((worth, size))
            self.held.sort()
        return taken

    @property
    def idle_bytes(self) -> int:
        return sum(size for _, size in self.held)

    def least_worth(self) -> float:
        return self.held[0][0]

    def drop(self) -> None:
        self.budget.free(self.name, self.held.pop(0)[1])


def test_the_piece_of_least_worth_goes_first_whoever_holds_it() -> None:
    budget = MemoryBudget(100)
    one, two = Pieces(budget, "one"), Pieces(budget, "two")
    budget.register("one", one)
    budget.register("two", two)
    assert one.take(1.0, 40)
    assert two.take(2.0, 30)
    assert one.take(3.0, 30)
    assert two.take(9.0, 60)
    assert (one.held, two.held) == ([(3.0, 30)], [(9.0, 60)])
    assert budget.clock == 2.0
    assert budget.worth(cost_s=5.0, size_bytes=10) == 2.5
    assert (budget.used_by("one"), budget.used_by("two"), budget.used_bytes) == (30, 60, 90)


def test_a_reservation_that_can_not_be_met_drops_nothing() -> None:
    budget = MemoryBudget(100)
    pieces = Pieces(budget, "pieces")
    budget.register("pieces", pieces)
    budget.register("busy")
    pieces.take(1.0, 50)
    assert budget.reserve("busy", 40)
    assert not budget.fits(61)
    assert not budget.reserve("busy", 61)
    assert pieces.held == [(1.0, 50)]
    assert budget.reserve("busy", 60)
    assert budget.used_bytes == 100


def test_the_automatic_budget_is_a_part_of_the_machine() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < auto_capacity() <= total / 4
