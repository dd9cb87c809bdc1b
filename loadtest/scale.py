"""From 1 to 10,000 registered deltas: resolve a name, list a page, and generate over a few of them.

The registry is the server's own, on SQLite in a temporary directory. Generation resolves the name of every request and
runs 8 deltas (or as many as there are) in turn. Most of the time goes into registering: at the default options
10 minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shlex
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch

from adapters.names import ModelReference
from adapters.registry import DEFAULT_TENANT, Registry
from loadtest.backbones import SIZES, random_backbone
from loadtest.deltas import random_lora
from loadtest.inprocess import InProcess
from loadtest.report import Record, Spread, alternate, make_parser, percentile, publish, seconds
from loadtest.workload import random_prompts

ACTIVE = 8
PAGE = 100


def main(argv: Sequence[str]) -> None:
    """Measure every number of deltas, registering the missing ones in between."""
    parser = make_parser("scale", __doc__)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--registered", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000])
    parser.add_argument("--lookups", type=int, default=1000, help="names resolved and pages listed per round")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=16)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    backbone = random_backbone(args.size, args.dtype)
    deltas = {_digest(i): random_lora(backbone.spec, 16, i + 1) for i in range(ACTIVE)}
    records = []
    with (
        tempfile.TemporaryDirectory() as directory,
        Registry(f"sqlite:///{Path(directory) / 'registry.db'}") as registry,
        InProcess(backbone, deltas.__getitem__, max_num_seqs=args.rows, delta_bytes=8 << 30) as bench,
    ):
        made = count()
        done = 0
        for total in sorted(args.registered):
            while done < total:
                done = _register(registry, next(made), backbone.spec.digest)
            records.append(_point(registry, bench, total, args))
    title = (
        f"scale, {args.size} {args.dtype}, {args.rows} rows, {args.threads} threads,"
        f" median (min-max) of {args.rounds}"
    )
    publish(title, shlex.join(["scale", *argv]), records, args.json)


def _name(index: int) -> str:
    return f"delta-{index:05}"


def _digest(index: int) -> str:
    return hashlib.sha256(str(index).encode()).hexdigest()


def _register(registry: Registry, index: int, backbone_digest: str) -> int:
    """Publish delta `index`; returns how many there are then."""
    registry.publish(
        DEFAULT_TENANT,
        _name(index),
        _digest(index),
        method="LORA",
        backbone_digest=backbone_digest,
        task="causal-lm",
        size_bytes=1,
        labels={},
        proof={},
    )
    return index + 1


def _point(registry: Registry, bench: InProcess, total: int, args: argparse.Namespace) -> Record:
    draw = random.Random(total)  # noqa: S311
    prompts = random_prompts(args.rows)

    def resolve(index: int) -> str:
        return registry.resolve(ModelReference(DEFAULT_TENANT, _name(index), alias="latest")).digest

    def resolving() -> float:
        return percentile([seconds(lambda: resolve(draw.randrange(total))) for _ in range(args.lookups)], 99)

    def list_page() -> None:
        after = _name(draw.randrange(max(1, total - PAGE)))
        registry.list_adapters(DEFAULT_TENANT, limit=PAGE, after=after)

    def listing() -> float:
        return percentile([seconds(list_page) for _ in range(max(1, args.lookups // 10))], 99)

    def generating() -> float:
        def run() -> None:
            digests = [resolve(i % min(ACTIVE, total)) for i in range(args.rows)]
            bench.generate(prompts, digests, args.output_tokens)

        return int(args.rows) * int(args.output_tokens) / seconds(run)

    found = alternate({"resolve": resolving, "list": listing, "generate": generating}, args.rounds)
    values = {
        "resolve p99 ms": Spread.of([v * 1e3 for v in found["resolve"]]),
        "list p99 ms": Spread.of([v * 1e3 for v in found["list"]]),
        "tok/s": Spread.of(found["generate"]),
    }
    met = values["resolve p99 ms"].median <= 2 and values["list p99 ms"].median <= 20
    facts = {"budget": "resolve <= 2, list <= 20", "verdict": "met" if met else "missed"}
    return Record(f"{total} registered", values, facts)
