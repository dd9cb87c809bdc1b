"""A request in flight, as scheduler, runner and engine see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from adapters.backbone_spec import BackboneSpec
from adapters.errors import ContextLengthExceeded, InvalidRequest
from adapters.normal_form import Site
from adapters.positions import UNCUT, Cut, Positions, cuts
from adapters.tasks import MEAN_EMBEDDING, HeadSpec, Task
from serving.core import ROUTES, Request
from serving.engine.prefix_cache import HashChain


class LeasedDelta(Protocol):
    """What the scheduler needs to know of a placed delta."""

    @property
    def prefix_len(self) -> int: ...

    @property
    def position_offset(self) -> int: ...

    @property
    def cross_prefix_len(self) -> int: ...

    @property
    def num_inserted(self) -> int: ...

    @property
    def device_bytes(self) -> int: ...

    @property
    def positions(self) -> frozenset[Positions]: ...

    @property
    def task(self) -> Task: ...

    @property
    def head_spec(self) -> HeadSpec | None: ...


@dataclass(eq=False, slots=True)
class Sequence:
    """One request in flight. `tokens` are prompt and generated ones; the first `num_computed` are in the KV cache.

    On an encoder-decoder the request's prompt is `source`, which the encoder reads whole before the first step of the
    decoder (`is_encoded`); `tokens` are the decoder's, of which the first `num_prompt` were given.
    `arrival_s` and `order`, the place among all arrivals, are set on arrival. `slot`, `delta`, `max_len` are set on
    admission, and `slot` is -1 outside the batch. `num_charged` tokens were charged to the tenant; `num_cached` is
    what the admission that led to the first token found in the prefix cache. `state` belongs to the engine (sampler,
    detokenizer). `cuts`: where the tokens begin on which other parts of the delta act. `pooled_tokens`: those of the
    prompt whose final hidden states a task head reads; `answered` when it has, or when all rows of a search had a
    step. `together`: the rows of one search, which run their last tokens in the same step; the first one stands for
    the request: it alone is queued, and shares its prompt.
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
    pooled_tokens: range = range(0)
    answered: bool = False
    together: tuple[Sequence, ...] = ()
    source: tuple[int, ...] = ()
    is_encoded: bool = False
    num_prompt: int = field(init=False)
    wants_prompt_logits: bool = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens) if self.source else len(self.request.prompt_token_ids)
        self.wants_prompt_logits = self.request.sampling.prompt_logprobs is not None

    def admit(self, slot: int, delta: LeasedDelta | None) -> None:
        """Take a slot and a leased delta."""
        self.slot, self.delta, self.answered = slot, delta, False
        self.cuts = self.cuts_of(delta)

    def pool_for(self, delta: LeasedDelta | None, pad_token_id: int | None) -> None:
        """Note which tokens the task head reads. `pad_token_id` is the backbone's.

        Raises InvalidRequest where neither `delta` nor the bare backbone answers what is asked.
        """
        require_task(self.request, delta)
        if self.request.pooling is None:
            return
        head = (None if delta is None else delta.head_spec) or MEAN_EMBEDDING
        pad = pad_token_id if head.pad_token_id is None else head.pad_token_id
        match head.pooling:
            case "cls" | "first" | "pooler":
                self.pooled_tokens = range(1)
            case "last":
                self.pooled_tokens = range(self.num_prompt - 1, self.num_prompt)
            case "last_not_pad":
                tokens = self.request.prompt_token_ids
                last = next((at for at in reversed(range(len(tokens))) if tokens[at] != pad), 0)
                self.pooled_tokens = range(last, last + 1)
            case _:
                assert head.pooling != "mask" or self.request.masks, "only the backend makes rows of a cloze"
                self.pooled_tokens = range(self.num_prompt)

    @property
    def needs_whole_prompt(self) -> bool:
        """True where something is wanted of tokens before the last one, which therefore must all be computed."""
        return self.wants_prompt_logits or bool(
            self.pooled_tokens and self.pooled_tokens[0] < self.num_prompt - 1
        )

    def cuts_of(self, delta: LeasedDelta | None) -> tuple[Cut, ...]:
        """Where other parts of `delta` would begin to act."""
        return UNCUT if delta is None else cuts(delta.positions, self.request.prompt_token_ids)

    @property
    def num_to_encode(self) -> int:
        """Tokens that the encoder has yet to read."""
        return 0 if self.is_encoded else len(self.source)

    def num_read(self, delta: LeasedDelta | None) -> int:
        """Entries that cross-attention would see under `delta`, whose own are among them."""
        own = 0 if delta is None else delta.cross_prefix_len + delta.num_inserted
        return len(self.source) + own if self.source else 0

    @property
    def num_beside(self) -> int:
        """Entries of the KV slot beside those of `tokens`."""
        return self.prefix_len + self.num_read(self.delta)

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
        if self.together:
            return self.together[0].answered
        return self.answered or (self.num_generated > 0 and self.num_pending == 1)

    @property
    def rows(self) -> tuple[Sequence, ...]:
        """All rows of the request."""
        return self.together or (self,)

    @property
    def leads(self) -> bool:
        """True for the row that stands for the request."""
        return not self.together or self.together[0] is self

    def num_common(self, other: Sequence) -> int:
        """How many of the computed tokens the other row of the search begins with, too."""
        known = min(self.num_computed, len(other.tokens) - 1)
        start = min(self.num_prompt, known)
        return next((i for i in range(start, known) if self.tokens[i] != other.tokens[i]), known)

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
        return self.num_tokens == self.seq.num_pending and self.seq.request.pooling is None

    @property
    def pooled(self) -> range:
        """The tokens of this step whose final hidden states are wanted, counted from its first."""
        first, wanted = self.seq.num_computed, self.seq.pooled_tokens
        start, stop = max(wanted.start - first, 0), min(wanted.stop - first, self.num_tokens)
        return range(start, max(start, stop))


