"""2,000 registered deltas drawn by Zipf 1.0, device room for 64, against the same requests on one delta.

Deltas are rank-4 LoRAs on q, k, v, o. A closed loop: as many requests are in flight as --in-flight says, of which 32
run. Takes 6 minutes on two cores.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from itertools import count

import torch

from loadtest.backbones import SIZES, random_backbone
from loadtest.deltas import placed_bytes
from loadtest.inprocess import InProcess
from loadtest.plays import Play, digest_of, measured, store_of
from loadtest.report import Record, Spread, alternate, make_parser, publish
from loadtest.workload import arrivals, uniform_lengths, zipf_choices

RANK = 4
ROWS = 32


def main(argv: Sequence[str]) -> None:
    """Measure both cases."""
    parser = make_parser("residency", __doc__)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--registered", type=int, default=2000, help="deltas")
    parser.add_argument("--room", type=int, default=64, help="deltas that fit the device")
    parser.add_argument("--requests", type=int, default=200, help="requests per play")
    parser.add_argument("--output-tokens", type=int, default=32, help="tokens of one request")
    parser.add_argument("--in-flight", type=int, default=48, help=f"{ROWS} run, the others wait")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    backbone = random_backbone(args.size, args.dtype)
    load = store_of(backbone, RANK)
    room_bytes = args.room * placed_bytes(load(digest_of(0)), backbone)
    with InProcess(backbone, load, max_num_seqs=ROWS, delta_bytes=room_bytes) as bench:
        record = _measure(bench, args)
    title = (
        f"residency: {args.registered} deltas, room for {args.room}, {args.size} {args.dtype},"
        f" {args.threads} threads, median (min-max) of {args.rounds}"
    )
    publish(title, shlex.join(["residency", *argv]), [record], args.json)


def _measure(bench: InProcess, args: argparse.Namespace) -> Record:
    lengths = uniform_lengths(args.requests, 16, 128)
    outputs = [args.output_tokens] * args.requests
    turns = count()

    def play(*, many: bool) -> Play:
        chosen = zipf_choices(args.requests, args.registered, 1.0, seed=next(turns))
        work = arrivals([0.0] * args.requests, chosen if many else [0] * args.requests, lengths, outputs)
        return measured(bench, lambda: bench.play_closed(work, digest_of, args.in_flight))

    found = alternate({"many": lambda: play(many=True), "one": lambda: play(many=False)}, args.rounds)
    many, one = found["many"], found["one"]
    values = {
        "many tok/s": Spread.of([play.tokens_per_s for play in many]),
        "one tok/s": Spread.of([play.tokens_per_s for play in one]),
        "throughput ratio": Spread.ratio([p.tokens_per_s for p in many], [p.tokens_per_s for p in one]),
        "many TTFT p99 s": Spread.of([play.ttft_p99_s for play in many]),
        "one TTFT p99 s": Spread.of([play.ttft_p99_s for play in one]),
        "TTFT p99 ratio": Spread.ratio([p.ttft_p99_s for p in many], [p.ttft_p99_s for p in one]),
        "hit rate": Spread.of([play.hit_rate for play in many]),
        "loads": Spread.of([play.loads for play in many]),
        "latency p90/p50": Spread.of([play.latency_p90_s / play.latency_p50_s for play in many]),
    }
    met = values["throughput ratio"].median >= 0.85
    facts = {"budget": "throughput ratio >= 0.85", "verdict": "met" if met else "missed"}
    return Record("zipf 1.0 against one delta", values, facts)
