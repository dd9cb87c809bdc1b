"""Ten tasks of one encoder in one batch, against two ways to serve them with PEFT: requests per second.

    ours        one engine, one copy of the encoder, rows of all tasks in one batch
    one by one  one process in which PEFT's ten models share the encoder; requests in the order of their arrival
    processes   one process per task with a thread of its own on the same cores, padded batches of its own requests

All requests are there at once: random token ids, 8 to 128 of them, tasks in turn. Answers are compared with those of
`one by one`. 22m: a minute a round on two cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.formats import read_directory
from loadtest.encoder_tasks import ADAPTERS, answer, body, load, save
from loadtest.inprocess import InProcess
from loadtest.report import Record, Spread, alternate, make_parser, publish, seconds
from serving.core import Pooled
from serving.model.backbone import adopt_backbone

LENGTHS = (8, 128)
BATCH = 32
"""Rows of a padded batch of a task's own process."""


def main(argv: Sequence[str]) -> None:
    """Measure the three ways in turn."""
    parser = make_parser("pooling", __doc__)
    parser.add_argument("--encoder", default="22m", help="a size (tiny, 22m) or the directory of an encoder")
    parser.add_argument("--requests", type=int, default=500)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        records = _measure(args, Path(directory))
    title = (
        f"pooling, {Path(args.encoder).name}, {args.requests} requests of {len(ADAPTERS)} tasks, {args.threads} "
        f"threads, median (min-max) of {args.rounds}"
    )
    publish(title, shlex.join(["pooling", *argv]), records, args.json)


def _measure(args: argparse.Namespace, directory: Path) -> list[Record]:
    source = body(args.encoder)
    draw = random.Random(0)  # noqa: S311
    prompts = [
        [draw.randrange(5, source.config.vocab_size) for _ in range(draw.randint(*LENGTHS))]
        for _ in range(args.requests)
    ]
    for adapter in ADAPTERS:
        save(source, adapter, directory / adapter.name)
    models = [load(source, adapter, directory / adapter.name) for adapter in ADAPTERS]
    backbone = adopt_backbone(body(args.encoder), name="encoder", device="cpu", dtype="float32")
    deltas = {adapter.name: read_directory(directory / adapter.name, backbone.spec) for adapter in ADAPTERS}
    chosen = [ADAPTERS[index % len(ADAPTERS)] for index in range(args.requests)]
    wrong: list[float] = []
    with (
        InProcess(backbone, deltas.__getitem__, max_num_seqs=64) as bench,
        Processes(args.encoder, directory, prompts) as processes,
    ):

        def ours() -> list[Pooled]:
            return bench.answer(prompts, [a.task for a in chosen], [a.name for a in chosen])

        def one_by_one() -> list[Tensor]:
            pairs = zip(prompts, range(args.requests), strict=True)
            return [
                answer(models[index % len(ADAPTERS)], chosen[index], [prompt])[0] for prompt, index in pairs
            ]

        for served, expected in zip(ours(), one_by_one(), strict=True):
            got = torch.tensor(served.numbers()).view(served.shape)
            wrong.append(float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0)))
        found = alternate(
            {
                "ours": lambda: args.requests / seconds(ours),
                "one by one": lambda: args.requests / seconds(one_by_one),
                "processes": lambda: args.requests / processes.run_s(),
            },
            args.rounds,
        )
    parameters = _parameters(source)
    copies = {"ours": 1, "one by one": 1, "processes": len(ADAPTERS)}
    return [
        Record(
            case,
            {"requests/s": Spread.of(values), "ours / this": Spread.ratio(found["ours"], values)},
            {
                "encoder MB": 4 * parameters * copies[case] / 1e6,
                "largest error": max(wrong) if case == "ours" else 0.0,
            },
        )
        for case, values in found.items()
    ]


def _parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


class Processes:
    """A process for each task, started once; a round begins in all of them at the same moment."""

    def __init__(self, encoder: str, directory: Path, prompts: Sequence[Sequence[int]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes = []
        for index, adapter in enumerate(ADAPTERS):
            here, there = context.Pipe()
            mine = [list(prompt) for prompt in prompts[index :: len(ADAPTERS)]]
            process = context.Process(
                target=_serve, args=(there, encoder, index, directory / adapter.name, mine), daemon=True
            )
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __enter__(self) -> Processes:
        for pipe in self._pipes:
            pipe.recv()  # it is ready
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(False)
            process.join()

    def run_s(self) -> float:
        """Seconds until the last one has answered all of its requests."""
        started = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(True)
        for pipe in self._pipes:
            pipe.recv()
        return time.perf_counter() - started


def _serve(pipe: Any, encoder: str, index: int, directory: Path, prompts: list[list[int]]) -> None:
    torch.set_num_threads(1)
    adapter = ADAPTERS[index]
    model = load(body(encoder), adapter, directory)
    pipe.send("ready")
    while pipe.recv():
        for start in range(0, len(prompts), BATCH):
            answer(model, adapter, prompts[start : start + BATCH])
        pipe.send("done")
