"""Running the calls of one request together, and writing what they give as one reply or one stream."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from serving.core import Backend, GenerateCall, PromptEvent, TokenEvent
from serving.http import sse
from serving.http.counting import Usage
from serving.http.errors import JsonObject
from serving.http.fanout import Checked, Patience, run
from serving.metrics import GatewayMetrics


class Style(Protocol):
    """How one endpoint writes choices. An instance belongs to one request: it can count what it has written."""

    object_name: str
    chunk_object_name: str

    def whole(self, index: int, prompt: PromptEvent, output: TokenEvent) -> JsonObject:
        """A choice of a reply."""
        ...

    def opening(self, index: int, prompt: PromptEvent) -> JsonObject | None:
        """The choice that begins a stream's chunks, where there is something to say before the first token."""
        ...

    def parts(self, index: int, output: TokenEvent) -> Sequence[JsonObject]:
        """The choices, one a chunk, that new tokens become."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One HTTP request as calls. Calls i * num_calls .. are those of prompt i; a call's place is its `index`.

    `usage` counts while the job runs.
    """

    id: str
    model: str
    calls: tuple[GenerateCall, ...]
    usage: Usage
    include_usage: bool
    patience: Patience
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, object_name: str) -> JsonObject:
        """What a reply and every chunk begin with."""
        return {"id": self.id, "object": object_name, "created": self.created, "model": self.model}


async def reply(backend: Backend, job: Job, style: Style, metrics: GatewayMetrics) -> JsonObject:
    """Every choice in one object."""
    usage = job.usage
    prompts: dict[int, PromptEvent] = {}
    outputs: defaultdict[int, list[TokenEvent]] = defaultdict(list)
    async with aclosing(run(backend, job.calls, metrics, job.patience)) as batches:
        async for index, batch in batches:
            for event in batch:
                usage.add(index, event)
                if isinstance(event, PromptEvent):
                    prompts[index] = event
                else:
                    outputs[index].append(event)
    answers = [
        (prompts[index], answer)
        for index in range(len(job.calls))
        for answer in outputs[index][-1].hypotheses or (_merged(outputs[index]),)
    ]
    choices = [style.whole(place, *answer) for place, answer in enumerate(answers)]
    return {**job.head(style.object_name), "choices": choices, "usage": usage.body()}


async def stream(
    backend: Backend, job: Job, style: Style, metrics: GatewayMetrics
) -> AsyncGenerator[bytes, None]:
    """Server-sent events. The first comes when every call has begun, so that a refusal can still be a status."""
    usage = job.usage
    head = job.head(style.chunk_object_name)
    if job.include_usage:
        head["usage"] = None  # present in every chunk, as OpenAI has it
    not_begun = set(range(len(job.calls)))
    held: list[bytes] = []
    async with aclosing(run(backend, job.calls, metrics, job.patience)) as batches:
        async for index, batch in batches:
            not_begun.discard(index)
            held += [sse.event({**head, "choices": [choice]}) for choice in _chunks(style, index, batch)]
            for event in batch:
                usage.add(index, event)
            if held and not not_begun:
                yield b"".join(held)
                held.clear()
    if job.include_usage:
        yield sse.event({**head, "choices": [], "usage": usage.body()})
    yield sse.DONE


def _chunks(style: Style, index: int, batch: Sequence[Checked]) -> list[JsonObject]:
    """The choices that one batch becomes: tokens that came together are written together."""
    prompts = [event for event in batch if isinstance(event, PromptEvent)]
    outputs = [event for event in batch if isinstance(event, TokenEvent)]
    openings = [style.opening(index, prompt) for prompt in prompts]
    found = [opening for opening in openings if opening is not None]
    if outputs:
        found += style.parts(index, _merged(outputs))
    return found


def _merged(outputs: Sequence[TokenEvent]) -> TokenEvent:
    if len(outputs) == 1:
        return outputs[0]
    return TokenEvent(
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(token for output in outputs for token in output.logprobs),
        finish_reason=outputs[-1].finish_reason,
    )
