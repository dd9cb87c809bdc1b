"""Which tokens of which requests run in the next step. Policy only: no torch, no tensors.

Continuous batching with chunked prefill, within one token budget a step: first the running requests go on, one token
each where they decode, then waiting ones are admitted in the queue's order. A request whose delta is still loading is
passed over, so a cold delta delays nobody else; so is one whose prompt a running request is about to compute.

The rows of a search (`Sequence.together`) come, run and go as one: the first computes what they have in common, the
others get a copy of it, and from then on their last tokens run in the same step or not at all.

Nothing is reserved for tokens that are not there yet. Where a running request finds no room to grow, the lowest and
youngest one is preempted: slot and lease are freed, its tokens are kept and computed again later.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count
from typing import NamedTuple

from adapters.errors import DeltamuxError, Overloaded
from serving.engine.fair_queue import CLASS_RANK
from serving.engine.kv_manager import KVManager
from serving.engine.leases import DeltaLeases, NotYet
from serving.engine.prefix_cache import HashChain, PrefixKeys
from serving.engine.sequence import LeasedDelta, ScheduledRow, Sequence, max_total_len, require_readable
from serving.engine.step import Step
from serving.engine.waiting import AdmissionRate, WaitingQueue

OUTPUT_COST = 2.0
"""What a generated token is charged, in computed prompt tokens (S-LoRA's weights for the VTC)."""


class Failed(NamedTuple):
    """A waiting request that can't be admitted, and why."""

    seq: Sequence
    error: DeltamuxError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Tokens of one step, length of the queue, the age from which a request goes first, and at which it is refused.

    `whole_rows`: prompts are not computed in pieces; a step's last one may go beyond its tokens. `max_read`: entries
    of an encoder-decoder's longest prompt.
    """

    max_num_batched_tokens: int
    max_queue: int
    max_wait_s: float
    max_queue_s: float
    whole_rows: bool = False
    max_read: int = 0


class _Outcome(Enum):
    """What became of an attempt to admit: LATER, this one waits; FULL, nobody fits."""

    ADMITTED = auto()
    LATER = auto()
    CROWDED = auto()
    FULL = auto()


class Scheduler:
    """Waiting and running requests, their slots and leases. `clock` gives seconds, as `Sequence.arrival_s` does.

    `pad_token_id`: what the backbone's configuration calls a pad.
    """

    def __init__(
        self,
        kv: KVManager,
        leases: DeltaLeases,
        queue: WaitingQueue,
        keys: PrefixKeys,
        *,
        limits: SchedulerLimits,
        clock: Callable[[], float],
        pad_token_id: int | None = None,
    ) -> None:
        self.kv = kv
        self.leases = leases
        self.queue = queue
        self.limits = limits
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._keys = keys
        self._clock = clock
        self._pad_token_id = pad_token_id
        self._arrivals = count()
        self._rate = AdmissionRate()
        self._num_admitted = 0
        self._awaited: Counter[str | None] = Counter()

    @property
    def num_free(self) -> int:
        """See `waiting.Batch`."""
        return self.kv.num_free_slots

    # -- the step -----------------------------------------------------------------------------------------------

    def schedule(self) -> tuple[list[ScheduledRow], list[Failed]]:
        """The rows of the next step, and the waiting requests that turned out to be impossible."""
        now_s = self._clock()
        failed = self._refuse_expired(now_s)
        for seq in self.running:
            self._publish(seq)
            self._share(seq)
        step = Step(self.limits.max_num_batched_tokens, self.limits.whole_rows)
        self._continue_running(step)
        carried = list(step.rows)
        self._num_admitted = 0
        self._admit_waiting(step, failed, now_s)
        self._rate.note(now_s, self._num_admitted, len(self.queue))
        for seq in carried:
            self._charge(seq, step.rows.get(seq, 0))
        return [ScheduledRow(seq, num_tokens) for seq, num_tokens in step.rows.items()], failed

    def _continue_running(self, step: Step) -> None:
        # Decodes first: a running stream is never starved by somebody's long prompt. Then the highest class and the
        # oldest, so that whoever is preempted for room comes later in this loop.
        requests = [seq for seq in self.running if seq.leads]
        for seq in sorted(
            requests, key=lambda seq: (any(row.num_pending > 1 for row in seq.rows), *_priority(seq))
        ):
            while seq.slot >= 0 and not self._grow(seq):
                self._preempt(max(self.running, key=_priority), step)
            if seq.slot >= 0 and step.budget > 0:
                step.run(seq)

    def _grow(self, seq: Sequence) -> bool:
        return all(self.kv.grow(row.slot, row.num_beside + len(row.tokens)) for row in seq.rows)

    def _admit_waiting(self, step: Step, failed: list[Failed], now_s: float) -> None:
        """Admit while there is room.

        Where the oldest overdue request finds none for its delta, others may use what is resident, but no new delta
        comes in, and the delta with the fewest requests takes no more of them, so that it drains.
        """
        crowded, closed = False, None
        for seq in self.queue.candidates(now_s, self):
            if step.budget <= 0:
                return
            digest = seq.request.adapter_digest
            if crowded and digest is not None and (digest == closed or not self.leases.is_resident(digest)):
                continue
            try:
                outcome = self._admit(seq, step, now_s)
            except DeltamuxError as error:
                self._leave_queue(seq)
                failed.append(Failed(seq, error))
                continue
            if outcome is _Outcome.ADMITTED:
                self._share(seq)
                step.run(seq)
                for row in seq.rows:
                    self._charge(row, step.rows.get(row, 0))
            elif outcome is _Outcome.CROWDED and not crowded and self._is_overdue(seq, now_s):
                crowded, closed = True, self._delta_with_fewest_rows()
                if closed is None:  # no delta to drain: what runs must end first
                    return
            elif outcome is _Outcome.FULL:
                return

    def _admit(self, seq: Sequence, step: Step, now_s: float) -> _Outcome:
        """Try to admit `seq`, in the place of running requests that should yield to it if need be."""
        while True:
            fits = self.kv.num_free_slots >= len(seq.rows)
            outcome = self._try_admit(seq, now_s) if fits else _Outcome.FULL
            if outcome is not _Outcome.FULL:
                return outcome
            yielding = [
                other
                for other in self.running
                if not self._is_overdue(other, now_s) and self.queue.should_yield(other, seq)
            ]
            if not yielding:
                return outcome
            self._preempt(max(yielding, key=_priority), step)

    def _try_admit(self, seq: Sequence, now_s: float) -> _Outcome:
        digest = seq.request.adapter_digest
        delta = None if digest is None else self.leases.try_lease(digest)
        if isinstance(delta, NotYet):
            return _Outcome.CROWDED if delta is NotYet.CROWDED else _Outcome.LATER
        outcome = _Outcome.LATER
        try:
            outcome = self._open(seq, delta, overdue=self._is_overdue(seq, now_s))
        finally:
            if outcome is not _Outcome.ADMITTED and digest is not None:
                self.leases.end_lease(digest)
        return outcome

    def _open(self, seq: Sequence, delta: LeasedDelta | None, *, overdue: bool) -> _Outcome:
        """Give `seq` a slot for each row, the first with whatever of its prompt is known already."""
        request = seq.request
        prefix_len = 0 if delta is None else delta.prefix_len
        num_read = seq.num_read(delta)
        room = self.kv.max_entries(0 if delta is None else delta.device_bytes, len(seq.rows), num_read)
        room -= prefix_len
        if seq.source:
            require_readable(len(seq.source), self.limits.max_read - num_read + len(seq.source))
        elif delta is not None:
            room -= delta.num_inserted
        seq.max_len = max_total_len(seq.num_prompt, request.max_tokens, room, begins=bool(seq.source))
        seq.pool_for(delta, self._pad_token_id)
        if seq.chain is None and self._keys.enabled:
            root = self._keys.root(
                tenant=request.tenant,
                adapter_digest=request.adapter_digest,
                prefix_len=prefix_len,
                position_offset=0 if delta is None else delta.position_offset,
                cuts=seq.cuts_of(delta),
            )
            seq.chain = HashChain(root, num_fixed=seq.num_prompt if seq.together else None)
        reused = None if seq.needs_whole_prompt else seq.chain
        if reused and not overdue and 2 * self.kv.will_be_cached(reused, seq.tokens) >= len(seq.tokens):
            return _Outcome.LATER
        opened = self.kv.open(
            reused,
            seq.tokens,
            prefix_len + num_read,
            headroom=len(self.running),
            num_beside=len(seq.rows) - 1,
        )
        if opened is None:
            return _Outcome.FULL
        for row, slot in zip(seq.rows, (opened.slot, *opened.beside), strict=True):
            row.admit(slot, delta)
            self.running.append(row)
        seq.num_computed = opened.num_cached
        if seq.num_generated == 0:
            seq.num_cached = opened.num_cached
        self._leave_queue(seq)
        self._num_admitted += 1
        return _Outcome.ADMITTED

    # -- requests come and go -----------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue `seq`. Raises Overloaded when the queue is full, or when it would wait longer than it may."""
        if len(self.queue) >= self.limits.max_queue:
            raise Overloaded(
                f"{len(self.queue)} requests are waiting, which is the limit.", remedy="Try again later."
            )
        self._refuse_in_vain(seq)
        now_s, order = self._clock(), next(self._arrivals)
        for row in seq.rows:
            row.arrival_s, row.order = now_s, order
        self.queue.add(seq)
        digest = seq.request.adapter_digest
        self._awaited[digest] += 1
        if digest is not None:
            self.leases.prefetch(digest)

    def finish(self, seq: Sequence, *, failed: bool = False) -> None:
        """Free the slots and the lease of a running request, of which `seq` is any row, or drop a waiting one.

        `failed`: its numbers went wrong, so nothing of its slots may be seen by anyone again.
        """
        if seq.slot >= 0:
            self._release(seq, sound=seq.is_sound and not failed)
        elif seq in self.queue:
            self._leave_queue(seq)

    def is_awaited(self, digest: str) -> bool:
        """True while a waiting request needs the delta."""
        return self._awaited[digest] > 0

    def _preempt(self, row: Sequence, step: Step) -> None:
        seq = row.rows[0]
        step.drop(seq)
        self._release(seq, sound=seq.is_sound)
        for each in seq.rows:
            each.num_computed, each.is_encoded = 0, False
        self.queue.put_back(seq)
        self._awaited[seq.request.adapter_digest] += 1
        self.num_preemptions += 1

    def _release(self, seq: Sequence, *, sound: bool) -> None:
        for row in seq.rows:
            if sound:
                self._publish(row)
            self.running.remove(row)
            self.kv.close(row.slot, sound=sound)
            row.slot, row.delta = -1, None
        if seq.request.adapter_digest is not None:
            self.leases.end_lease(seq.request.adapter_digest)

    def _publish(self, seq: Sequence) -> None:
        if seq.chain is not None and seq.is_sound:
            self.kv.publish(seq.slot, seq.chain, seq.tokens, seq.num_computed)

    def _share(self, seq: Sequence) -> None:
        """When the first row of a search is computed but for its last token, the others get what they have of it."""
        for row in seq.together[1:] if seq.leads and seq.num_pending == 1 else ():
            if not row.num_computed and (known := seq.num_common(row)):
                self.kv.copy(seq.slot, row.slot, 0, row.prefix_len + known)
                row.num_computed, row.is_encoded = known, seq.is_encoded

    def _leave_queue(self, seq: Sequence) -> None:
        self.queue.remove(seq)
        digest = seq.request.adapter_digest
        self._awaited[digest] -= 1
        if not self._awaited[digest]:
            del self._awaited[digest]

    def _refuse_in_vain(self, seq: Sequence) -> None:
        """Raise Overloaded where `seq` would be refused later anyhow: its caller learns it now, and when to return."""
        may_wait_s = min(self.limits.max_queue_s, seq.request.max_wait_s or math.inf)
        will_wait_s = self._rate.wait_s(self.queue.num_ahead(seq))
        if will_wait_s > may_wait_s:
            raise Overloaded(
                f"The request would wait {will_wait_s:.0f} s for a place; the limit is {may_wait_s:g} s.",
                retry_after_s=will_wait_s - may_wait_s,
                remedy="Try again later.",
            )

    def _refuse_expired(self, now_s: float) -> list[Failed]:
        failed = []
        for seq in self.queue.expired(now_s - self.limits.max_queue_s):
            self._leave_queue(seq)
            waited = f"The request waited {now_s - seq.arrival_s:.0f} s for a place, which is the limit."
            remedy = f"Try again in {math.ceil(self.limits.max_wait_s)} s, or when the server is less busy."
            failed.append(Failed(seq, Overloaded(waited, remedy=remedy)))
        return failed

    # -- fairness -----------------------------------------------------------------------------------------------

    def _charge(self, seq: Sequence, num_tokens: int) -> None:
        """Charge the tenant for tokens that are computed; those that are computed again are free."""
        if num_tokens == 0:
            return
        reached = len(seq.source) + min(seq.num_computed + num_tokens, seq.num_prompt)
        known = len(seq.source) - seq.num_to_encode + seq.num_computed
        fresh = max(0, reached - max(seq.num_charged, known))
        seq.num_charged = max(seq.num_charged, reached)
        generates = seq.request.pooling is None and num_tokens == seq.num_pending
        self.queue.charge(seq, fresh + (OUTPUT_COST if generates else 0.0))

    def _is_overdue(self, seq: Sequence, now_s: float) -> bool:
        return now_s - seq.arrival_s > self.limits.max_wait_s

    def _delta_with_fewest_rows(self) -> str | None:
        rows = Counter(seq.request.adapter_digest for seq in self.running)
        del rows[None]
        return min(rows, key=lambda digest: (rows[digest], digest or ""), default=None)


def _priority(seq: Sequence) -> tuple[int, int]:
    """Lower is served first and preempted last: class, then arrival."""
    return CLASS_RANK[seq.request.service_class], seq.order
