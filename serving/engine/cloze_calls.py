"""Calls that a cloze head answers: each becomes several requests to the engine, side by side, and one answer again."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import torch
from transformers import PreTrainedTokenizerBase

from adapters.normal_form import Delta
from adapters.tasks import Task
from serving.core import Event, FinishReason, GenerateCall, Pooled, PromptEvent, Request, TokenEvent
from serving.engine.cloze import ClozePlan, ClozeRow
from serving.engine.deltas import load_error
from serving.memory.host_cache import HostCache
from serving.model.heads import PlacedStage, place_head_of

MAX_PLANS = 256
"""Deltas of which it is remembered whether they have a cloze, with that tokenised."""

Run = Callable[[Request], AsyncGenerator[tuple[Event, ...], None]]


def _no_stage() -> PlacedStage:
    raise AssertionError("validation refuses a dense layer of the backbone before a cloze")


class ClozeCalls:
    """The cloze heads of one backbone. `run` gives the events of one request. Use from one event loop."""

    def __init__(self, host: HostCache, tokenizer: PreTrainedTokenizerBase | None, run: Run) -> None:
        self._host, self._tokenizer, self._run = host, tokenizer, run
        self._plans: OrderedDict[str, ClozePlan | None] = OrderedDict()

    def plan(self, delta: Delta) -> ClozePlan | None:
        """The cloze of `delta`, if it has one. Raises InvalidDelta for what the tokenizer can't take."""
        if delta.head is None or delta.head.cloze is None:
            return None
        # copies: the delta's own tensors are views of all its bytes
        head = place_head_of(
            delta, lambda tensor, dtype=torch.float32: tensor.to(dtype, copy=True), _no_stage
        )
        assert head is not None
        return ClozePlan(head, self._tokenizer)

    async def plan_of(self, call: GenerateCall) -> ClozePlan | None:
        """The cloze that answers `call`; None where none does. Raises InvalidDelta, and what loading raises."""
        digest = call.adapter_digest
        if digest is None or call.pooling is None or call.pooling.task is not Task.SEQUENCE_CLASSIFICATION:
            return None
        if digest not in self._plans:
            try:
                # shielded: others wait for the same load, which must not end with this call
                delta = await asyncio.shield(asyncio.wrap_future(self._host.request(digest)))
            except Exception as error:
                raise load_error(error, digest) from error
            self._plans[digest] = await asyncio.to_thread(self.plan, delta)
            while len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(digest)
        return self._plans[digest]

    def forget(self, digest: str) -> None:
        """Let go of what is known of a delta."""
        self._plans.pop(digest, None)

    async def answer(
        self,
        call: GenerateCall,
        plan: ClozePlan,
        room: int,
        request_of: Callable[[int, ClozeRow], Request],
    ) -> tuple[Event, ...]:
        """All events of `call`, or those of the first of its rows that ended without an answer. Raises InvalidRequest.

        `room`: tokens that fit the backbone. Its prompt is the tokens of all rows, since all of them run.
        """
        assert call.pooling is not None
        rows = await asyncio.to_thread(plan.rows, call.prompt, call.pooling, room)
        tasks = [asyncio.create_task(self._pooled(request_of(*row))) for row in enumerate(rows)]
        try:
            found = await asyncio.gather(*tasks)
        except _NotAnsweredError as failed:
            return failed.events
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        ids = tuple(token for row in rows for token in row.tokens.ids)
        end = TokenEvent(pooled=plan.answer(found), finish_reason=FinishReason.STOP)
        return PromptEvent(prompt_token_ids=ids), end

    async def _pooled(self, request: Request) -> Pooled:
        """The answer to one request. Raises _NotAnsweredError where it ends without one."""
        events: list[Event] = []
        async with aclosing(self._run(request)) as batches:
            async for batch in batches:
                events += batch
        end = events[-1]
        if isinstance(end, TokenEvent) and end.pooled is not None:
            return end.pooled
        raise _NotAnsweredError(tuple(events))


class _NotAnsweredError(Exception):
    """A row ended without an answer. `events`: all that came of it."""

    def __init__(self, events: tuple[Event, ...]) -> None:
        super().__init__()
        self.events = events
