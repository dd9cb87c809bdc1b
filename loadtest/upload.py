"""Uploads while streams run: does taking, checking, storing and proving them delay other callers' tokens?

`deltamux serve` with one replica over a random backbone. Each round has one batch of --streams streams over --deltas
LoRAs alone, and one while another process uploads LoRAs, the next as soon as one is answered, each with content that
the server has not seen. A gap is the time between two pieces of a stream, which hold one token or more; those count
that begin when every stream has its first piece. The budget: p99 of the gaps within 1.5 times of that without uploads.
Exit status 1 where it is missed.

Duration: about half a minute to start, then rounds + 1 times two batches of streams.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import shlex
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import torch

from adapters.canonical import Canonical, to_canonical
from loadtest.backbones import SIZES
from loadtest.deltas import random_lora
from loadtest.http import Reply, ask
from loadtest.report import Record, Spread, make_parser, percentile, publish
from loadtest.server import ServerProcess, write_backbone
from loadtest.workload import random_prompts
from serving.model.backbone import load_backbone

BUDGET = 1.5
TIMEOUT_S = 600.0
PERCENTS = (50, 99)


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of streams, and the uploads that were answered meanwhile."""

    gaps_ms: list[float]
    tokens_per_s: float
    uploads_s: list[float]


class Uploader:
    """A process that uploads between `start` and `stop`, so that its own work delays no stream's clock."""

    def __init__(self, url: str, pair: Canonical) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_upload, args=(other, url, pair.manifest, pair.tensors), daemon=True
        )
        self._process.start()
        other.close()

    def start(self) -> None:
        """Upload from now on."""
        self._pipe.send(True)

    def stop(self) -> list[float]:
        """Let the upload under way end; how long each took. Raises RuntimeError where one was refused."""
        self._pipe.send(False)
        refused, took = self._pipe.recv()
        if refused is not None:
            raise RuntimeError(f"An upload was refused: {refused}")
        return list(took)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _upload(pipe: Connection, url: str, manifest: bytes, tensors: bytes) -> None:
    """Upload between True and False from `pipe`; the last value of the last tensor makes each content another."""
    number = 0
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:
        while True:
            pipe.recv()
            took: list[float] = []
            refused = None
            while not pipe.poll() and refused is None:
                number += 1
                content = tensors[:-4] + struct.pack("<f", number / 1024)
                files = [("file", ("manifest.json", manifest)), ("file", ("tensors.safetensors", content))]
                began = time.perf_counter()
                reply = http.put("/v1/adapters/uploaded/versions", files=files)
                took.append(time.perf_counter() - began)
                refused = None if reply.status_code == 201 else reply.text[:500]
            pipe.recv()
            pipe.send((refused, took))


async def batch(
    client: httpx.AsyncClient, models: Sequence[str], uploader: Uploader | None, args: argparse.Namespace
) -> Batch:
    """`--streams` streams at once, each `--output-tokens` long."""
    if uploader is not None:
        uploader.start()
    started = time.perf_counter()
    replies = await asyncio.gather(
        *(
            ask(
                client,
                {
                    "model": models[index % len(models)],
                    "prompt": prompt,
                    "max_tokens": args.output_tokens,
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "ignore_eos": True,
                },
            )
            for index, prompt in enumerate(random_prompts(args.streams))
        )
    )
    took = time.perf_counter() - started
    uploads_s = uploader.stop() if uploader is not None else []
    return Batch(settled_gaps_ms(replies), sum(reply.tokens for reply in replies) / took, uploads_s)


def settled_gaps_ms(replies: Sequence[Reply]) -> list[float]:
    """The gaps that begin when every stream has had its first piece: before, others' prompts are what delays."""
    settled = max(reply.ttft_s for reply in replies)
    found = []
    for reply in replies:
        at = reply.ttft_s
        for gap in reply.gaps_s:
            if at >= settled:
                found.append(gap * 1e3)
            at += gap
    return found


