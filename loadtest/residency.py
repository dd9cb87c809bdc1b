"""Many deltas over little device memory.

  zipf        2,000 registered deltas drawn by Zipf 1.0, device room for 64, against the same requests on one delta
              (6 minutes on two cores)
  starvation  6 deltas, room for 3, Poisson arrivals: 90th percentile over median of the end-to-end latency (3 minutes)
  slora       S-LoRA's workload: delta floor(n * Power(alpha)), gaps Gamma(1 / cv^2, cv^2 / rate), uniform lengths,
              n = 1,000, against the same arrivals on one delta (20 minutes at --rounds 3)

Deltas are rank-4 LoRAs on q, k, v, o, made anew by every load from the store: their number seeds them. The open-loop
parts arrive at --load times the rate that the engine reached in a closed loop just before.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from adapters.normal_form import Delta
from loadtest.backbones import SIZES, random_backbone
from loadtest.deltas import placed_bytes, random_lora
from loadtest.inprocess import InProcess, Outcome
from loadtest.report import Record, Spread, alternate, make_parser, percentile, publish
from loadtest.workload import (
    Arrival,
    arrivals,
    gamma_times,
    power_choices,
    uniform_lengths,
    zipf_choices,
)
from serving.model.backbone import Backbone

RANK = 4
ROWS = 32
PREFIX = "delta-"


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a workload came to."""

    tokens_per_s: float
    ttft_p99_s: float
    latency_p50_s: float
    latency_p90_s: float
    hit_rate: float
    loads: float


def main(argv: Sequence[str]) -> None:
    """Measure one part."""
    parser = make_parser("residency", __doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--registered", type=int, help="deltas (default: zipf 2000, starvation 6, slora 1000)"
    )
    parser.add_argument("--room", type=int, help="deltas that fit the device (default: 64, starvation 3)")
    parser.add_argument("--requests", type=int, default=200, help="requests per run")
    parser.add_argument("--output-tokens", type=int, default=32, help="most tokens of one request")
    parser.add_argument("--in-flight", type=int, default=48, help=f"closed loop; {ROWS} run, the others wait")
    parser.add_argument("--load", type=float, default=0.8, help="open loop: share of the closed loop's rate")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.3, 0.6, 1.0])
    parser.add_argument("--cvs", type=float, nargs="+", default=[1.0, 4.0])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    registered, room, measure = PARTS[args.part]
    args.registered = args.registered or registered
    args.room = args.room or room
    backbone = random_backbone(args.size, args.dtype)
    capacity = args.room * placed_bytes(_load(backbone, f"{PREFIX}0"), backbone)
    with InProcess(
        backbone, lambda digest: _load(backbone, digest), max_num_seqs=ROWS, delta_bytes=capacity
    ) as bench:
        records = measure(bench, args)
    title = (
        f"residency, {args.part}: {args.registered} deltas, room for {args.room}, {args.size} {args.dtype},"
        f" {args.threads} threads, median (min-max) of {args.rounds}"
    )
    publish(title, shlex.join(["residency", *argv]), records, args.json)


def _load(backbone: Backbone, digest: str) -> Delta:
    return random_lora(backbone.spec, RANK, int(digest.removeprefix(PREFIX)) + 1)


def _digest(index: int) -> str:
    return f"{PREFIX}{index}"


def _measured(bench: InProcess, play: Callable[[], list[Outcome]]) -> Run:
    before = bench.counter("deltamux_adapter_loads_total")
    outcomes = play()
    loads = bench.counter("deltamux_adapter_loads_total") - before
    begun = min(outcome.arrived for outcome in outcomes)
    ended = max(outcome.arrived + outcome.latency_s for outcome in outcomes)
    latencies = [outcome.latency_s for outcome in outcomes]
    return Run(
        tokens_per_s=sum(len(outcome.token_ids) for outcome in outcomes) / (ended - begun),
        ttft_p99_s=percentile([outcome.ttft_s for outcome in outcomes], 99),
        latency_p50_s=percentile(latencies, 50),
        latency_p90_s=percentile(latencies, 90),
        hit_rate=1 - loads / len(outcomes),
        loads=loads,
    )


def _zipf(bench: InProcess, args: argparse.Namespace) -> list[Record]:
    lengths = uniform_lengths(args.requests, 16, 128)
    outputs = [args.output_tokens] * args.requests
    turns = count()

    def play(many: bool) -> Run:
        chosen = zipf_choices(args.requests, args.registered, 1.0, seed=next(turns))
        work = arrivals([0.0] * args.requests, chosen if many else [0] * args.requests, lengths, outputs)
        return _measured(bench, lambda: bench.play_closed(work, _digest, args.in_flight))

    found = alternate({"many": lambda: play(True), "one": lambda: play(False)}, args.rounds)
    values = _compared(found)
    values["hit rate"] = Spread.of([run.hit_rate for run in found["many"]])
    values["loads"] = Spread.of([run.loads for run in found["many"]])
    values["latency p90/p50"] = Spread.of([run.latency_p90_s / run.latency_p50_s for run in found["many"]])
    met = values["throughput ratio"].median >= 0.85
    facts = {"budget": "throughput ratio >= 0.85", "verdict": "met" if met else "missed"}
    return [Record("zipf 1.0 against one delta", values, facts)]


