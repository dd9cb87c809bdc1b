"""The scheduler's policy on exact rows: decodes first, chunked prefill, order of arrival, no leaks."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from adapters.errors import ContextLengthExceeded, NotFound, Overloaded
from serving.core import Request, SamplingParams
from serving.engine.kv_manager import SlotKVManager
from serving.engine.scheduler import Scheduler, Sequence


@dataclass
class FakeDelta:
    prefix_len: int = 0
    position_offset: int = 0
    invocation: tuple[int, ...] = ()


@dataclass
class FakeLeases:
    """`ready` deltas are granted, `broken` ones raise, others are still being loaded."""

    ready: dict[str, FakeDelta] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    held: list[str] = field(default_factory=list)

    def try_lease(self, digest: str) -> FakeDelta | None:
        if digest in self.broken:
            raise NotFound("gone")
        if digest in self.ready:
            self.held.append(digest)
            return self.ready[digest]
        return None

    def end_lease(self, digest: str) -> None:
        self.held.remove(digest)


def make(
    leases: FakeLeases | None = None, *, slots: int = 4, max_len: int = 64, budget: int = 10
) -> Scheduler:
    kv = SlotKVManager(slots, max_len)
    return Scheduler(kv, leases or FakeLeases(), max_num_batched_tokens=budget, max_queue=8)


def seq(name: str, prompt: int, *, digest: str | None = None, max_tokens: int | None = 4) -> Sequence:
    request = Request(
        request_id=name,
        prompt_token_ids=tuple(range(prompt)),
        sampling=SamplingParams(max_tokens=max_tokens),
        adapter_digest=digest,
    )
    return Sequence(request, list(range(prompt)), state=None)


def turn(scheduler: Scheduler) -> list[tuple[str, int]]:
    """Schedule one step and pretend that it ran."""
    rows, failed = scheduler.schedule()
    assert failed == []
    for row in rows:
        samples = row.samples
        row.seq.num_computed += row.num_tokens
        if samples:
            row.seq.tokens.append(0)
    return [(row.seq.request.request_id, row.num_tokens) for row in rows]


def test_long_prompt_is_chunked_and_never_delays_a_decode() -> None:
    scheduler = make(budget=10)
    scheduler.add(seq("short", 3))
    assert turn(scheduler) == [("short", 3)]
    scheduler.add(seq("long", 25))
    assert turn(scheduler) == [("short", 1), ("long", 9)]
    assert turn(scheduler) == [("short", 1), ("long", 9)]
    assert turn(scheduler) == [("short", 1), ("long", 7)]
    assert turn(scheduler) == [("short", 1), ("long", 1)]


def test_waiting_requests_are_admitted_in_order_while_slots_last() -> None:
    scheduler = make(slots=2, budget=100)
    for name in "abc":
        scheduler.add(seq(name, 2))
    assert turn(scheduler) == [("a", 2), ("b", 2)]
    scheduler.finish(scheduler.running[0])
    assert turn(scheduler) == [("b", 1), ("c", 2)]
    assert [s.slot for s in scheduler.running] == [1, 0]


def test_request_with_a_loading_delta_is_passed_over_and_served_when_it_arrives() -> None:
    leases = FakeLeases()
    scheduler = make(leases)
    scheduler.add(seq("cold", 2, digest="d"))
    scheduler.add(seq("warm", 2))
    assert turn(scheduler) == [("warm", 2)]
    leases.ready["d"] = FakeDelta(prefix_len=5, position_offset=5)
    assert turn(scheduler) == [("warm", 1), ("cold", 2)]
    assert leases.held == ["d"]
    cold = scheduler.running[1]
    assert (cold.prefix_len, cold.position_offset) == (5, 5)
    scheduler.finish(cold)
    assert leases.held == []


def test_no_free_slot_gives_the_lease_back() -> None:
    leases = FakeLeases(ready={"d": FakeDelta()})
    scheduler = make(leases, slots=1)
    scheduler.add(seq("a", 2))
    scheduler.add(seq("b", 2, digest="d"))
    turn(scheduler)
    assert leases.held == []
    assert [s.request.request_id for s in scheduler.waiting] == ["b"]


def test_broken_delta_fails_only_its_own_request() -> None:
    scheduler = make(FakeLeases(broken={"x"}))
    scheduler.add(seq("bad", 2, digest="x"))
    scheduler.add(seq("good", 2))
    rows, failed = scheduler.schedule()
    assert [f.seq.request.request_id for f in failed] == ["bad"]
    assert isinstance(failed[0].error, NotFound)
    assert [row.seq.request.request_id for row in rows] == ["good"]


def test_virtual_tokens_count_against_the_context_and_the_lease_comes_back() -> None:
    leases = FakeLeases(ready={"d": FakeDelta(prefix_len=60)})
    scheduler = make(leases, max_len=64)
    scheduler.add(seq("a", 2, digest="d", max_tokens=3))
    _, failed = scheduler.schedule()
    assert isinstance(failed[0].error, ContextLengthExceeded)
    assert failed[0].error.param == "max_tokens"
    assert leases.held == []
    assert scheduler.kv.usage == 0.0


def test_unlimited_max_tokens_reaches_to_the_end_of_the_slot() -> None:
    scheduler = make(FakeLeases(ready={"d": FakeDelta(prefix_len=10)}), max_len=64)
    scheduler.add(seq("a", 2, digest="d", max_tokens=None))
    scheduler.schedule()
    assert scheduler.running[0].max_len == 54


def test_full_queue_is_overloaded() -> None:
    scheduler = make()
    for index in range(8):
        scheduler.add(seq(str(index), 2))
    with pytest.raises(Overloaded, match="8 requests are waiting"):
        scheduler.add(seq("late", 2))


def test_finishing_a_waiting_request_removes_it() -> None:
    scheduler = make()
    waiting = seq("a", 2)
    scheduler.add(waiting)
    scheduler.finish(waiting)
    assert turn(scheduler) == []


def test_slots_are_reused_lowest_first() -> None:
    kv = SlotKVManager(3, 8)
    assert [kv.allocate(8) for _ in range(4)] == [0, 1, 2, None]
    kv.free(2)
    kv.free(0)
    assert [kv.allocate(1), kv.allocate(1)] == [0, 2]
    assert kv.usage == 1.0
