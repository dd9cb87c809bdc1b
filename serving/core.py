"""The values that travel between gateway, replica and engine. No torch, no I/O.

Generate: `http` builds a `GenerateCall` -> the backend tokenises it into a `Request` -> the engine emits
`TokenEvent`s, the last of which carries the finish reason.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from adapters.errors import ErrorInfo, InvalidRequest
from adapters.tasks import ProblemType, Task

BASE = None
"""The adapter digest of a request that runs on the bare backbone."""


class FinishReason(StrEnum):
    """Why a request ended. Every admitted request ends in exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class ServiceClass(StrEnum):
    """How urgent a tenant's requests are, from most to least."""

    REALTIME = "realtime"
    STANDARD = "standard"
    BATCH = "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamParams:
    """Beam search as transformers' `generate` does it: `width` beams, and the best `num_returned` hypotheses.

    A hypothesis is worth its log-probability divided by its length ** `length_penalty`. The search ends with
    `early_stopping` True once `width` of them are finished; False: once the best beam is not worth more, at the length
    it has, than the worst of these; "never": at no length that it may reach. Raises InvalidRequest naming the field
    that is out of range.
    """

    width: int
    num_returned: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _within("num_beams", self.width, 2, 16)
        _within("n", self.num_returned, 1, self.width)
        _within("length_penalty", self.length_penalty, -5.0, 5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn, or with `beams` searched for.

    `max_tokens` None: as many as the context holds. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    `logprobs`: number of alternatives to report per generated token (None: no log-probabilities at all).
    `prompt_logprobs`: the same for prompt tokens. Raises InvalidRequest naming the field that is out of range.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    beams: BeamParams | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, 1 << 20)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 1e-6, 1.0)
        _within("top_k", self.top_k, 0, 1 << 20)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        if self.seed is not None:
            _within("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _within(name, count, 0, 20)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, -100.0, 100.0)
        if len(self.stop) > 16 or any(not text or len(text) > 256 for text in self.stop):
            raise InvalidRequest(
                "stop: got an empty, over-long or too many strings.",
                param="stop",
                remedy="Send at most 16 strings of 1 to 256 characters.",
            )
        if self.beams is not None:
            self._refuse_beside_beams()

    def _refuse_beside_beams(self) -> None:
        """A search compares whole hypotheses by the model's own probabilities; it does not draw."""
        idle = SamplingParams(temperature=0.0)
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "stop",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "logit_bias",
            "logprobs",
        ):
            if getattr(self, name) != getattr(idle, name):
                raise InvalidRequest(
                    f"{name}: not supported with beam search.",
                    param=name,
                    remedy=f"Leave out {name} or num_beams.",
                )


