"""`RayBackend` over a handle that fails on demand: retries, terminal events, cancellation, error classes."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from adapters.errors import Conflict, DeltamuxError, Unavailable
from serving.core import (
    BASE,
    FailureEvent,
    FinishReason,
    GenerateCall,
    PromptEvent,
    SamplingParams,
    TokenEvent,
)
from serving.deployments.handle import MAX_RETRIES, RayBackend

FIRST = (PromptEvent(prompt_token_ids=(1,)), TokenEvent(token_ids=(2,)))
LAST = (TokenEvent(token_ids=(3,), finish_reason=FinishReason.LENGTH),)
DEATH = ActorDiedError()
REQUEST = contextvars.ContextVar("REQUEST", default="none")


@dataclass
class FakeStream:
    """One streaming call: gives its items, raising those that are exceptions."""

    items: list[Any]
    cancelled: bool = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self.items:
            raise StopAsyncIteration
        item = self.items.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeHandle:
    """A deployment handle; `script` gives each call's stream or answer in turn."""

    script: list[Any]
    calls: list[tuple[dict[str, Any], tuple[Any, ...], str]] = field(default_factory=list)

    def options(self, **options: Any) -> Any:
        handle = self

        class Bound:
            def remote(self, *args: Any) -> Any:
                handle.calls.append((options, args, REQUEST.get()))
                return handle.script.pop(0)

        return Bound()

    def broadcast(self, method: str, *args: Any) -> Any:
        self.calls.append(({"method_name": method}, args, REQUEST.get()))
        answers = self.script.pop(0)

        class Broadcast:
            async def results_async(self, **_: Any) -> list[Any]:
                if isinstance(answers, BaseException):
                    raise answers
                return answers

        return Broadcast()


async def answer(value: Any) -> Any:
    if isinstance(value, BaseException):
        raise value
    return value


def call(digest: str | None = "d" * 64) -> GenerateCall:
    return GenerateCall(request_id="r", prompt="x", sampling=SamplingParams(), adapter_digest=digest)


async def collect(script: list[Any], digest: str | None = "d" * 64) -> tuple[list[Any], FakeHandle]:
    handle = FakeHandle(script)
    batches = [batch async for batch in RayBackend(handle, timeout_s=5.0).generate(call(digest))]
    return batches, handle


async def test_batches_pass_unchanged_and_a_finished_stream_is_not_cancelled() -> None:
    stream = FakeStream([FIRST, LAST])
    batches, handle = await collect([stream])
    assert batches == [FIRST, LAST]
    assert not stream.cancelled
    assert handle.calls[0][0] == {"method_name": "generate", "multiplexed_model_id": "d" * 64, "stream": True}


async def test_a_bare_request_is_routed_by_its_own_id() -> None:
    _, handle = await collect([FakeStream([FIRST, LAST])], digest=BASE)
    assert handle.calls[0][0]["multiplexed_model_id"] == "r"


async def test_a_death_before_the_first_batch_is_retried_under_a_new_id() -> None:
    batches, handle = await collect([FakeStream([DEATH]), FakeStream([FIRST, LAST])])
    assert batches == [FIRST, LAST]
    assert [args[0].request_id for _, args, _ in handle.calls] == ["r", "r.1"]


async def test_retries_end() -> None:
    streams = [FakeStream([DEATH]) for _ in range(1 + MAX_RETRIES)]
    batches, _ = await collect(list(streams))
    ((event,),) = batches
    assert isinstance(event, FailureEvent)
    assert event.error.kind == "Unavailable"
    assert all(stream.cancelled for stream in streams)


async def test_a_death_after_the_first_batch_is_the_last_event() -> None:
    batches, handle = await collect([FakeStream([FIRST, DEATH])])
    assert batches[0] == FIRST
    (event,) = batches[1]
    assert event.finish_reason is FinishReason.ERROR
    assert event.error.kind == "Unavailable"
    assert len(handle.calls) == 1


async def test_a_bug_in_the_replica_is_not_retried_and_not_quoted() -> None:
    bug = RayTaskError("generate", "Traceback: secret prompt", ValueError("secret prompt"))
    batches, handle = await collect([FakeStream([bug])])
    (event,) = batches[0]
    assert event.error.kind == "DeltamuxError"
    assert "secret" not in event.error.message
    assert len(handle.calls) == 1


async def test_no_replica_within_the_deadline() -> None:
    class Never(FakeStream):
        async def __anext__(self) -> Any:
            await asyncio.sleep(60)

    stream = Never([])
    batches = [batch async for batch in RayBackend(FakeHandle([stream]), timeout_s=0.05).generate(call())]
    assert batches[0][0].error.kind == "Unavailable"
    assert stream.cancelled


async def test_closing_cancels_the_call() -> None:
    stream = FakeStream([FIRST, LAST])
    batches = RayBackend(FakeHandle([stream]), timeout_s=5.0).generate(call())
    assert await anext(batches) == FIRST
    await batches.aclose()
    assert stream.cancelled


@pytest.mark.parametrize(
    ("make_answer", "ask"),
    [
        (lambda: answer(1), lambda backend: backend.describe()),
        (lambda: FakeStream([FIRST]), lambda backend: anext(backend.generate(call()))),
        (lambda: [0], lambda backend: backend.release("d" * 64)),
    ],
    ids=["unary", "stream", "broadcast"],
)
async def test_no_call_sees_the_context_of_its_request(
    make_answer: Callable[[], Any], ask: Callable[[RayBackend], Any]
) -> None:
    handle = FakeHandle([make_answer()])
    token = REQUEST.set("one request of a user")
    await ask(RayBackend(handle, timeout_s=5.0))
    REQUEST.reset(token)
    assert handle.calls[0][2] == "none"


async def test_an_error_of_ours_arrives_as_itself() -> None:
    wrapped = RayTaskError("describe", "Traceback", Conflict("in use"))
    with pytest.raises(Conflict, match="in use"):
        await RayBackend(FakeHandle([answer(wrapped)]), timeout_s=5.0).describe()


async def test_admit_returns_what_went_wrong() -> None:
    info = await RayBackend(FakeHandle([answer(DEATH)]), timeout_s=5.0).admit("d" * 64)
    assert info.kind == "Unavailable"


async def test_release_sums_and_needs_every_replica() -> None:
    assert await RayBackend(FakeHandle([[10, 0]]), timeout_s=5.0).release("d" * 64) == 10
    with pytest.raises(Unavailable):
        await RayBackend(FakeHandle([[10, DEATH]]), timeout_s=5.0).release("d" * 64)


async def test_probes_need_one_replica() -> None:
    assert await RayBackend(FakeHandle([[7.0, DEATH, 2.0]]), timeout_s=5.0).heartbeat_age_s() == 2.0
    with pytest.raises(Unavailable):
        await RayBackend(FakeHandle([[DEATH]]), timeout_s=5.0).heartbeat_age_s()
    with pytest.raises(DeltamuxError):
        await RayBackend(FakeHandle([TimeoutError()]), timeout_s=5.0).scrape()
