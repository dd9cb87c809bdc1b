"""Many deltas of unequal popularity under bursts, in an open loop, against the same arrivals on one delta.

The workload is S-LoRA's (arXiv 2311.03285), scaled to this machine: 1,000 LoRAs of
rank 8 on q, k, v, o, of which request number i takes floor(n * Power(alpha)), so that alpha 1 is uniform and 0.1 nearly
one delta; gaps between arrivals Gamma(1 / cv^2, cv^2 / rate), so that cv 1 is Poisson and 4 comes in bursts; lengths of
prompts and outputs uniform. The rate is --load times what the engine reached just before in a closed loop on one delta.

Every round plays the same arrivals, prompts and lengths once for each alpha and once on one delta; ratios are against
that one. A play with cv 4 may well bring twice the mean rate, or half: its own arrivals say what either side had to do.
Requests a second include the time that the last of a play take to end, the same on both sides. Takes 11 minutes on two
cores.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count

import torch

from loadtest.backbones import SIZES, random_backbone
from loadtest.deltas import placed_bytes
from loadtest.inprocess import InProcess
from loadtest.plays import Play, capacity, digest_of, measured, store_of
from loadtest.report import Record, Spread, alternate, make_parser, publish
from loadtest.workload import Arrival, arrivals, power_choices, times_within, uniform_lengths

RANK = 8
ROWS = 32
SHORTEST = 8
"""Tokens of the shortest prompt and output."""
ONE = "one delta"


def main(argv: Sequence[str]) -> None:
    """Measure every alpha with every cv."""
    parser = make_parser("popularity", __doc__)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--registered", type=int, default=1000, help="deltas")
    parser.add_argument("--room", type=int, default=64, help="deltas that fit the device")
    parser.add_argument("--seconds", type=float, default=9.0, help="arrivals of one play")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="most tokens of one prompt")
    parser.add_argument("--output-tokens", type=int, default=64, help="most tokens of one output")
    parser.add_argument("--load", type=float, default=0.7, help="share of the closed loop's rate")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.3, 0.6, 1.0])
    parser.add_argument("--cvs", type=float, nargs="+", default=[1.0, 4.0])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    backbone = random_backbone(args.size, args.dtype)
    load = store_of(backbone, RANK)
    room_bytes = args.room * placed_bytes(load(digest_of(0)), backbone)
    with InProcess(backbone, load, max_num_seqs=ROWS, delta_bytes=room_bytes) as bench:
        rate = args.load * capacity(bench, _closed(args), ROWS * 3 // 2)
        records = [record for cv in args.cvs for record in _measure(bench, args, cv, rate)]
    title = (
        f"popularity: {args.registered} deltas, room for {args.room}, {rate:.3g} requests/s, {args.size} {args.dtype},"
        f" {args.threads} threads, median (min-max) of {args.rounds}"
    )
    publish(title, shlex.join(["popularity", *argv]), records, args.json)


def _closed(args: argparse.Namespace) -> list[Arrival]:
    """Requests on one delta, enough to fill the rows four times."""
    size = 4 * ROWS
    prompts = uniform_lengths(size, min(SHORTEST, args.prompt_tokens), args.prompt_tokens, seed=1)
    outputs = uniform_lengths(size, min(SHORTEST, args.output_tokens), args.output_tokens, seed=2)
    return arrivals([0.0] * size, [0] * size, prompts, outputs)


def _measure(bench: InProcess, args: argparse.Namespace, cv: float, rate: float) -> list[Record]:
    cases: dict[str, float | None] = {ONE: None} | {f"alpha {alpha:g}": alpha for alpha in args.alphas}
    turns = count()

    def play(alpha: float | None) -> Play:
        seed = next(turns) // len(cases)  # every case of a round has the same arrivals
        times = times_within(args.seconds, rate, cv, seed=seed)
        size = len(times)
        chosen = [0] * size if alpha is None else power_choices(size, args.registered, alpha, seed=seed)
        prompts = uniform_lengths(size, min(SHORTEST, args.prompt_tokens), args.prompt_tokens, seed=seed)
        outputs = uniform_lengths(size, min(SHORTEST, args.output_tokens), args.output_tokens, seed=seed + 1)
        work = arrivals(times, chosen, prompts, outputs)
        return measured(bench, lambda: bench.play(work, digest_of))

    found = alternate({name: partial(play, alpha) for name, alpha in cases.items()}, args.rounds)
    return [Record(f"cv {cv:g}, {name}", _values(found, name)) for name in cases]


def _values(found: Mapping[str, Sequence[Play]], name: str) -> dict[str, Spread]:
    plays, base = found[name], found[ONE]
    values = {
        "requests/s": Spread.of([play.requests_per_s for play in plays]),
        "tok/s": Spread.of([play.tokens_per_s for play in plays]),
        "TTFT p50 ms": Spread.of([play.ttft_p50_s * 1e3 for play in plays]),
        "TTFT p99 ms": Spread.of([play.ttft_p99_s * 1e3 for play in plays]),
        "hit rate": Spread.of([play.hit_rate for play in plays]),
    }
    if name != ONE:
        values |= {
            "tok/s / one": Spread.ratio([p.tokens_per_s for p in plays], [p.tokens_per_s for p in base]),
            "p50 / one": Spread.ratio([p.ttft_p50_s for p in plays], [p.ttft_p50_s for p in base]),
            "p99 / one": Spread.ratio([p.ttft_p99_s for p in plays], [p.ttft_p99_s for p in base]),
        }
    return values
