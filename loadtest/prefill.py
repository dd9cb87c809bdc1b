"""Prefill throughput by chunk size (tokens of one step), alone and beside rows that decode.

alone: prompt tokens a second of long prompts, bare and with one rank-16 LoRA each. mixed: the same prompts arrive while
half the rows decode; printed beside it is what a decoding row waits for its next token, at the median and the worst.
At the default options on two cores 4 minutes (60m).
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence

import torch

from loadtest.backbones import SIZES, random_backbone
from loadtest.deltas import placed_bytes, random_lora
from loadtest.inprocess import PAUSE_S, InProcess
from loadtest.report import Record, Spread, alternate, make_parser, percentile, publish
from loadtest.workload import random_prompts
from serving.model.backbone import Backbone

DECODE_TOKENS = 800


def main(argv: Sequence[str]) -> None:
    """Measure every chunk size."""
    parser = make_parser("prefill", __doc__)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decoding", type=int, default=16, help="rows that decode in `mixed`")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    backbone = random_backbone(args.size, args.dtype)
    records = [record for chunk in args.chunks for record in _chunk(backbone, chunk, args)]
    title = (
        f"prefill of {args.prompts} prompts of {args.prompt_tokens}, {args.size} {args.dtype},"
        f" {args.threads} threads, median (min-max) of {args.rounds}"
    )
    publish(title, shlex.join(["prefill", *argv]), records, args.json)


def _chunk(backbone: Backbone, chunk: int, args: argparse.Namespace) -> list[Record]:
    length = args.prompt_tokens
    prompts = random_prompts(args.prompts, shortest=length, longest=length)
    deltas = {f"lora-{i}": random_lora(backbone.spec, 16, i + 1) for i in range(args.prompts)}
    room = 2 * args.prompts * placed_bytes(deltas["lora-0"], backbone)
    bare: list[str | None] = [None] * args.prompts
    total: int = args.prompts * length
    waits: dict[str, list[float]] = {"p50": [], "most": []}
    with InProcess(
        backbone, deltas.__getitem__, max_num_seqs=args.decoding + args.prompts, max_num_batched_tokens=chunk,
        delta_bytes=room,
    ) as bench:  # fmt: skip

        def alone(digests: Sequence[str | None]) -> float:
            outcomes = bench.generate(prompts, digests, 1)
            return total / max(outcome.ttft_s for outcome in outcomes)

        def mixed() -> float:
            running = [bench.submit([3, 4, 5, 6], None, DECODE_TOKENS) for _ in range(args.decoding)]
            while not all(bench.requests[i].token_ids for i in running):
                bench.step()
            ids = [bench.submit(prompt, None, 1) for prompt in prompts]
            started, gaps = time.perf_counter(), []
            while not all(bench.requests[i].ended for i in ids):
                begun = time.perf_counter()
                if not bench.step():
                    time.sleep(PAUSE_S)
                gaps.append(time.perf_counter() - begun)
            speed = total / (time.perf_counter() - started)
            assert not any(bench.requests[i].ended for i in running), "raise DECODE_TOKENS"
            for request_id in running:
                bench.engine.cancel(request_id)
            bench.finish([*ids, *running])
            waits["p50"].append(percentile(gaps, 50) * 1e3)
            waits["most"].append(max(gaps) * 1e3)
            return speed

        cases = {"bare": lambda: alone(bare), "LoRA": lambda: alone(list(deltas))}
        if chunk > args.decoding:  # else decoding rows leave no room for a prompt
            cases["mixed"] = mixed
        found = alternate(cases, args.rounds)
    records = [
        Record(
            f"chunk {chunk}, alone",
            {
                "bare tok/s": Spread.of(found["bare"]),
                "LoRA tok/s": Spread.of(found["LoRA"]),
                "LoRA/bare": Spread.ratio(found["LoRA"], found["bare"]),
            },
        )
    ]
    if "mixed" in found:
        values = {
            "bare tok/s": Spread.of(found["mixed"]),
            "step p50 ms": Spread.of(waits["p50"][1:]),
            "longest step ms": Spread.of(waits["most"][1:]),
        }
        records.append(Record(f"chunk {chunk}, beside {args.decoding} decoding rows", values))
    return records