ROUTES: Mapping[Task, str] = {
    Task.CAUSAL_LM: "/v1/completions",
    Task.SEQUENCE_CLASSIFICATION: "/v1/classify",
    Task.TOKEN_CLASSIFICATION: "/v1/token_classify",
    Task.QUESTION_ANSWERING: "/v1/question_answer",
    Task.EMBEDDING: "/v1/embeddings",
    Task.FILL_MASK: "/v1/fill_mask",
}
"""Where each task is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """What is asked of a prompt in place of generated tokens: the answer of a task head.

    `text_pair`: a second text that the tokenizer joins to the prompt. `truncate_prompt_tokens`: cut the prompt to so
    many tokens, -1 for as many as fit, None to refuse what does not fit. `dimensions`: of an embedding, its first so
    many, normalised again. `num_labels`: how many the head must have. `top_k`: choices for each mask; `targets`: the
    tokens, as text, that may be chosen. Raises InvalidRequest naming the field that is out of range.
    """

    task: Task
    text_pair: str | None = None
    truncate_prompt_tokens: int | None = None
    dimensions: int | None = None
    num_labels: int | None = None
    top_k: int = 1
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens != -1:
            _within("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, 1 << 20)
        if self.dimensions is not None:
            _within("dimensions", self.dimensions, 1, 1 << 20)
        _within("top_k", self.top_k, 1, 100)


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        raise InvalidRequest(
            f"{name}: got {value}, expected {low} to {high}.",
            param=name.partition("[")[0],
            remedy="Send a value in that range.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One message of a chat, as the backbone's own chat template reads it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """What the gateway asks of a backend: one prompt, one delta, one stream of tokens, or with `pooling` one answer.

    `prompt`: text, token ids, or chat messages. `adapter_digest` is a content digest, resolved by the gateway; it is
    BASE for the bare backbone. `adapter_name` labels metrics and errors only. `tenant` is who asks, `weight` its
    share against other tenants' (1: an ordinary one), as the gateway's operator set them. `max_wait_s`: how long it is
    worth waiting for a place; a call that would wait longer is refused at once. `streamed`: whether the caller reads
    tokens as they come; otherwise all that follow the first ones come together.
    """

    request_id: str
    prompt: str | tuple[int, ...] | tuple[ChatMessage, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter_digest: str | None = BASE
    adapter_name: str = ""
    tenant: str = "default"
    weight: float = 1.0
    service_class: ServiceClass = ServiceClass.STANDARD
    pooling: PoolingParams | None = None
    max_wait_s: float | None = None
    streamed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A tokenised request as the engine admits it. The other fields are those of `GenerateCall`.

    `token_types`: which part each token belongs to, where an encoder tells them apart. `masks`: the places that
    FILL_MASK asks for, or a cloze head's; `targets`: the token ids that may be chosen there, empty for all; `words`: in
    their place what a cloze head wants scored, one id a mask each.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter_digest: str | None = BASE
    tenant: str = "default"
    weight: float = 1.0
    service_class: ServiceClass = ServiceClass.STANDARD
    max_wait_s: float | None = None
    pooling: PoolingParams | None = None
    token_types: tuple[int, ...] = ()
    masks: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    words: tuple[tuple[int, ...], ...] = ()

    @property
    def task(self) -> Task:
        """What is asked."""
        return Task.CAUSAL_LM if self.pooling is None else self.pooling.task

    @property
    def max_tokens(self) -> int | None:
        """Tokens to generate at most, None for as many as fit."""
        return self.sampling.max_tokens if self.pooling is None else 0


@dataclass(frozen=True, slots=True)
class Alternative:
    """One token and its natural-log probability; `text` is its own decoding, empty until detokenised."""

    token_id: int
    logprob: float
    text: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of the token that came, and of the most likely ones, of the unmodified distribution."""

    chosen: Alternative
    top: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEvent:
    """The first event of every accepted call: the tokens that the prompt became.

    `logprobs` is given where asked for, one entry a token, None for the first. `num_cached_tokens`: those of the
    prompt whose keys and values were there already.
    """

    prompt_token_ids: tuple[int, ...]
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that may stand at a mask, and its probability; `text` is its own decoding, empty until detokenised."""

    token_id: int
    probability: float
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """What a task head made of one prompt.

    `values` are `shape` fp32 numbers in the machine's order: [d] an embedding, [C] the scores of an input, [T, C]
    those of its tokens; of `Request.words`, one score each. `probs`: the same of probabilities, where the scores are
    logits. `ood`: see `PlacedHead.out_of_distribution`. Of a prompt that was text, one entry a token: `offsets` of its
    characters, and `words`, the index of the word that it belongs to, None for special tokens; `sequences`: 1 for those
    of the second text of a pair. `masks`: per mask its choices, the likeliest first. `features`: of `Request.words`,
    the mean [d] fp32 of the states at the masks, where the head has class statistics.
    """

    values: bytes
    shape: tuple[int, ...]
    labels: tuple[str, ...] = ()
    problem_type: ProblemType | None = None
    probs: bytes | None = None
    ood: Mapping[str, float] = field(default_factory=dict)
    offsets: tuple[tuple[int, int], ...] = ()
    words: tuple[int | None, ...] = ()
    sequences: tuple[int | None, ...] = ()
    masks: tuple[tuple[Choice, ...], ...] = ()
    features: bytes = b""

    def numbers(self) -> list[float]:
        """`values`, row after row."""
        return array("f", self.values).tolist()

    def probabilities(self) -> list[float] | None:
        """`probs`, row after row."""
        return None if self.probs is None else array("f", self.probs).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """New tokens of one request. `finish_reason` is set on the last event and only there.

    `text` is what became printable with these tokens; it can be empty while a character is incomplete. `pooled` is the
    whole answer to a request with `pooling`, in its only event of this kind. With beam search, `num_searched` tokens
    were computed, and the last event has the `hypotheses`, best first, each like the only event of a request.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None
    pooled: Pooled | None = None
    num_searched: int = 0
    hypotheses: tuple[TokenEvent, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureEvent:
    """The only event of a call that was refused before it was admitted."""

    error: ErrorInfo


Event = PromptEvent | TokenEvent | FailureEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneInfo:
    """A backbone as the gateway knows it. `spec_json` is a `BackboneSpec`.

    `reads_apart`: prompt and answer may have `max_model_len` tokens each, not together.
    """

    name: str
    digest: str
    spec_json: str
    max_model_len: int
    vocab_size: int
    has_chat_template: bool
    created: int
    reads_apart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionProof:
    """What the backend measured when it placed a delta for the first time.

    `effect`: max absolute logit change on the probe tokens against the bare row, above 0: a delta without one is not
    admitted. For a task head, of its scores; for one that stands alone, how far they are apart. Sizes in bytes, times
    in seconds.
    """

    effect: float
    reference_scale: float
    load_s: float
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One Prometheus sample: name, labels, value."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricFamily:
    """One Prometheus family as plain values, so that a replica's registry crosses a process border."""

    name: str
    documentation: str
    type: str
    samples: tuple[Sample, ...]


class Backend(Protocol):
    """A backbone that serves deltas, in this process or behind a Ray handle."""

    async def describe(self) -> BackboneInfo:
        """The backbone's identity and limits."""
        ...

    def generate(self, call: GenerateCall) -> AsyncGenerator[tuple[Event, ...], None]:
        """Batches of events. The first batch starts with a PromptEvent or is a single FailureEvent.

        Closing the iterator cancels the request within one engine step.
        """
        ...

    async def admit(self, digest: str) -> AdmissionProof | ErrorInfo:
        """Place a stored delta, measure its effect, and say what was measured or why it is refused."""
        ...

    async def activations(self, digest: str) -> bytes | ErrorInfo:
        """One bit per neuron of every feed-forward layer: whether a stored delta activates it on fixed tokens.

        Empty where the backbone's feed-forward layers have no neurons that can be told apart (experts).
        """
        ...

    async def release(self, digest: str) -> int:
        """Drain the delta's requests, free its memory, return the device bytes freed."""
        ...

    async def scrape(self) -> list[tuple[Mapping[str, str], tuple[MetricFamily, ...]]]:
        """Metrics of every replica, each with its identifying labels."""
        ...

    async def heartbeat_age_s(self) -> float:
        """Seconds since the engine loop last turned. Raises Unavailable when no replica answers."""
        ...
