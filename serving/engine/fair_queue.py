"""The fair order of waiting requests: by service received, not by who asks most.

Every tenant has a virtual token counter (VTC, Sheng et al., arXiv 2401.00588): the tokens it was served, weighted by
cost and divided by its weight. The tenant with the lowest counter goes first, so no tenant falls behind another by
more than a bound that does not grow with time. Who comes back after a pause is lifted to the lowest counter in the
queue: idleness earns no credit. Counters belong to tenants, never to deltas: a hundred deltas are one share.

- Service classes have counters of the same kind with fixed weights, so that `batch` is slow but never starves.
- A tenant whose requests of a class wait, and of which none was admitted for longer than the age cap, goes before
  everything else, once: then its next turn counts. So nobody starves, and a queue of old requests is no claim: a
  tenant that asks for more than its share has nothing else. Within a tenant an old request goes before resident ones.
- A tenant that has its share of the batch, and was served much more than others lately, leaves the last places to
  them: who asks for little finds a place at once instead of waiting for somebody's end.
- Among tenants whose counters differ by less than `max_lead`, a request whose delta is resident goes first (the
  deficit of DLPM, arXiv 2501.14312, with residency in place of the longest prefix).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from math import exp, inf
from typing import NamedTuple

from serving.core import ServiceClass
from serving.engine.sequence import Sequence
from serving.engine.waiting import LOOK_AHEAD, Batch, FirstComeQueue

CLASS_WEIGHTS: Mapping[ServiceClass, float] = {
    ServiceClass.REALTIME: 16.0,
    ServiceClass.STANDARD: 4.0,
    ServiceClass.BATCH: 1.0,
}
"""Shares of a full engine, highest class first."""

ACTIVE_S = 30.0
"""For so long after its last token a tenant counts when the batch is divided into shares; what it had fades so fast."""

CLASS_RANK: Mapping[ServiceClass, int] = {name: rank for rank, name in enumerate(CLASS_WEIGHTS)}
"""0 is the highest class."""


class _Use(NamedTuple):
    """What a tenant had lately: `service`, in weighted tokens, fades by a factor e every `ACTIVE_S`."""

    last_s: float
    weight: float
    service: float

    def at(self, now_s: float) -> float:
        """What is left of the service by now."""
        return self.service * exp((self.last_s - now_s) / ACTIVE_S)


class _Line:
    """The waiting requests of one class, by tenant. `order` has (counter, tenant), lowest first.

    `turns`: since when each of these tenants waits for its turn, longest first.
    """

    def __init__(self) -> None:
        self.served = 0.0
        self.turns: OrderedDict[str, float] = OrderedDict()
        self.queues: dict[str, OrderedDict[Sequence, None]] = {}
        self.order: list[tuple[float, str]] = []

    def place(self, tenant: str, old: float, new: float) -> None:
        """Move a waiting tenant whose counter changed."""
        if tenant in self.queues:
            del self.order[bisect_left(self.order, (old, tenant))]
            insort(self.order, (new, tenant))


class FairQueue:
    """`WaitingQueue` by virtual token counters.

    `num_kept`: places that `_held_back` is about; `is_resident`: whether a request's delta is on the device.
    """

    def __init__(
        self,
        *,
        max_wait_s: float,
        max_lead: float,
        num_kept: int,
        is_resident: Callable[[Sequence], bool],
    ) -> None:
        self._max_wait_s = max_wait_s
        self._max_lead = max_lead
        self._num_kept = num_kept
        self._is_resident = is_resident
        self._by_age = FirstComeQueue()
        self._lines: dict[ServiceClass, _Line] = {name: _Line() for name in CLASS_WEIGHTS}
        self._served: defaultdict[str, float] = defaultdict(float)
        self._active: OrderedDict[str, _Use] = OrderedDict()  # least recently served first
        self._now_s = 0.0
        self._last_tenant: str | None = None
        self._last_class: ServiceClass | None = None

    def __len__(self) -> int:
        return len(self._by_age)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._by_age

    def served(self, tenant: str) -> float:
        """A tenant's counter."""
        return self._served[tenant]

    def add(self, seq: Sequence) -> None:
        """See `WaitingQueue`."""
        self._lift(seq)
        self._by_age.add(seq)
        self._enter(seq, seq.arrival_s)[seq] = None

    def num_ahead(self, seq: Sequence) -> float:
        """See `WaitingQueue`. Those of its tenant and class, and what the others get meanwhile by their weights."""
        request = seq.request
        lines = {name: line for name, line in self._lines.items() if line.queues}
        waiting = lines.get(request.service_class, _Line()).queues
        own = len(waiting.get(request.tenant, ()))
        weights = sum(
            next(iter(q)).request.weight for tenant, q in waiting.items() if tenant != request.tenant
        )
        classes = sum(CLASS_WEIGHTS[name] for name in lines if name is not request.service_class)
        own_class = CLASS_WEIGHTS[request.service_class]
        ahead = own * (weights + request.weight) / request.weight * (classes + own_class) / own_class
        return min(ahead, float(len(self)))

    def put_back(self, seq: Sequence) -> None:
        """See `WaitingQueue`. It comes back with the counter it has: being preempted is no pause."""
        self._by_age.put_back(seq)
        queue = self._enter(seq, self._now_s)
        queue[seq] = None
        queue.move_to_end(seq, last=False)

    def remove(self, seq: Sequence) -> None:
        """See `WaitingQueue`."""
        self._by_age.remove(seq)
        tenant, line = seq.request.tenant, self._lines[seq.request.service_class]
        del line.queues[tenant][seq]
        line.turns[tenant] = self._now_s
        line.turns.move_to_end(tenant)
        if not line.queues[tenant]:
            del line.queues[tenant], line.turns[tenant]
            del line.order[bisect_left(line.order, (self._served[tenant], tenant))]
            self._last_tenant, self._last_class = tenant, seq.request.service_class

    def charge(self, seq: Sequence, cost: float) -> None:
        """See `WaitingQueue`."""
        request = seq.request
        before = self._served[request.tenant]
        self._set(request.tenant, before + cost / request.weight)
        use = self._active.pop(request.tenant, _Use(self._now_s, 0.0, 0.0))
        service = use.at(self._now_s) + cost / request.weight
        self._active[request.tenant] = _Use(self._now_s, request.weight, service)
        self._lines[request.service_class].served += cost / CLASS_WEIGHTS[request.service_class]

    def should_yield(self, running: Sequence, to: Sequence) -> bool:
        """See `WaitingQueue`. Only `batch` yields, and only while it has had more than its weighted share."""
        below, above = running.request.service_class, to.request.service_class
        return (
            below is ServiceClass.BATCH
            and above is not ServiceClass.BATCH
            and self._lines[above].served <= self._lines[below].served
        )

    def expired(self, arrived_before_s: float) -> list[Sequence]:
        """See `WaitingQueue`."""
        return self._by_age.expired(arrived_before_s)

    def candidates(self, now_s: float, batch: Batch | None = None) -> Iterator[Sequence]:
        """See `WaitingQueue`."""
        self._now_s = now_s
        seen = set()
        for seq in self._overdue():
            if seq.request.tenant not in self._held_back(batch):
                seen.add(seq)
                yield seq
        passed = 0
        while passed < LOOK_AHEAD and (candidate := self._next(seen, self._held_back(batch))) is not None:
            seen.add(candidate)
            yield candidate
            passed += candidate in self._by_age

    def _overdue(self) -> list[Sequence]:
        """The oldest request of each tenant whose turn is overdue, oldest first."""
        since_s = self._now_s - self._max_wait_s
        heads = []
        for line in self._lines.values():
            for tenant, waits_since_s in islice(line.turns.items(), LOOK_AHEAD):
                if waits_since_s >= since_s:
                    break
                heads.append(next(iter(line.queues[tenant])))
        return sorted(heads, key=lambda seq: seq.order)

    def _held_back(self, batch: Batch | None) -> Collection[str]:
        """The tenants that the last places are not for: they have their share of them, and were served most lately.

        A share is by weight, of all places, among the tenants that were served lately; who has less than it is never
        held back, nor who was served less than half of what the one was that was served most. Places are kept for
        those who may still come, or whose turn is no later than that of who is held back: against a higher counter a
        kept place would be a second rule, which the counters can't even out.
        """
        if batch is None or not 0 < batch.num_free <= self._num_kept:
            return ()
        self._forget_inactive()
        if len(self._active) < 2:  # nobody else to keep a place for
            return ()
        rows = Counter(seq.request.tenant for seq in batch.running)
        share = (len(batch.running) + batch.num_free) / sum(use.weight for use in self._active.values())
        below = [tenant for tenant, use in self._active.items() if rows[tenant] < share * use.weight]
        lately = {tenant: use.at(self._now_s) for tenant, use in self._active.items() if tenant not in below}
        if any(not self._num_waiting(tenant) for tenant in below):
            kept_from = -inf
        else:
            kept_from = min((self._served[tenant] for tenant in below), default=inf)
        return [
            tenant
            for tenant, service in lately.items()
            if 2 * service >= max(lately.values()) and self._served[tenant] >= kept_from
        ]

    def _num_waiting(self, tenant: str) -> int:
        return sum(len(line.queues.get(tenant, ())) for line in self._lines.values())

    def _forget_inactive(self) -> None:
        while self._active and next(iter(self._active.values())).last_s < self._now_s - ACTIVE_S:
            self._active.popitem(last=False)

    def _next(self, seen: set[Sequence], held_back: Collection[str]) -> Sequence | None:
        lines = sorted(
            self._lines.values(), key=lambda line: line.served
        )  # stable: ties go to the higher class
        found = (self._next_in(line, seen, held_back) for line in lines)
        return next((seq for seq in found if seq is not None), None)

    def _next_in(self, line: _Line, seen: set[Sequence], held_back: Collection[str]) -> Sequence | None:
        """The first resident request among tenants close to the lowest counter, else the first of the lowest."""
        choice: Sequence | None = None
        for counter, tenant in islice(line.order, LOOK_AHEAD):
            if choice is not None and counter > line.order[0][0] + self._max_lead:
                break
            if tenant in held_back:
                continue
            for seq in islice(line.queues[tenant], LOOK_AHEAD):
                if seq in seen:
                    continue
                if choice is None and seq.arrival_s < self._now_s - self._max_wait_s:
                    return seq
                if self._is_resident(seq):
                    return seq
                choice = choice or seq
        return choice

    def _enter(self, seq: Sequence, since_s: float) -> OrderedDict[Sequence, None]:
        tenant, line = seq.request.tenant, self._lines[seq.request.service_class]
        if tenant not in line.queues:
            line.queues[tenant] = OrderedDict()
            line.turns[tenant] = since_s
            insort(line.order, (self._served[tenant], tenant))
        return line.queues[tenant]

    def _lift(self, seq: Sequence) -> None:
        """Raise the counters of who was away to the lowest of those who wait, or to the last one that left."""
        tenant, service_class = seq.request.tenant, seq.request.service_class
        waiting = [line for line in self._lines.values() if line.order]
        if not any(tenant in line.queues for line in waiting):
            floor = min((line.order[0][0] for line in waiting), default=None)
            if floor is None and self._last_tenant is not None:
                floor = self._served[self._last_tenant]
            self._set(tenant, max(self._served[tenant], floor or 0.0))
        line = self._lines[service_class]
        if not line.order:
            lowest = min((other.served for other in waiting), default=None)
            if lowest is None and self._last_class is not None:
                lowest = self._lines[self._last_class].served
            line.served = max(line.served, lowest or 0.0)

    def _set(self, tenant: str, counter: float) -> None:
        for line in self._lines.values():
            line.place(tenant, self._served[tenant], counter)
        self._served[tenant] = counter
