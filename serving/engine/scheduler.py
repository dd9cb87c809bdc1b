"""Which tokens of which requests run in the next step. Policy only: no torch, no tensors.

Continuous batching with chunked prefill: every step first continues the running requests, one token each where they
decode, then admits waiting ones in order of arrival, all within one token budget. A request whose delta is still
loading is passed over, so a cold delta delays nobody else.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from adapters.errors import ContextLengthExceeded, DeltamuxError, Overloaded
from serving.core import Request
from serving.engine.kv_manager import KVManager


class LeasedDelta(Protocol):
    """What the scheduler needs to know of a placed delta."""

    @property
    def prefix_len(self) -> int: ...

    @property
    def position_offset(self) -> int: ...

    @property
    def invocation(self) -> tuple[int, ...]: ...


class DeltaLeases(Protocol):
    """Grants leases on deltas in device memory."""

    def try_lease(self, digest: str) -> LeasedDelta | None:
        """The delta, leased, or None while it is being loaded. Raises DeltamuxError when it can't be had."""
        ...

    def end_lease(self, digest: str) -> None:
        """Give a lease back."""
        ...


@dataclass(eq=False, slots=True)
class Sequence:
    """One request in flight. `tokens` are prompt and generated ones; the first `num_computed` are in the KV cache.

    `slot`, `delta`, `max_len` are set on admission; `state` belongs to the engine (sampler, detokenizer).
    `invoked_at`: index of the token from which on all of the delta acts; before it, only what needs no invocation.
    """

    request: Request
    tokens: list[int]
    state: Any
    num_computed: int = 0
    slot: int = -1
    delta: LeasedDelta | None = None
    max_len: int = 0
    invoked_at: int = 0
    wants_prompt_logits: bool = field(init=False)

    def __post_init__(self) -> None:
        self.wants_prompt_logits = self.request.sampling.prompt_logprobs is not None

    def admit(self, slot: int, delta: LeasedDelta | None) -> None:
        """Take a slot and a leased delta."""
        self.slot, self.delta = slot, delta
        invocation = () if delta is None else delta.invocation
        self.invoked_at = last_occurrence(invocation, self.request.prompt_token_ids)

    @property
    def num_prompt(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def prefix_len(self) -> int:
        """Entries in the KV slot before the first real token."""
        return 0 if self.delta is None else self.delta.prefix_len

    @property
    def position_offset(self) -> int:
        """Position id of the first real token."""
        return 0 if self.delta is None else self.delta.position_offset


class ScheduledRow(NamedTuple):
    """The next `num_tokens` uncomputed tokens of `seq` run in this step."""

    seq: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """True when the step reaches the row's last token, so that its logits give the next one."""
        return self.seq.num_computed + self.num_tokens == len(self.seq.tokens)


class Failed(NamedTuple):
    """A waiting request that can't be admitted, and why."""

    seq: Sequence
    error: DeltamuxError


class Scheduler:
    """Waiting and running requests, their slots and leases."""

    def __init__(
        self, kv: KVManager, leases: DeltaLeases, *, max_num_batched_tokens: int, max_queue: int
    ) -> None:
        self.kv = kv
        self.leases = leases
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_queue = max_queue
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, seq: Sequence) -> None:
        """Queue `seq`. Raises Overloaded when the queue is full."""
        if len(self.waiting) >= self.max_queue:
            raise Overloaded(
                f"{len(self.waiting)} requests are waiting, which is the limit.", remedy="Try again later."
            )
        self.waiting.append(seq)

    def is_awaited(self, digest: str) -> bool:
        """True while a waiting request needs the delta."""
        return any(seq.request.adapter_digest == digest for seq in self.waiting)

    def schedule(self) -> tuple[list[ScheduledRow], list[Failed]]:
        """The rows of the next step, and the waiting requests that turned out to be impossible."""
        budget = self.max_num_batched_tokens
        rows: list[ScheduledRow] = []
        # Decodes first: a running stream is never starved by somebody's long prompt.
        for seq in sorted(self.running, key=lambda s: len(s.tokens) - s.num_computed > 1):
            count = min(len(seq.tokens) - seq.num_computed, budget)
            if count > 0:
                rows.append(ScheduledRow(seq, count))
                budget -= count
        failed = []
        if budget > 0:
            for seq, error in self._admit():
                if error is not None:
                    failed.append(Failed(seq, error))
                    continue
                count = min(len(seq.tokens), budget)
                rows.append(ScheduledRow(seq, count))
                budget -= count
                if budget == 0:
                    break
        return rows, failed

    def _admit(self) -> Iterator[tuple[Sequence, DeltamuxError | None]]:
        """Admit waiting requests one by one while there is room; the caller stops when its budget is spent."""
        for seq in list(self.waiting):
            try:
                admitted = self._try_admit(seq)
            except DeltamuxError as error:
                self.waiting.remove(seq)
                yield seq, error
                continue
            if admitted is None:
                return
            if admitted:
                self.waiting.remove(seq)
                self.running.append(seq)
                yield seq, None

    def _try_admit(self, seq: Sequence) -> bool | None:
        """True: admitted. False: its delta is not there yet. None: no room for anyone."""
        digest = seq.request.adapter_digest
        delta = None
        if digest is not None:
            delta = self.leases.try_lease(digest)
            if delta is None:
                return False
        try:
            slot = self._allocate(seq, delta)
        except DeltamuxError:
            if digest is not None:
                self.leases.end_lease(digest)
            raise
        if slot is None:
            if digest is not None:
                self.leases.end_lease(digest)
            return None
        seq.admit(slot, delta)
        return True

    def _allocate(self, seq: Sequence, delta: LeasedDelta | None) -> int | None:
        prefix = 0 if delta is None else delta.prefix_len
        room = self.kv.max_len - prefix
        seq.max_len = max_total_len(seq.num_prompt, seq.request.sampling.max_tokens, room)
        return self.kv.allocate(prefix + seq.max_len)

    def finish(self, seq: Sequence) -> None:
        """Free the slot and the lease of a running request, or drop a waiting one."""
        if seq in self.running:
            self.running.remove(seq)
            self.kv.free(seq.slot)
            if seq.request.adapter_digest is not None:
                self.leases.end_lease(seq.request.adapter_digest)
            seq.slot, seq.delta = -1, None
        elif seq in self.waiting:
            self.waiting.remove(seq)


def last_occurrence(wanted: tuple[int, ...], tokens: tuple[int, ...]) -> int:
    """Index at which `wanted` starts for the last time in `tokens`, 0 for an empty one; past all where it does not."""
    if not wanted:
        return 0
    starts = range(len(tokens) - len(wanted), -1, -1)
    return next((at for at in starts if tokens[at : at + len(wanted)] == wanted), sys.maxsize)


def max_total_len(num_prompt: int, max_tokens: int | None, room: int) -> int:
    """Prompt and generated tokens that a request may reach. Raises ContextLengthExceeded when they do not fit."""
    wanted = num_prompt + (1 if max_tokens is None else max_tokens)
    if wanted > room:
        raise ContextLengthExceeded(
            f"The prompt has {num_prompt} tokens and max_tokens is {max_tokens or 1}; {room} fit"
            " (virtual tokens of the delta deducted).",
            param="prompt" if num_prompt >= room else "max_tokens",
            remedy="Shorten the prompt or lower max_tokens.",
        )
    return room if max_tokens is None else wanted
