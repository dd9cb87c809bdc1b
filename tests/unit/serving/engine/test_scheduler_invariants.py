"""What holds whatever comes: random arrivals, cancellations, faults, preemptions and churn of deltas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.core import ServiceClass
from serving.engine.prefix_cache import BLOCK_TOKENS
from serving.engine.sequence import Sequence
from tests.unit.serving.engine.scheduler_support import BLOCK, FakeDelta, World

DELTAS = (FakeDelta("a", 3 * BLOCK, 5, 5), FakeDelta("b", 5 * BLOCK), FakeDelta("c", 6 * BLOCK, 20, 20))
PROMPTS = [list(range(100 * start, 100 * start + 40)) for start in (1, 1, 2)]

arrivals = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from("xyz"),
        "service_class": st.sampled_from(ServiceClass),
        "adapter_digest": st.sampled_from([None, "a", "b", "c"]),
        "prompt": st.tuples(st.sampled_from(PROMPTS), st.integers(1, 40)).map(lambda p: p[0][: p[1]]),
        "max_tokens": st.integers(1, 40),
        "num_beams": st.sampled_from([1, 1, 2, 3]),
    }
)
actions = st.one_of(
    st.tuples(st.just("add"), st.lists(arrivals, min_size=1, max_size=5)),
    st.tuples(st.just("turn"), st.integers(1, 15)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("fail"), st.integers(0, 20)),
)


class Checked:
    """A world in which every step is checked."""

    def __init__(self, **options: Any) -> None:
        self.world = World(deltas=DELTAS, max_queue=12, max_wait_s=3.0, max_lead=30.0, **options)
        self.live: list[Sequence] = []
        self.ended: Counter[str] = Counter()
        self.names = map(str, count())
        self.schedule = self.world.scheduler.schedule
        self.world.scheduler.schedule = self._scheduled  # type: ignore[method-assign]

    def add(self, requests: list[dict[str, Any]]) -> None:
        for request in requests[: 12 - len(self.world.scheduler.queue)]:
            beams = min(
                request["num_beams"], self.world.kv.num_slots
            )  # more are refused before they get here
            self.live.append(self.world.add(next(self.names), **request | {"num_beams": beams}))

    def end(self, index: int, *, failed: bool) -> None:
        """Cancel any request, or fail a running one, as the engine does."""
        chosen = self.world.scheduler.running if failed else self.live
        if index < len(chosen):
            seq = chosen[index]
            self.world.scheduler.finish(seq, failed=failed)
            self._terminal(seq.rows[0])

    def turn(self, steps: int) -> None:
        for _ in range(steps):
            self._turn_once()

    def _turn_once(self) -> None:
        self.world.turn(0.2)
        for seq in list(self.live):
            name = seq.request.request_id
            done = seq.slot < 0 and seq not in self.world.scheduler.queue
            if name in self.world.failed or done:
                self._terminal(seq)
        self.check()

    def _terminal(self, seq: Sequence) -> None:
        self.ended[seq.request.request_id] += 1
        self.live.remove(seq)

    def _scheduled(self) -> Any:
        before = set(self.world.scheduler.running)
        rows, failed = self.schedule()
        self._check_order_and_work(before, dict(rows))
        return rows, failed

    def _check_order_and_work(self, before: set[Sequence], rows: dict[Sequence, int]) -> None:
        world, scheduler = self.world, self.world.scheduler
        assert sum(rows.values()) <= scheduler.limits.max_num_batched_tokens
        assert all(seq in scheduler.running and 0 < n <= seq.num_pending for seq, n in rows.items())
        waiting = [seq for seq in self.live if seq in scheduler.queue]
        overdue = [seq for seq in waiting if world.now_s - seq.arrival_s > 3.0]
        bare = [seq for seq in overdue if seq.request.adapter_digest is None]
        # the age cap: nobody comes in while an overdue request, which no delta holds up, stays out
        if bare and not any(seq.request.adapter_digest for seq in overdue):
            admitted = set(scheduler.running) - before
            assert all(world.now_s - seq.arrival_s > 3.0 for seq in admitted)
        # work conservation: an idle engine leaves nobody waiting who needs no delta and has room
        if not scheduler.running and not world.leases.ready_at:  # loads under way hold room of their own
            idle = [seq for seq in waiting if seq.request.adapter_digest is None]
            assert not any(
                world.budget.fits(len(seq.rows) * (len(seq.tokens) // BLOCK_TOKENS + 1) * BLOCK)
                for seq in idle
            ), "an idle engine left a request waiting"

    def check(self) -> None:
        world, scheduler = self.world, self.world.scheduler
        running = scheduler.running
        assert len({seq.slot for seq in running}) == len(running)
        assert world.kv._live == {seq.slot for seq in running}
        assert not any(seq in scheduler.queue for seq in running)
        assert all(set(seq.rows) <= set(running) for seq in running), "a search runs in parts"
        requests = [seq for seq in running if seq.leads]
        assert len(self.live) == len(requests) + len(scheduler.queue)
        assert world.budget.used_bytes <= world.budget.capacity_bytes
        leases = Counter(seq.request.adapter_digest for seq in requests)
        for delta in DELTAS:
            assert world.leases.residency.leases(delta.digest) == leases[delta.digest]
        kv = world.kv
        free = [slot for slot in range(kv.num_slots) if slot not in kv._live]
        assert kv._empty | set(kv._retained) == set(free)
        assert kv.idle_bytes == sum(kv._slots[slot].committed for slot in free) * kv.block_bytes
        assert world.budget.used_by("kv") == sum(s.committed for s in kv._slots) * kv.block_bytes
        for seq in running:
            assert kv._slots[seq.slot].committed * BLOCK_TOKENS >= seq.prefix_len + seq.num_computed

    def drain(self) -> None:
        steps = 0
        while self.live:
            self.turn(1)
            steps += 1
            assert steps < 400, "requests that never end"
        self.world.now_s += 10.0
        self.world.leases.take_over()
        assert not self.world.scheduler.running
        assert len(self.world.scheduler.queue) == 0
        assert self.world.kv.usage == 0.0
        assert self.world.leases.residency.idle_bytes == self.world.leases.residency.used_bytes


def play(checked: Checked, script: list[tuple[str, Any]]) -> None:
    """Run `script`, then let everything end."""
    acts: dict[str, Callable[[Any], None]] = {
        "add": checked.add,
        "turn": checked.turn,
        "cancel": lambda index: checked.end(index, failed=False),
        "fail": lambda index: checked.end(index, failed=True),
    }
    for name, argument in script:
        acts[name](argument)
    checked.drain()
    assert set(checked.ended.values()) <= {1}, "a request ended twice"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    script=st.lists(actions, min_size=5, max_size=30),
    slots=st.integers(1, 4),
    blocks=st.integers(14, 24),
    tokens=st.sampled_from([5, 32, 200]),
    load_s=st.sampled_from([0.0, 1.0]),
    fair=st.booleans(),
)
def test_slots_leases_bytes_and_ends_balance_whatever_comes(
    script: list[tuple[str, Any]], slots: int, blocks: int, tokens: int, load_s: float, fair: bool
) -> None:
    play(Checked(slots=slots, blocks=blocks, tokens=tokens, load_s=load_s, fair=fair), script)