async def measure(server: ServerProcess, pairs: Sequence[Canonical], args: argparse.Namespace) -> Record:
    """Rounds of a batch without and one with uploads, after one that is not measured. The last pair is uploaded."""
    limits = httpx.Limits(max_connections=args.streams)
    uploader = Uploader(server.url, pairs[-1])
    alone: list[Batch] = []
    beside: list[Batch] = []
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=TIMEOUT_S, limits=limits) as client:
            models = [f"lora{index}" for index in range(len(pairs) - 1)]
            for name, pair in zip(models, pairs, strict=False):
                files = [
                    ("file", ("manifest.json", pair.manifest)),
                    ("file", ("tensors.safetensors", pair.tensors)),
                ]
                (await client.put(f"/v1/adapters/{name}/versions", files=files)).raise_for_status()
            for turn in range(args.rounds + 1):
                found = [await batch(client, models, None, args), await batch(client, models, uploader, args)]
                if turn:
                    alone.append(found[0])
                    beside.append(found[1])
    finally:
        uploader.close()
    uploads = [took for run in beside for took in run.uploads_s]
    facts = {
        "uploads": len(uploads),
        "MB each": pairs[-1].size_bytes / 1e6,
        "median upload s": percentile(uploads, 50) if uploads else 0.0,
    }
    return Record(f"{args.streams} streams", figures(alone, beside), facts)


def figures(alone: Sequence[Batch], beside: Sequence[Batch]) -> dict[str, Spread]:
    """Percentiles of the gaps in each round, and their ratios within a round."""
    values: dict[str, Spread] = {}
    for percent in PERCENTS:
        without, with_uploads = (
            [percentile(run.gaps_ms, percent) for run in runs] for runs in (alone, beside)
        )
        values[f"gap p{percent} ms, alone"] = Spread.of(without)
        values[f"gap p{percent} ms, uploads"] = Spread.of(with_uploads)
        values[f"p{percent} ratio"] = Spread.ratio(with_uploads, without)
    values["largest gap ms, alone"] = Spread.of([max(run.gaps_ms) for run in alone])
    values["largest gap ms, uploads"] = Spread.of([max(run.gaps_ms) for run in beside])
    values["tok/s, alone"] = Spread.of([run.tokens_per_s for run in alone])
    values["tok/s, uploads"] = Spread.of([run.tokens_per_s for run in beside])
    return values


def main(argv: Sequence[str]) -> None:
    """Start a server, measure it, end it; exit 1 where the budget is missed."""
    parser = make_parser("upload", __doc__)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--deltas", type=int, default=8, help="LoRAs that the streams take in turn")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=64)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="loadtest-upload-") as directory:
        root = Path(directory)
        write_backbone(args.size, root / args.size)
        spec = load_backbone(str(root / args.size), device="cpu", dtype="float32").spec
        pairs = [to_canonical(random_lora(spec, args.rank, seed + 1)) for seed in range(args.deltas + 1)]
        engine = {"MAX_NUM_SEQS": args.streams, "MAX_QUEUE": args.streams, "NUM_THREADS": args.threads}
        variables = {f"DELTAMUX_ENGINE__{name}": str(value) for name, value in engine.items()}
        server = ServerProcess(root / args.size, root / "home", variables)
        try:
            server.start(replicas=1)
            record = asyncio.run(measure(server, pairs, args))
            server.end(signal.SIGTERM)
        finally:
            server.kill_all()
    title = (
        f"uploads beside {args.streams} streams of {args.output_tokens} tokens, {args.size} float32, "
        f"{args.threads} threads, median (min-max) of {args.rounds}"
    )
    publish(title, shlex.join(["upload", *argv]), [record], args.json)
    ratio = record.values["p99 ratio"].median
    met = ratio <= BUDGET
    sys.stdout.write(
        f"p99 {ratio:.2f} of that without uploads; the budget is {BUDGET}: {'met' if met else 'MISSED'}\n"
    )
    if not met:
        sys.exit(1)
