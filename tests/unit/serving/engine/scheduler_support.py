"""A scheduler with everything around it faked but policy and accounting: no tensors, a clock that is set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adapters.errors import DeltamuxError
from adapters.positions import Positions
from adapters.tasks import HeadSpec, Task
from serving.core import BeamParams, Request, SamplingParams
from serving.engine.beam import Beams, Candidate
from serving.engine.fair_queue import FairQueue
from serving.engine.kv_manager import SlotKVManager
from serving.engine.leases import NotYet
from serving.engine.prefix_cache import BLOCK_TOKENS, PrefixKeys, Sharing
from serving.engine.scheduler import Failed, Scheduler, SchedulerLimits
from serving.engine.sequence import Sequence
from serving.engine.waiting import FirstComeQueue, WaitingQueue
from serving.memory.budget import MemoryBudget
from serving.memory.residency import Residency

ENTRY = 10
BLOCK = ENTRY * BLOCK_TOKENS


@dataclass
class FakeDelta:
    digest: str
    device_bytes: int = 0
    prefix_len: int = 0
    num_inserted: int = 0
    cross_prefix_len: int = 0
    position_offset: int = 0
    positions: frozenset[Positions] = frozenset()
    task: Task = Task.CAUSAL_LM
    head_spec: HeadSpec | None = None


class FakeLeases:
    """`DeltaLeases` whose loads take time on the clock; `broken` digests can't be had."""

    def __init__(self, world: World, deltas: dict[str, FakeDelta], load_s: float) -> None:
        self.residency: Residency[FakeDelta] = Residency(world.budget)
        self.deltas = deltas
        self.load_s = load_s
        self.broken: dict[str, DeltamuxError] = {}
        self.prefetched: list[str] = []
        self._world = world
        self.ready_at: dict[str, float] = {}

    def try_lease(self, digest: str) -> FakeDelta | NotYet:
        if digest in self.broken:
            raise self.broken[digest]
        self.take_over()
        if (placed := self.residency.lease(digest)) is not None:
            return placed
        if digest not in self.ready_at:
            if not self.residency.reserve(self.deltas[digest].device_bytes):
                return NotYet.CROWDED
            self.ready_at[digest] = self._world.now_s + self.load_s
            self.take_over()
        return self.residency.lease(digest) or NotYet.LOADING

    def take_over(self) -> None:
        """Loads that are done become resident, as the engine does between two steps."""
        for digest, at_s in list(self.ready_at.items()):
            if at_s <= self._world.now_s:
                del self.ready_at[digest]
                delta = self.deltas[digest]
                self.residency.insert(delta, reserved_bytes=delta.device_bytes, load_s=self.load_s)

    def end_lease(self, digest: str) -> None:
        self.residency.end_lease(digest)

    def is_resident(self, digest: str) -> bool:
        self.take_over()
        return digest in self.residency

    def prefetch(self, digest: str) -> None:
        self.prefetched.append(digest)


@dataclass
class FakeStorage:
    """Remembers which tokens each slot holds, so that a copy of the wrong ones shows."""

    slots: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    copies: int = 0

    def copy(self, source: int, target: int, stop: int, start: int = 0) -> None:
        assert stop <= len(self.slots[source]), "copied what was never written"
        assert start <= len(self.slots.get(target, ())), "left a gap"
        self.copies += 1
        self.slots[target] = self.slots.get(target, [])[:start] + self.slots[source][start:stop]

    def clear(self, slot: int) -> None:
        self.slots.pop(slot, None)