WITHOUT_HEAD = frozenset({Task.EMBEDDING, Task.FILL_MASK})
"""Tasks that need no head of the delta's own."""


def require_task(request: Request, delta: LeasedDelta | None) -> None:
    """Raises InvalidRequest unless `delta`, or the bare backbone, answers what is asked."""
    given = Task.CAUSAL_LM if delta is None else delta.task
    spec = None if delta is None else delta.head_spec
    is_cloze = spec is not None and spec.cloze is not None
    without_head = given is Task.CAUSAL_LM or given is Task.EMBEDDING
    without_head |= is_cloze and request.task is Task.FILL_MASK  # its head is the backbone's own
    if request.task is not given and not (request.task in WITHOUT_HEAD and without_head):
        if delta is None:
            raise InvalidRequest(
                f"The bare backbone has no head for {request.task.value}.",
                param="model",
                remedy="Name a delta that was trained for it.",
            )
        raise InvalidRequest(
            f"The delta was trained for {given.value}, not for {request.task.value}.",
            param="model",
            remedy=f"Use {ROUTES[given]}.",
        )
    if (
        request.pooling is None
        or request.pooling.num_labels is None
        or delta is None
        or delta.head_spec is None
    ):
        return
    if (got := len(delta.head_spec.labels)) != (wanted := request.pooling.num_labels):
        raise InvalidRequest(
            f"The delta's head has {got} labels, expected {wanted}.",
            param="model",
            remedy=f"Use {ROUTES[given]}.",
        )


def refuse_unanswerable(request: Request, spec: BackboneSpec) -> None:
    """Raises InvalidRequest for what the backbone, whatever the delta, does not do or can't do exactly."""
    if request.task is Task.FILL_MASK and (spec.kind != "encoder" or Site("logits") not in spec.writer):
        raise InvalidRequest(
            f"{spec.name} has no masked language model head.",
            param="model",
            remedy="Serve an encoder whose checkpoint has one.",
        )
    if spec.kind == "decoder":
        return
    if spec.kind == "encoder-decoder":
        _refuse_unread(request, spec)
        return
    if request.pooling is None:
        raise InvalidRequest(
            f"{spec.name} is an encoder and does not generate.",
            param="model",
            remedy=f"Use {ROUTES[Task.EMBEDDING]}, or a delta's own task.",
        )
    if spec.first_position and (pad := spec.first_position - 1) in request.prompt_token_ids:
        raise InvalidRequest(
            f"The prompt has the padding token, {pad}, which has no position of its own in {spec.model_type}.",
            param="prompt",
            remedy="Leave it out.",
        )


def _refuse_unread(request: Request, spec: BackboneSpec) -> None:
    """Raises InvalidRequest for what asks an encoder-decoder for anything but what follows a prompt."""
    if request.pooling is not None:
        raise InvalidRequest(
            f"{spec.name} is an encoder-decoder, of which no hidden states are served.",
            param="model",
            remedy="Use /v1/completions.",
        )
    if request.sampling.prompt_logprobs is not None:
        raise InvalidRequest(
            f"{spec.name} is an encoder-decoder: its prompt is read by the encoder and has no log-probabilities.",
            param="prompt_logprobs",
            remedy="Leave it out.",
        )


def require_readable(num_prompt: int, room: int) -> None:
    """Raises ContextLengthExceeded for a prompt that an encoder-decoder's encoder can't read whole."""
    if num_prompt > room:
        raise ContextLengthExceeded(
            f"The prompt has {num_prompt} tokens; {room} fit the encoder (virtual tokens of the delta deducted).",
            param="prompt",
            remedy="Shorten the prompt.",
        )


def max_total_len(num_prompt: int, max_tokens: int | None, room: int, *, begins: bool = False) -> int:
    """Prompt and generated tokens that a request may reach. Raises ContextLengthExceeded when they do not fit.

    `max_tokens` 0: nothing is generated, the prompt alone has to fit. `begins`: the prompt is what a decoder begins
    with, and not the request's.
    """
    wanted = num_prompt + (1 if max_tokens is None else max_tokens)
    if wanted > room and begins:
        raise ContextLengthExceeded(
            f"max_tokens is {max_tokens or 1}; {max(0, room - num_prompt)} fit the decoder.",
            param="max_tokens",
            remedy="Lower max_tokens.",
        )
    if wanted > room:
        generated = "" if max_tokens == 0 else f" and max_tokens is {max_tokens or 1}"
        raise ContextLengthExceeded(
            f"The prompt has {num_prompt} tokens{generated}; {room} fit (virtual tokens of the delta deducted).",
            param="prompt" if num_prompt >= room else "max_tokens",
            remedy=f"Shorten the prompt or {'lower max_tokens' if generated else 'set truncate_prompt_tokens'}.",
        )
    return room if max_tokens is None else wanted
