"""The gateway's `Backend`: a backbone behind a Ray Serve handle."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from adapters.errors import DeltamuxError, ErrorInfo, Unavailable
from serving.core import (
    AdmissionProof,
    BackboneInfo,
    Event,
    FailureEvent,
    FinishReason,
    GenerateCall,
    MetricFamily,
    TokenEvent,
)

log = logging.getLogger(__name__)

MAX_RETRIES = 2
"""Further attempts of a call whose replica died before it sent anything."""

RETRY_DELAY_S = 0.1
"""Pause before another attempt: Serve learns of a replica's death within some 10 to 40 ms."""

PROBE_TIMEOUT_S = 5.0
"""How long `/metrics` and `/health/ready` wait for replicas."""

_LOST = (RayError, RayServeException, TimeoutError)
"""What a handle raises where no replica answers."""


class RayBackend:
    """`Backend` over a handle to `BackboneReplica`s. Use from one event loop.

    `timeout_s`: the longest wait for a call's first batch, or for its one answer. Serve itself would wait forever
    while there is no replica.
    """

    def __init__(self, handle: DeploymentHandle, *, timeout_s: float) -> None:
        self._handle = handle
        self._timeout_s = timeout_s

    async def describe(self) -> BackboneInfo:
        """See `Backend`. Raises Unavailable."""
        info: BackboneInfo = await self._ask("describe")
        return info

    async def generate(self, call: GenerateCall) -> AsyncGenerator[tuple[Event, ...], None]:
        """See `Backend`. A replica's death ends the call in an Unavailable, after retries if nothing was sent."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        for attempt in range(1 + MAX_RETRIES):
            # a replica that is only unreachable may still run the last attempt under its id
            tried = replace(call, request_id=f"{call.request_id}.{attempt}") if attempt else call
            stream = self._call("generate", tried, key=call.adapter_digest or call.request_id, stream=True)
            started = ended = False
            try:
                while True:
                    async with asyncio.timeout_at(None if started else deadline):
                        batch: tuple[Event, ...] | None = await anext(stream, None)
                    if batch is None:
                        return
                    started, ended = True, _is_last(batch[-1])
                    yield batch
            except _LOST as error:
                failure = _ours(error)
                if not started and isinstance(error, RayActorError) and attempt < MAX_RETRIES:
                    await asyncio.sleep(RETRY_DELAY_S)
                    continue
            finally:
                if not ended:
                    stream.cancel()
            if started:
                yield (TokenEvent(finish_reason=FinishReason.ERROR, error=failure.info()),)
            else:
                yield (FailureEvent(error=failure.info()),)
            return

    async def admit(self, digest: str) -> AdmissionProof | ErrorInfo:
        """See `Backend`. The delta is placed on its home, where its first requests will go."""
        try:
            answer: AdmissionProof | ErrorInfo = await self._ask("admit", digest, key=digest)
        except DeltamuxError as error:
            return error.info()
        return answer

    async def activations(self, digest: str) -> bytes | ErrorInfo:
        """See `Backend`. Asked of the delta's home, as its requests are."""
        try:
            answer: bytes | ErrorInfo = await self._ask("activations", digest, key=digest)
        except DeltamuxError as error:
            return error.info()
        return answer

    async def release(self, digest: str) -> int:
        """See `Backend`. All replicas together. Raises Unavailable where one of them did not answer."""
        freed = 0
        for answer in await self._ask_all("release", digest, timeout_s=self._timeout_s):
            if isinstance(answer, BaseException):
                raise _ours(answer) from answer
            freed += answer
        return freed

    async def scrape(self) -> list[tuple[Mapping[str, str], tuple[MetricFamily, ...]]]:
        """See `Backend`. A replica that does not answer is left out. Raises Unavailable where none does."""
        pages = await self._heard("scrape")
        return [source for page in pages for source in page]

    async def heartbeat_age_s(self) -> float:
        """See `Backend`. The youngest heartbeat: one replica is enough to serve."""
        ages: list[float] = await self._heard("heartbeat_age_s")
        return min(ages)

    async def _ask(self, method: str, *args: object, key: str = "") -> Any:
        """One replica's answer. Raises what it raised, if that is ours, and otherwise Unavailable."""
        response = self._call(method, *args, key=key)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await response
        except _LOST as error:
            raise _ours(error) from error

    async def _heard(self, method: str) -> list[Any]:
        """The answers of those replicas that gave one. Raises Unavailable where none did."""
        answers = await self._ask_all(method, timeout_s=PROBE_TIMEOUT_S)
        heard = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not heard:
            raise _unavailable()
        return heard

    async def _ask_all(self, method: str, *args: object, timeout_s: float) -> list[Any]:
        """Every replica's answer or exception. Raises Unavailable where there is no replica."""
        response = contextvars.Context().run(self._handle.broadcast, method, *args)
        try:
            answers: list[Any] = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        except _LOST as error:
            raise _ours(error) from error
        return answers

    def _call(self, method: str, *args: object, key: str, stream: bool = False) -> Any:
        """Send one call.

        In an empty context: Serve gives handle calls that share a request's context one internal id, and its
        routers, FIFO apart, then leave all but one of them waiting forever.
        """
        handle = self._handle.options(method_name=method, multiplexed_model_id=key, stream=stream)
        return contextvars.Context().run(handle.remote, *args)


def _is_last(event: Event) -> bool:
    return isinstance(event, FailureEvent) or (
        isinstance(event, TokenEvent) and event.finish_reason is not None
    )


def _unavailable() -> Unavailable:
    return Unavailable("No replica of the backbone answers.", remedy="Try again in a few seconds.")


def _ours(error: BaseException) -> DeltamuxError:
    """What the caller gets for an exception of a handle. Its own text stays in the log."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DeltamuxError):
        return cause
    if isinstance(error, RayTaskError):  # the replica lives; it has a bug
        # not its text: messages of libraries can quote the caller's input
        log.error("a call to the backbone failed: %s", type(cause).__qualname__)
        return DeltamuxError("The backbone failed on this request.", remedy="Try again.")
    log.warning("a call to the backbone failed: %s: %s", type(error).__name__, error)
    return _unavailable()
