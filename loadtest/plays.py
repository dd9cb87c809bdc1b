"""Plays of arrivals over deltas that are made anew by every load from the store: what each came to.

A delta's number seeds it, so its digest is its number; what the store would send is made in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapters.normal_form import Delta
from loadtest.deltas import ATTENTION, random_lora
from loadtest.inprocess import InProcess, Outcome
from loadtest.report import percentile
from loadtest.workload import Arrival
from serving.model.backbone import Backbone

PREFIX = "delta-"


@dataclass(frozen=True, slots=True)
class Play:
    """What one play came to; seconds are from a request's arrival. `hit_rate`: requests that no load was begun for."""

    requests_per_s: float
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    latency_p50_s: float
    latency_p90_s: float
    latency_max_s: float
    hit_rate: float
    loads: float


def digest_of(index: int) -> str:
    """Digest of delta number `index`."""
    return f"{PREFIX}{index}"


def store_of(
    backbone: Backbone, rank: int, names: frozenset[str] | None = ATTENTION
) -> Callable[[str], Delta]:
    """What gives the LoRA of a digest: `rank` on the linears that write `names`, or on all."""

    def load(digest: str) -> Delta:
        return random_lora(backbone.spec, rank, int(digest.removeprefix(PREFIX)) + 1, names)

    return load


def measured(bench: InProcess, play: Callable[[], list[Outcome]]) -> Play:
    """Run one play and sum it up."""
    before = bench.counter("deltamux_adapter_loads_total")
    outcomes = play()
    loads = bench.counter("deltamux_adapter_loads_total") - before
    took = max(o.arrived + o.latency_s for o in outcomes) - min(o.arrived for o in outcomes)
    waits = [outcome.ttft_s for outcome in outcomes]
    latencies = [outcome.latency_s for outcome in outcomes]
    return Play(
        requests_per_s=len(outcomes) / took,
        tokens_per_s=sum(len(outcome.token_ids) for outcome in outcomes) / took,
        ttft_p50_s=percentile(waits, 50),
        ttft_p99_s=percentile(waits, 99),
        latency_p50_s=percentile(latencies, 50),
        latency_p90_s=percentile(latencies, 90),
        latency_max_s=max(latencies),
        hit_rate=1 - loads / len(outcomes),
        loads=loads,
    )


def capacity(bench: InProcess, work: Sequence[Arrival], in_flight: int) -> float:
    """Requests a second of a closed loop over `work`, after one that is not measured."""
    plays = [measured(bench, lambda: bench.play_closed(work, digest_of, in_flight)) for _ in range(2)]
    return plays[-1].requests_per_s
