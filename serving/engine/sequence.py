"""A request in flight, as scheduler, runner and engine see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from adapters.errors import ContextLengthExceeded
from adapters.positions import UNCUT, Cut, Positions, cuts
from serving.core import Request
from serving.engine.prefix_cache import HashChain


class LeasedDelta(Protocol):
    """What the scheduler needs to know of a placed delta."""

    @property
    def prefix_len(self) -> int: ...

    @property
    def position_offset(self) -> int: ...

    @property
    def device_bytes(self) -> int: ...

    @property
    def positions(self) -> frozenset[Positions]: ...


@dataclass(eq=False, slots=True)
class Sequence:
    """One request in flight. `tokens` are prompt and generated ones; the first `num_computed` are in the KV cache.

    `arrival_s` and `order`, the place among all arrivals, are set on arrival. `slot`, `delta`, `max_len` are set on
    admission, and `slot` is -1 outside the batch. `num_charged` tokens were charged to the tenant; `num_cached` is
    what the admission that led to the first token found in the prefix cache. `state` belongs to the engine (sampler,
    detokenizer). `cuts`: where the tokens begin on which other parts of the delta act.
    """

    request: Request
    tokens: list[int]
    state: Any
    arrival_s: float = 0.0
    order: int = 0
    num_computed: int = 0
    num_charged: int = 0
    num_cached: int = 0
    slot: int = -1
    delta: LeasedDelta | None = None
    chain: HashChain | None = None
    max_len: int = 0
    cuts: tuple[Cut, ...] = UNCUT
    wants_prompt_logits: bool = field(init=False)

    def __post_init__(self) -> None:
        self.wants_prompt_logits = self.request.sampling.prompt_logprobs is not None

    def admit(self, slot: int, delta: LeasedDelta | None) -> None:
        """Take a slot and a leased delta."""
        self.slot, self.delta = slot, delta
        self.cuts = self.cuts_of(delta)

    def cuts_of(self, delta: LeasedDelta | None) -> tuple[Cut, ...]:
        """Where other parts of `delta` would begin to act."""
        return UNCUT if delta is None else cuts(delta.positions, self.request.prompt_token_ids)

    @property
    def num_prompt(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that are not in the KV cache yet."""
        return len(self.tokens) - self.num_computed

    @property
    def is_sound(self) -> bool:
        """True when a finite result has come of every token that was computed.

        Until then the slot may hold numbers that are not finite, which nobody else may ever read.
        """
        return self.num_generated > 0 and self.num_pending == 1

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
        return self.num_tokens == self.seq.num_pending


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
