"""The calls of one request, running side by side on a backend."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from adapters.errors import DeltamuxError, Overloaded, Unavailable, from_info
from serving.core import Backend, Event, FailureEvent, FinishReason, GenerateCall, PromptEvent, TokenEvent
from serving.http.errors import INTERNAL_MESSAGE
from serving.metrics import GatewayMetrics

Checked = PromptEvent | TokenEvent
"""An event that is not a failure."""

_Item = tuple[int, tuple[Event, ...] | Exception | None]

_QUEUED_BATCHES_PER_CALL = 4
"""A caller that reads slowly holds its own calls back; its tokens do not pile up here."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request may take: in all, and (None: as long) until every call of it has begun."""

    total_s: float
    wait_s: float | None = None


async def run(
    backend: Backend, calls: Sequence[GenerateCall], metrics: GatewayMetrics, patience: Patience
) -> AsyncGenerator[tuple[int, tuple[Checked, ...]], None]:
    """(index of the call, its events) as they come, until every call has ended with a true finish reason.

    The first failure of any call is raised. Closing the generator cancels the calls that still run.
    """
    started = asyncio.get_running_loop().time()
    deadline = started + patience.total_s
    wait_deadline = deadline if patience.wait_s is None else started + patience.wait_s
    queue: asyncio.Queue[_Item] = asyncio.Queue(_QUEUED_BATCHES_PER_CALL * len(calls))
    # An empty context each: concurrent Ray handle calls that share a request's context leave one another unrouted.
    tasks = [
        asyncio.create_task(
            _pump(backend, index, replace(call, max_wait_s=patience.wait_s), queue),
            context=contextvars.Context(),
        )
        for index, call in enumerate(calls)
    ]
    clocks = [_TokenClock(metrics) for _ in calls]
    unfinished = set(range(len(calls)))
    not_begun = set(unfinished)
    try:
        while unfinished:
            try:
                async with asyncio.timeout_at(min(deadline, wait_deadline) if not_begun else deadline):
                    index, item = await queue.get()
            except TimeoutError:
                if not_begun and wait_deadline < deadline:
                    raise Overloaded(
                        f"The request waited longer than {patience.wait_s:g} s for its turn.",
                        remedy="Try again later.",
                    ) from None
                raise Unavailable(
                    f"The request ran longer than {patience.total_s:g} s.",
                    remedy="Ask for fewer tokens or choices.",
                ) from None
            if isinstance(item, Exception):
                raise item
            if index not in unfinished:
                continue
            not_begun.discard(index)
            if item is None:
                raise RuntimeError("the backend ended a call without a finish reason")
            batch = tuple(_checked(event) for event in item)
            outputs = [event for event in batch if isinstance(event, TokenEvent)]
            clocks[index].tick(sum(len(event.token_ids) for event in outputs))
            if outputs and outputs[-1].finish_reason is not None:
                unfinished.discard(index)
            yield index, batch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(backend: Backend, index: int, call: GenerateCall, queue: asyncio.Queue[_Item]) -> None:
    """Move one call's batches to the queue, then None, or the exception that ended it."""
    try:
        # every backend is an async generator: the protocol names only what iterating needs
        events = backend.generate(call)
        async with aclosing(events) as batches:
            async for batch in batches:
                await queue.put((index, batch))
    except Exception as error:
        await queue.put((index, error))
    else:
        await queue.put((index, None))


def _checked(event: Event) -> Checked:
    """`event` unless it says that the call failed or was cut short, which is never passed off as an answer."""
    if isinstance(event, FailureEvent):
        raise from_info(event.error)
    if isinstance(event, TokenEvent):
        if event.finish_reason is FinishReason.ERROR:
            raise from_info(event.error) if event.error else DeltamuxError(INTERNAL_MESSAGE)
        if event.finish_reason is FinishReason.CANCELLED:
            raise Unavailable(
                "The server ended this request before it was complete.", remedy="Send it again."
            )
    return event


class _TokenClock:
    """Times of one call's tokens."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._last = time.perf_counter()
        self._begun = False

    def tick(self, num_tokens: int) -> None:
        """Note that `num_tokens` came now."""
        if not num_tokens:
            return
        now = time.perf_counter()
        waited, self._last = now - self._last, now
        if not self._begun:
            self._begun = True
            self._metrics.time_to_first_token_seconds.observe(waited)
            return
        for _ in range(num_tokens):
            self._metrics.inter_token_seconds.observe(waited / num_tokens)
