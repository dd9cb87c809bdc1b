"""Asking a task head for its answers: one call per input, side by side, as one request."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from fastapi import Request

from adapters.errors import InvalidRequest
from serving.core import GenerateCall, Pooled, PoolingParams, TokenEvent
from serving.http.edge import set_adapter_digest
from serving.http.fanout import Patience, run
from serving.http.generate import Job
from serving.http.generation import planned_usage
from serving.http.models import resolve, unit_of
from serving.http.pooling_schemas import PoolingBody
from serving.http.services import Services
from serving.http.sse import unless_disconnected
from serving.tenancy.principal import Principal


@dataclass(frozen=True, slots=True)
class Asked:
    """One input, and the second text that it is joined with, if any."""

    prompt: str | tuple[int, ...]
    pair: str | None = None

    @property
    def longest(self) -> str | tuple[int, ...]:
        """What bounds its tokens."""
        return self.prompt + self.pair if isinstance(self.prompt, str) and self.pair else self.prompt


class Heads:
    """The heads of the gateway's deltas. Use from one event loop."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def answer(
        self,
        request: Request,
        caller: Principal,
        body: PoolingBody,
        asked_for: PoolingParams,
        inputs: Sequence[Asked],
        id_prefix: str,
    ) -> tuple[Job, list[Pooled]]:
        """What a head makes of each input. Raises InvalidRequest where the delta's task is another."""
        limits = self._services.settings.limits
        if len(inputs) > limits.max_choices:
            raise InvalidRequest(
                f"input: got {len(inputs)} inputs, expected at most {limits.max_choices}.",
                param="input",
                remedy="Split the request.",
            )
        info = await self._services.backbone()
        unit = unit_of(caller, user=body.user, request_id=request.state.request_id)
        target = await resolve(self._services, caller, body.model, unit=unit)
        set_adapter_digest(request, target.digest)
        job_id = f"{id_prefix}-{uuid.uuid4().hex}"
        calls = [
            GenerateCall(
                request_id=f"{job_id}-{place}",
                prompt=asked.prompt,
                adapter_digest=target.digest,
                adapter_name=target.name,
                tenant=caller.tenant,
                weight=caller.limits.weight,
                service_class=caller.limits.service_class,
                pooling=replace(
                    asked_for, text_pair=asked.pair, truncate_prompt_tokens=body.truncate_prompt_tokens
                ),
            )
            for place, asked in enumerate(inputs)
        ]
        job = Job(
            id=job_id,
            model=body.model,
            calls=tuple(calls),
            usage=planned_usage([asked.longest for asked in inputs], 1, 1, 0, info),
            include_usage=False,
            patience=Patience(limits.request_timeout_s, limits.first_token_timeout_s),
        )
        return job, await unless_disconnected(request.receive, self._collected(request, caller, job))

    async def _collected(self, request: Request, caller: Principal, job: Job) -> list[Pooled]:
        digest = job.calls[0].adapter_digest
        found: dict[int, Pooled] = {}
        async with self._services.admission.admitted(
            request, caller, job.id, adapter_digest=digest, usage=job.usage
        ) as in_ledger:
            events = run(self._services.backend, job.calls, self._services.metrics, job.patience)
            async with aclosing(events) as batches:
                async for index, batch in batches:
                    for event in batch:
                        job.usage.add(index, event)
                        if isinstance(event, TokenEvent) and event.pooled is not None:
                            found[index] = event.pooled
            await in_ledger()
        return [found[index] for index in range(len(job.calls))]