class World:
    """A scheduler and its surroundings. `turn` is one step of an engine that computes nothing."""

    def __init__(
        self,
        *,
        slots: int = 4,
        blocks: int = 1000,
        max_len: int = 256,
        tokens: int = 10,
        deltas: tuple[FakeDelta, ...] = (),
        load_s: float = 0.0,
        fair: bool = True,
        max_lead: float = 0.0,
        kept: int = 0,
        sharing: Sharing = "tenant",
        **limits: Any,
    ) -> None:
        self.now_s = 0.0
        self.budget = MemoryBudget(blocks * BLOCK)
        self.storage = FakeStorage()
        self.kv = SlotKVManager(slots, max_len, entry_bytes=ENTRY, budget=self.budget, storage=self.storage)
        self.leases = FakeLeases(self, {delta.digest: delta for delta in deltas}, load_s)
        bounds = {"max_queue": 8, "max_wait_s": 1e9, "max_queue_s": 1e9} | limits
        queue: WaitingQueue = FirstComeQueue()
        if fair:
            queue = FairQueue(
                max_wait_s=bounds["max_wait_s"],
                max_lead=max_lead,
                num_kept=kept,
                is_resident=lambda seq: (
                    seq.request.adapter_digest is None or self.leases.is_resident(seq.request.adapter_digest)
                ),
            )
        self.scheduler = Scheduler(
            self.kv,
            self.leases,
            queue,
            PrefixKeys("backbone", sharing),
            limits=SchedulerLimits(max_num_batched_tokens=tokens, **bounds),
            clock=lambda: self.now_s,
        )
        self.computed: dict[str, int] = {}
        self.failed: dict[str, DeltamuxError] = {}
        self.generated: dict[str, int] = {}

    def add(self, name: str, prompt: int | list[int], **request: Any) -> Sequence:
        """Queue a request of `prompt` tokens of its own, or of those given."""
        made = sequence(name, prompt, **request)
        self.scheduler.add(made)
        return made

    def turn(self, seconds: float = 0.0) -> list[tuple[str, int]]:
        """One step: what ran, by name. Requests that reached their length end."""
        self.leases.take_over()
        rows, failed = self.scheduler.schedule()
        self._note(failed)
        for seq, count in rows:
            self._compute(seq, count)
        sampled = [row.seq for row in rows if row.samples]
        for row in rows:
            row.seq.num_computed += row.num_tokens
        for seq in sampled:
            assert set(seq.together) <= set(sampled), "a search ran in parts"
            if seq.together:
                self._branch(seq)
            else:
                self._sample(seq)
        self.now_s += seconds
        return [(row.seq.request.request_id, row.num_tokens) for row in rows]

    def _note(self, failed: list[Failed]) -> None:
        for seq, error in failed:
            assert seq.request.request_id not in self.failed
            self.failed[seq.request.request_id] = error

    def _compute(self, seq: Sequence, count: int) -> None:
        """Write the row's entries, after checking that those before them are its own."""
        owner = f"{seq.request.tenant}/{seq.request.adapter_digest}"
        if seq.num_computed == 0:
            self.storage.slots[seq.slot] = [(owner, -1)] * seq.prefix_len
        held = self.storage.slots[seq.slot]
        past = seq.prefix_len + seq.num_computed
        expected = [(owner, -1)] * seq.prefix_len + [
            (owner, token) for token in seq.tokens[: seq.num_computed]
        ]
        assert held[:past] == expected, f"{seq.request.request_id} reads another's keys and values"
        del held[past:]
        held += [(owner, token) for token in seq.tokens[seq.num_computed : seq.num_computed + count]]
        name = seq.request.request_id
        self.computed[name] = self.computed.get(name, 0) + count

    def _branch(self, seq: Sequence) -> None:
        """Half of the beams die in each step, and the others have two children."""
        if not seq.leads:
            return
        beams: Beams = seq.state
        seq.answered = True
        found = [
            Candidate(-place, -place, place // 2, 100 * len(seq.tokens) + place)
            for place in range(2 * len(seq.rows))
        ]
        for copy in beams.advance(found):
            self.kv.copy(*copy)
        if beams.done:
            assert all(len(each.tokens) == seq.max_len - seq.num_prompt for each in beams.finished)
            self.scheduler.finish(seq)

    def _sample(self, seq: Sequence) -> None:
        seq.tokens.append(len(seq.tokens))
        name = seq.request.request_id
        self.generated[name] = self.generated.get(name, 0) + 1
        if len(seq.tokens) >= seq.max_len:
            self.scheduler.finish(seq)

    def running(self) -> list[str]:
        """Names of the running requests, sorted."""
        return sorted(seq.request.request_id for seq in self.scheduler.running if seq.leads)


def sequence(
    name: str, prompt: int | list[int], *, max_tokens: int | None = 4, num_beams: int = 1, **request: Any
) -> Sequence:
    """A sequence whose prompt shares no token with others', unless its tokens are given."""
    start = sum(map(ord, name)) * 1000
    tokens = list(range(start, start + prompt)) if isinstance(prompt, int) else prompt
    sampling = request.pop("sampling", SamplingParams(max_tokens=max_tokens))
    made = Request(request_id=name, prompt_token_ids=tuple(tokens), sampling=sampling, **request)
    first = Sequence(made, list(tokens), state=None)
    if num_beams > 1:
        first.state = Beams(first, BeamParams(width=num_beams), frozenset())
    return first
