"""The wire models of what callers send: types and finiteness here, ranges in `SamplingParams`.

Strict: no value changes its type, no field is ignored, and an unknown one is refused by name. `user` is who the end
user is: where an alias divides its requests, one user gets one version.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from adapters.errors import InvalidRequest
from serving.core import BeamParams, ChatMessage, SamplingParams

MAX_REFERENCE_CHARS = 300


def shaped(description: str) -> WrapValidator:
    """One message for a field of several types, in place of one per type."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError(
                "wrong_shape", "Input should be {expected}", {"expected": description}
            ) from None

    return WrapValidator(check)


def _only(*accepted: object) -> AfterValidator:
    """A field of OpenAI's that this server takes only where it changes nothing."""

    def check(value: object) -> object:
        if not any(value is item or (type(value) is type(item) and value == item) for item in accepted):
            raise PydanticCustomError("unsupported_value", "Not supported by this server; leave it out")
        return value

    return AfterValidator(check)


# fail_fast: a list of a million wrong items must not make a million errors
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Prompt = Annotated[
    str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)],
    shaped("a string, a list of token ids, a list of strings or a list of lists of token ids"),
]
Stop = Annotated[str | Texts | None, shaped("a string or a list of strings")]
Count = Annotated[int | None, Field(ge=0)]
MaxTokens = Annotated[int | None, Field(ge=1)]


class RequestBody(BaseModel):
    """What every body has in common."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(RequestBody):
    """What a stream carries beside its chunks."""

    include_usage: bool = False


class GenerateBody(RequestBody, ABC):
    """What completions and chat share. A null stands for the default."""

    model: str = Field(min_length=1, max_length=MAX_REFERENCE_CHARS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: MaxTokens = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count = None
    min_p: float | None = None
    seed: int | None = None
    stop: Stop = None
    stop_token_ids: Annotated[TokenIds | None, shaped("a list of token ids")] = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: Count = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    num_beams: Annotated[int | None, Field(ge=1, le=16)] = None
    length_penalty: float | None = None
    early_stopping: Annotated[bool | Literal["never"] | None, shaped('true, false or "never"')] = None
    user: str | None = None

    @property
    def num_samples(self) -> int:
        """Choices per prompt."""
        return self.n or 1

    @property
    def searches(self) -> bool:
        """Whether the choices of a prompt are the best hypotheses of a beam search, which is one call."""
        return (self.num_beams or 1) > 1

    @property
    def num_calls(self) -> int:
        """Calls per prompt."""
        return 1 if self.searches else self.num_samples

    @property
    def num_rows(self) -> int:
        """Rows of a batch per prompt."""
        return (self.num_beams or 1) if self.searches else self.num_samples

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk. Raises InvalidRequest where there is no stream."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise InvalidRequest(
                "stream_options: got options without a stream.",
                param="stream_options",
                remedy="Send it only with stream=true.",
            )
        return self.stream_options.include_usage

    def sampling(self, sample: int) -> SamplingParams:
        """How choice `sample` of each prompt is drawn: seeded, sample i draws as if seeded with seed + i alone.

        Raises InvalidRequest naming the field that is out of range.
        """
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
        beams = self._beams()
        if beams is not None and self.temperature is None:
            given["temperature"] = 0.0
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
            max_tokens=self._max_tokens(),
            seed=None if self.seed is None else self.seed + sample,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=self._logit_bias(),
            logprobs=self._num_logprobs(),
            prompt_logprobs=self.prompt_logprobs,
            ignore_eos=bool(self.ignore_eos),
            beams=beams,
        )

    def _beams(self) -> BeamParams | None:
        if not self.searches:
            for name in ("length_penalty", "early_stopping"):
                if getattr(self, name) is not None:
                    raise InvalidRequest(
                        f"{name}: got it without beam search.",
                        param=name,
                        remedy="Send num_beams of 2 or more as well.",
                    )
            return None
        if self.stream:
            raise InvalidRequest(
                "stream: a beam search has nothing to say before its end.",
                param="stream",
                remedy="Leave out stream or num_beams.",
            )
        return BeamParams(
            width=self.num_rows,
            num_returned=self.num_samples,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            early_stopping=False if self.early_stopping is None else self.early_stopping,
        )

    @abstractmethod
    def _max_tokens(self) -> int | None: ...

    @abstractmethod
    def _num_logprobs(self) -> int | None: ...

    def _logit_bias(self) -> dict[int, float]:
        bias = self.logit_bias or {}
        if wrong := [
            token for token in bias if not (token.isascii() and token.isdigit() and len(token) < 10)
        ]:
            raise InvalidRequest(
                f"logit_bias: got {len(wrong)} keys that are not token ids.",
                param="logit_bias",
                remedy='Write token ids as strings, like {"50256": -100}.',
            )
        return {int(token): value for token, value in bias.items()}


class CompletionBody(GenerateBody):
    """The body of `POST /v1/completions`."""

    prompt: Prompt
    logprobs: Count = None
    echo: Annotated[bool | None, _only(None, False)] = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: Annotated[str | None, _only(None, "")] = None

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Every prompt, one entry each. Raises InvalidRequest for none at all, and for `best_of`."""
        if self.best_of not in (None, self.num_samples):
            raise InvalidRequest(
                "best_of: choosing the best of several is not supported.",
                param="best_of",
                remedy="Leave it out.",
            )
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest(
                "prompt: got an empty list.", param="prompt", remedy="Send at least one token."
            )
        if isinstance(self.prompt[0], int):
            return [tuple(self.prompt)]
        return [item if isinstance(item, str) else tuple(item) for item in self.prompt]

    def _max_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    def _num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(RequestBody):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class MessageBody(RequestBody):
    """One message of a chat. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True)], shaped("a string or a list of text parts")
    ]

    def message(self) -> ChatMessage:
        """This message as the backbone's chat template reads it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=text)


