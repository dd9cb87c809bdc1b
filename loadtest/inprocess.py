"""The engine in this process, without its thread, Ray or HTTP: what the in-process benchmarks drive and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self

from prometheus_client import CollectorRegistry

from adapters.normal_form import Delta
from adapters.tasks import Task
from loadtest.workload import Arrival
from serving.config import Engine as EngineSettings
from serving.core import Event, Pooled, PoolingParams, Request, SamplingParams, TokenEvent
from serving.engine.engine import Engine
from serving.metrics import EngineMetrics
from serving.model.backbone import Backbone

NO_DELTAS: Mapping[str, Delta] = {}
"""For engines whose rows are all bare."""

PAUSE_S = 0.0005
"""How long to wait where nothing can run: a delta is being loaded or nothing has arrived."""


KV_TOKENS = 256
"""Room for keys and values of so many tokens a row beside the deltas', which share one budget with them."""


def slot_bytes(backbone: Backbone) -> int:
    """Bytes of `KV_TOKENS` tokens' keys and values."""
    spec = backbone.spec
    return KV_TOKENS * spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * backbone.dtype.itemsize


@dataclass(slots=True)
class Outcome:
    """One request: seconds from its arrival to its first token and to its end, and its tokens."""

    arrived: float
    ttft_s: float = float("nan")
    latency_s: float = float("nan")
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    error: str | None = None
    pooled: Pooled | None = None

    @property
    def ended(self) -> bool:
        return self.latency_s == self.latency_s


