"""Six deltas, room for three, Poisson arrivals over all alike: the 90th percentile of the latency over its median.

A server that prefers what is on the device lets the others starve: of six adapters with room for three, at four
requests a second, others saw a median of 7.1 s and a 90th percentile of 32.9 s (4.6 times). Here the deltas are LoRAs
of rank 128 on all linears, each larger than the keys and values of all rows, so no more than three are on the device.
All are in host memory; a load is a copy to the device.

The rate is --load times what the engine reached just before in a closed loop over all six, under the faster policy.
Every round plays the same arrivals under both policies of `engine.scheduling`. Prints the limit beside the figure;
exits 1 where the median over the rounds is above 2 under `fair`, the default. Takes 6 minutes on two cores.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count

import torch

from loadtest.abuse import POLICIES
from loadtest.backbones import SIZES, random_backbone
from loadtest.deltas import placed_bytes
from loadtest.inprocess import KV_TOKENS, InProcess, slot_bytes
from loadtest.plays import Play, capacity, digest_of, measured, store_of
from loadtest.report import Record, Spread, alternate, make_parser, publish
from loadtest.workload import arrivals, gamma_times, power_choices
from serving.model.placed_size import max_device_bytes

LIMIT = 2.0
"""Of the 90th percentile of the end-to-end latency over the median."""
JUDGED = "fair"
RANK = 128


def main(argv: Sequence[str]) -> None:
    """Measure both policies; exit 1 where the default one misses the limit."""
    parser = make_parser("starvation", __doc__)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--registered", type=int, default=6, help="deltas")
    parser.add_argument("--room", type=int, default=3, help="deltas that fit the device")
    parser.add_argument("--rows", type=int, default=16, help="requests in one batch")
    parser.add_argument("--requests", type=int, default=120, help="requests per play")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens of one prompt")
    parser.add_argument("--output-tokens", type=int, default=64, help="tokens of one output")
    parser.add_argument("--load", type=float, default=0.8, help="share of the closed loop's rate")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    backbone = random_backbone(args.size, args.dtype)
    load = store_of(backbone, RANK, None)
    sample = load(digest_of(0))
    placed = placed_bytes(sample, backbone)
    entries = args.rows * (args.prompt_tokens + args.output_tokens)
    kv_bytes = entries * slot_bytes(backbone) // KV_TOKENS
    if kv_bytes >= placed:
        parser.error(
            f"{entries} entries of keys and values take {kv_bytes} bytes, a delta {placed}: with few requests running"
            f" more than {args.room} deltas would fit. Fewer --rows or shorter requests, please"
        )
    # a load reserves the most that its delta may take, and gives the rest back when it is there
    memory = (args.room - 1) * placed + max_device_bytes(sample, backbone) + kv_bytes
    with ExitStack() as stack:
        benches = {
            policy: stack.enter_context(
                InProcess(backbone, load, max_num_seqs=args.rows, memory_bytes=memory, scheduling=policy)
            )
            for policy in POLICIES
        }
        records = _measure(benches, args)
    title = (
        f"starvation: {args.registered} deltas, room for {args.room}, {args.rows} rows, {args.size} {args.dtype},"
        f" {args.threads} threads, median (min-max) of {args.rounds}"
    )
    publish(title, shlex.join(["starvation", *argv]), records, args.json)
    judged = next(record for record in records if record.label == JUDGED)
    if judged.facts["verdict"] == "missed":
        sys.exit(1)


def _measure(benches: Mapping[str, InProcess], args: argparse.Namespace) -> list[Record]:
    prompts = [args.prompt_tokens] * args.requests
    outputs = [args.output_tokens] * args.requests
    together = power_choices(args.requests, args.registered, 1.0)
    closed = arrivals([0.0] * args.requests, together, prompts, outputs)
    rate = args.load * max(capacity(bench, closed, 2 * args.rows) for bench in benches.values())
    turns = count()

    def play(policy: str) -> Play:
        seed = next(turns) // len(benches)  # both policies of a round have the same arrivals
        chosen = power_choices(args.requests, args.registered, 1.0, seed=seed)
        work = arrivals(gamma_times(args.requests, rate, 1.0, seed=seed), chosen, prompts, outputs)
        return measured(benches[policy], lambda: benches[policy].play(work, digest_of))

    found = alternate({policy: partial(play, policy) for policy in benches}, args.rounds)
    return [_record(policy, plays, rate) for policy, plays in found.items()]


def _record(policy: str, plays: Sequence[Play], rate: float) -> Record:
    values = {
        "latency p50 s": Spread.of([play.latency_p50_s for play in plays]),
        "latency p90 s": Spread.of([play.latency_p90_s for play in plays]),
        "p90/p50": Spread.of([play.latency_p90_s / play.latency_p50_s for play in plays]),
        "longest s": Spread.of([play.latency_max_s for play in plays]),
        "TTFT p99 s": Spread.of([play.ttft_p99_s for play in plays]),
        "loads": Spread.of([play.loads for play in plays]),
    }
    met = values["p90/p50"].median <= LIMIT
    facts = {
        "requests/s": rate,
        "limit": f"p90/p50 <= {LIMIT:g}",
        "verdict": "met" if met else "missed",
        "judged": "yes" if policy == JUDGED else "for comparison",
    }
    return Record(policy, values, facts)