class TextFormat(RequestBody):
    """The one response format that there is."""

    type: Literal["text"]


class ChatBody(GenerateBody):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[MessageBody], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[Any, _only(None)] = None
    tool_choice: Annotated[Any, _only(None, "none")] = None

    def _max_tokens(self) -> int | None:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest(
                "max_completion_tokens: got max_tokens as well.",
                param="max_completion_tokens",
                remedy="Send only one of them.",
            )
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    def _num_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs is not None:
            raise InvalidRequest(
                "top_logprobs: got it without logprobs.",
                param="top_logprobs",
                remedy="Send logprobs=true as well.",
            )
        return None


_Revision = Annotated[int | None, Field(ge=0)]


class AliasBody(RequestBody):
    """The body of `PUT /v1/adapters/{name}/aliases/{alias}`.

    `canaries`: the percentage of the alias's requests that each of these other versions gets; none by default.
    `expected_revision`: the alias's revision that the caller has seen, 0 if it saw none; null moves it regardless.
    """

    version: int = Field(ge=1, lt=1_000_000_000)
    canaries: Annotated[
        dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")], int] | None, Field(max_length=8)
    ] = None
    expected_revision: _Revision = None

    def shares(self) -> dict[int, int]:
        """Version -> percent."""
        return {int(version): percent for version, percent in (self.canaries or {}).items()}


class RollbackBody(RequestBody):
    """The body of `POST /v1/adapters/{name}/aliases/{alias}/rollback`; `expected_revision` as in AliasBody."""

    expected_revision: _Revision = None


class FileUploadBody(RequestBody):
    """The body of `POST /v1/uploads`. `mime_type` is taken and not looked at; `sha256` is an extension of ours."""

    bytes: Annotated[int, Field(ge=1, lt=1 << 53)]
    filename: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]
    mime_type: Annotated[str, Field(max_length=255)]
    purpose: Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class CompleteBody(RequestBody):
    """The body of `POST /v1/uploads/{id}/complete`: the parts in order, and what the file must hash to."""

    part_ids: Annotated[
        list[Annotated[str, Field(pattern=r"^part_[0-9a-f]{64}$")]], Field(min_length=1, max_length=10_000)
    ]
    md5: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