def _compared(found: Mapping[str, Sequence[Run]]) -> dict[str, Spread]:
    speeds = {case: [run.tokens_per_s for run in runs] for case, runs in found.items()}
    waits = {case: [run.ttft_p99_s for run in runs] for case, runs in found.items()}
    return {
        "many tok/s": Spread.of(speeds["many"]),
        "one tok/s": Spread.of(speeds["one"]),
        "throughput ratio": Spread.ratio(speeds["many"], speeds["one"]),
        "many TTFT p99 s": Spread.of(waits["many"]),
        "one TTFT p99 s": Spread.of(waits["one"]),
        "TTFT p99 ratio": Spread.ratio(waits["many"], waits["one"]),
    }


def _rate(bench: InProcess, args: argparse.Namespace, outputs: Sequence[int]) -> float:
    """Requests a second of the open loop."""
    lengths = uniform_lengths(args.requests, 8, 128)
    work = arrivals([0.0] * args.requests, [0] * args.requests, lengths, outputs)
    run = _measured(bench, lambda: bench.play_closed(work, _digest, args.in_flight))
    return float(args.load) * run.tokens_per_s / (sum(outputs) / len(outputs))


def _starvation(bench: InProcess, args: argparse.Namespace) -> list[Record]:
    outputs = [args.output_tokens] * args.requests
    rate = _rate(bench, args, outputs)
    turns = count()

    def play() -> Run:
        seed = next(turns)
        chosen = power_choices(args.requests, args.registered, 1.0, seed=seed)
        lengths = uniform_lengths(args.requests, 16, 128, seed=seed)
        work = arrivals(gamma_times(args.requests, rate, 1.0, seed=seed), chosen, lengths, outputs)
        return _measured(bench, lambda: bench.play(work, _digest))

    runs = alternate({"runs": play}, args.rounds)["runs"]
    values = {
        "latency p50 s": Spread.of([run.latency_p50_s for run in runs]),
        "latency p90 s": Spread.of([run.latency_p90_s for run in runs]),
        "p90/p50": Spread.of([run.latency_p90_s / run.latency_p50_s for run in runs]),
        "TTFT p99 s": Spread.of([run.ttft_p99_s for run in runs]),
        "loads": Spread.of([run.loads for run in runs]),
    }
    met = values["p90/p50"].median <= 2
    facts = {"requests/s": rate, "budget": "p90/p50 <= 2", "verdict": "met" if met else "missed"}
    return [Record("Poisson arrivals over all deltas alike", values, facts)]


def _slora(bench: InProcess, args: argparse.Namespace) -> list[Record]:
    shortest = min(8, args.output_tokens)
    outputs = uniform_lengths(args.requests, shortest, args.output_tokens, seed=5)
    rate = _rate(bench, args, outputs)
    return [_slora_point(bench, args, alpha, cv, rate, outputs) for alpha in args.alphas for cv in args.cvs]


def _slora_point(
    bench: InProcess, args: argparse.Namespace, alpha: float, cv: float, rate: float, outputs: Sequence[int]
) -> Record:
    turns = count()

    def work(deltas: Sequence[int], seed: int) -> list[Arrival]:
        lengths = uniform_lengths(args.requests, 8, 128, seed=seed)
        return arrivals(gamma_times(args.requests, rate, cv, seed=seed), deltas, lengths, outputs)

    def play(many: bool) -> Run:
        seed = math.floor(next(turns) / 2)  # both sides of a round have the same arrivals
        chosen = power_choices(args.requests, args.registered, alpha, seed=seed)
        planned = work(chosen if many else [0] * args.requests, seed)
        return _measured(bench, lambda: bench.play(planned, _digest))

    found = alternate({"many": lambda: play(True), "one": lambda: play(False)}, args.rounds)
    values = _compared(found)
    values["hit rate"] = Spread.of([run.hit_rate for run in found["many"]])
    return Record(f"alpha {alpha:g}, cv {cv:g}", values, {"requests/s": rate})


PARTS: Mapping[str, tuple[int, int, Callable[[InProcess, argparse.Namespace], list[Record]]]] = {
    "zipf": (2000, 64, _zipf),
    "starvation": (6, 3, _starvation),
    "slora": (1000, 64, _slora),
}