class InProcess:
    """An engine and the requests that run in it. `load` gives the delta of a digest, as a store would.

    `delta_bytes` bounds the deltas that stay on the device without a request, which the engine's one budget does not:
    there they may take what keys and values leave free at the moment.
    """

    def __init__(
        self,
        backbone: Backbone,
        load: Callable[[str], Delta],
        *,
        delta_bytes: int | None = None,
        **settings: Any,
    ) -> None:
        self.registry = CollectorRegistry()
        self._events: list[tuple[str, Event]] = []
        self._ids = count()
        self.requests: dict[str, Outcome] = {}
        chosen = {"max_queue": 100_000, "prefix_cache": "off", **settings}  # rounds repeat their prompts
        if delta_bytes is not None:
            chosen["memory_bytes"] = delta_bytes + slot_bytes(backbone) * int(settings["max_num_seqs"])
        self._delta_bytes = delta_bytes
        self.settings = EngineSettings(**chosen)
        self.engine = Engine(
            backbone,
            load,
            self._events.extend,
            metrics=EngineMetrics(self.registry),
            settings=self.settings,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.deltas.host.close()

    def counter(self, name: str) -> float:
        """A counter of the engine's metrics."""
        return self.registry.get_sample_value(name) or 0.0

    def submit(
        self,
        prompt: Sequence[int],
        digest: str | None,
        output_tokens: int,
        *,
        logprobs: int | None = None,
        arrived: float | None = None,
        tenant: str = "default",
    ) -> str:
        """Queue one greedy request that ends after `output_tokens`; returns its id."""
        request_id = str(next(self._ids))
        self.requests[request_id] = Outcome(time.perf_counter() if arrived is None else arrived)
        sampling = SamplingParams(
            max_tokens=output_tokens, temperature=0.0, ignore_eos=True, logprobs=logprobs
        )
        self.engine.submit(
            Request(
                request_id=request_id,
                prompt_token_ids=tuple(prompt),
                sampling=sampling,
                adapter_digest=digest,
                tenant=tenant,
            )
        )
        return request_id

    def step(self) -> bool:
        """One step of the engine and its events; False when there was nothing to run."""
        ran = self.engine.step()
        residency = self.engine.deltas.residency
        while (
            self._delta_bytes is not None
            and residency.used_bytes > self._delta_bytes
            and residency.idle_bytes
        ):
            residency.drop()
        now = time.perf_counter()
        for request_id, event in self._events:
            if isinstance(event, TokenEvent):
                outcome = self.requests[request_id]
                if event.token_ids and not outcome.token_ids:
                    outcome.ttft_s = now - outcome.arrived
                outcome.token_ids += event.token_ids
                outcome.logprobs += event.logprobs
                outcome.pooled = event.pooled
                if event.finish_reason is not None:
                    outcome.latency_s = now - outcome.arrived
                    outcome.error = event.error.message if event.error else None
        self._events.clear()
        return ran

    def finish(self, ids: Sequence[str]) -> list[Outcome]:
        """Run until these requests have ended; they are forgotten here. Raises RuntimeError where one failed."""
        while not all(self.requests[i].ended for i in ids):
            if not self.step():
                time.sleep(PAUSE_S)
        return self._take(ids)

    def _take(self, ids: Sequence[str]) -> list[Outcome]:
        outcomes = [self.requests.pop(i) for i in ids]
        for outcome in outcomes:
            if outcome.error is not None:
                raise RuntimeError(f"A request failed: {outcome.error}")
        return outcomes

    def generate(
        self, prompts: Sequence[Sequence[int]], digests: Sequence[str | None], output_tokens: int
    ) -> list[Outcome]:
        """All requests at once, to their ends."""
        ids = [self.submit(p, d, output_tokens) for p, d in zip(prompts, digests, strict=True)]
        outcomes = self.finish(ids)
        assert all(len(o.token_ids) == output_tokens for o in outcomes)
        return outcomes

    def answer(
        self, prompts: Sequence[Sequence[int]], tasks: Sequence[Task], digests: Sequence[str | None]
    ) -> list[Pooled]:
        """What the deltas' heads make of the prompts, all asked at once."""
        ids = []
        for prompt, task, digest in zip(prompts, tasks, digests, strict=True):
            ids.append(str(next(self._ids)))
            self.requests[ids[-1]] = Outcome(time.perf_counter())
            self.engine.submit(
                Request(
                    request_id=ids[-1],
                    prompt_token_ids=tuple(prompt),
                    adapter_digest=digest,
                    pooling=PoolingParams(task=task),
                )
            )
        answers = [outcome.pooled for outcome in self.finish(ids)]
        return [answer for answer in answers if answer is not None]

    def decode_step_s(
        self, prompts: Sequence[Sequence[int]], digests: Sequence[str | None], steps: int
    ) -> float:
        """Mean seconds of a step in which every row decodes, over `steps` steps; the prompts are not timed."""
        spare = sum(map(len, prompts)) // self.settings.max_num_batched_tokens + len(prompts) + 8
        ids = [self.submit(p, d, steps + spare) for p, d in zip(prompts, digests, strict=True)]
        while not all(self.requests[i].token_ids for i in ids):
            if not self.step():
                time.sleep(PAUSE_S)
        before = sum(len(self.requests[i].token_ids) for i in ids)
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        took = time.perf_counter() - started
        made = sum(len(self.requests[i].token_ids) for i in ids) - before
        assert made == steps * len(ids), (made, steps, len(ids))
        for request_id in ids:
            self.engine.cancel(request_id)
        self.finish(ids)
        return took / steps

    def play(self, arrivals: Sequence[Arrival], digest_of: Callable[[int], str]) -> list[Outcome]:
        """Requests at their own times (open loop), to their ends."""
        started = time.perf_counter()
        ids: list[str] = []
        for arrival in arrivals:
            while time.perf_counter() - started < arrival.at_s:
                if not self.step():
                    time.sleep(PAUSE_S)
            ids.append(self._submit_arrival(arrival, digest_of, started + arrival.at_s))
        return self.finish(ids)

    def play_closed(
        self, arrivals: Sequence[Arrival], digest_of: Callable[[int], str], in_flight: int
    ) -> list[Outcome]:
        """Requests in their order, `in_flight` at a time, whatever their times (closed loop)."""
        ids: list[str] = []
        open_ids: set[str] = set()
        for arrival in arrivals:
            while len(open_ids) >= in_flight:
                if not self.step():
                    time.sleep(PAUSE_S)
                open_ids = {i for i in open_ids if not self.requests[i].ended}
            ids.append(self._submit_arrival(arrival, digest_of, None))
            open_ids.add(ids[-1])
        return self.finish(ids)

    def _submit_arrival(
        self, arrival: Arrival, digest_of: Callable[[int], str], arrived: float | None
    ) -> str:
        digest = None if arrival.delta is None else digest_of(arrival.delta)
        return self.submit(arrival.prompt, digest, arrival.output_tokens, arrived=arrived)
