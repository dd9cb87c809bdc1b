"""Any OpenAI-compatible server, streaming: ours, vLLM, llama.cpp. Imports neither of this repository's packages.

Give --model once for each case, with one name or several that the requests take in turn:

  python -m loadtest http --url http://127.0.0.1:8000 --model base --model lora0 lora1 lora2 lora3

or --deltas for cases of so many of the names that the server lists and --pattern matches, in natural order; 0 is
the first --model alone:

  python -m loadtest http --url http://127.0.0.1:8000 --model base --deltas 0 1 8 32 --pattern 'lora*'

A server that selects a delta by other fields than `model` has them in the JSON file --bodies: name -> the fields of its
requests. Its names count as listed (llama.cpp: {"lora0": {"lora": [{"id": 0, "scale": 1}]}, ...}, and scale 0 for the
bare model, since an empty list there changes nothing).
--server names the server in the result, for `python -m loadtest compare`.

Greedy, fixed output length (`ignore_eos`), the same seeded prompts of 16 to 128 token ids for every server; --text for
servers that take no ids. Every round runs all cases at one concurrency in turn; ratios are against the first case. A
gap is the time between two pieces of a stream, which hold one token or more. The number of tokens is what the server's
usage object says, or the pieces that came where it says nothing; a reply of another length than asked for is an error.
--extra adds fields to every request, as JSON.

Duration: rounds + 1 times the sum, over concurrencies and cases, of one batch of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shlex
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from loadtest.report import Record, Spread, make_parser, percentile, publish
from loadtest.workload import random_prompts


@dataclass(slots=True)
class Reply:
    """One streamed reply: seconds to its first piece, gaps between pieces, tokens."""

    ttft_s: float
    gaps_s: list[float]
    tokens: int


@dataclass(slots=True)
class Run:
    """One batch of requests."""

    tokens_per_s: float
    replies: list[Reply] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Reply:
    """One request. Raises RuntimeError for an error reply or another number of tokens than asked for."""
    started = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] | None = None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:500]!r}")
        async for chunk in chunks(response):
            if "error" in chunk:
                raise RuntimeError(f"the stream ended with {chunk['error']}")
            usage = chunk.get("usage") or usage
            if any(choice.get("text") or choice.get("token_ids") for choice in chunk.get("choices", ())):
                times.append(time.perf_counter())
    tokens = usage["completion_tokens"] if usage else len(times)
    if tokens != body["max_tokens"] or not times:
        raise RuntimeError(f"{tokens} tokens in {len(times)} pieces, asked for {body['max_tokens']}")
    gaps = [after - before for before, after in pairwise(times)]
    return Reply(times[0] - started, gaps, tokens)


async def chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream of server-sent events."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


async def run_batch(
    client: httpx.AsyncClient,
    models: Sequence[str],
    concurrency: int,
    args: argparse.Namespace,
    turn: int = 0,
) -> Run:
    """`per_place` requests for each of `concurrency` places, so many at a time; later turns go on with the models."""
    prompts = random_prompts(concurrency * args.per_place)
    gate = asyncio.Semaphore(concurrency)

    async def one(index: int, prompt: list[int]) -> Reply:
        model = models[(turn * len(prompts) + index) % len(models)]
        body = {
            "model": model,
            "prompt": " ".join(f"w{token}" for token in prompt) if args.text else prompt,
            "max_tokens": args.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            **args.extra,
            **args.bodies.get(model, {}),
        }
        async with gate:
            return await ask(client, body)

    started = time.perf_counter()
    replies = list(await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts))))
    took = time.perf_counter() - started
    return Run(sum(reply.tokens for reply in replies) / took, replies)


async def measure(client: httpx.AsyncClient, args: argparse.Namespace) -> list[Record]:
    """A record for each concurrency and case."""
    cases = await cases_of(client, args)
    facts = {"server": args.server} if args.server else {}
    records = []
    for concurrency in args.concurrency:
        found: dict[str, list[Run]] = {case: [] for case in cases}
        for turn in range(args.rounds + 1):  # the first is not measured
            for case, models in cases.items():
                run = await run_batch(client, models, concurrency, args, turn)
                if turn:
                    found[case].append(run)
        first = next(iter(found.values()))
        records += [
            Record(f"{concurrency} in flight, {case}", _figures(runs, first), facts)
            for case, runs in found.items()
        ]
    return records


async def cases_of(client: httpx.AsyncClient, args: argparse.Namespace) -> dict[str, list[str]]:
    """Models by case. Raises RuntimeError where the server lists fewer matching models than a case takes."""
    if not args.deltas:
        return {m[0] if len(m) == 1 else f"{m[0]} and {len(m) - 1} more": m for m in args.model}
    response = await client.get("/v1/models")
    response.raise_for_status()
    listed = {entry["id"] for entry in response.json()["data"]} | set(args.bodies)
    matching = sorted((name for name in listed if fnmatchcase(name, args.pattern)), key=_natural)
    if len(matching) < max(args.deltas):
        raise RuntimeError(
            f"{len(matching)} models match {args.pattern!r}, {max(args.deltas)} are asked for; the server lists"
            f" {sorted(listed, key=_natural)}"
        )
    bare = args.model[0]
    return {f"{n} deltas": matching[:n] if n else bare for n in args.deltas}


def _natural(name: str) -> list[tuple[int, str]]:
    """By which lora2 comes before lora10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _figures(runs: Sequence[Run], first: Sequence[Run]) -> dict[str, Spread]:
    speeds = [run.tokens_per_s for run in runs]
    values = {
        "tok/s": Spread.of(speeds),
        "against first": Spread.ratio(speeds, [run.tokens_per_s for run in first]),
    }
    for percent in (50, 99):
        waits = [percentile([reply.ttft_s * 1e3 for reply in run.replies], percent) for run in runs]
        values[f"TTFT p{percent} ms"] = Spread.of(waits)
    gaps = [[gap * 1e3 for reply in run.replies for gap in reply.gaps_s] for run in runs]
    if all(gaps):  # one piece a reply has none
        for percent in (50, 99):
            values[f"gap p{percent} ms"] = Spread.of([percentile(of_run, percent) for of_run in gaps])
    return values


def _json_file(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def main(argv: Sequence[str]) -> None:
    """Measure one server."""
    parser = make_parser("http", __doc__)
    parser.add_argument("--url", required=True, help="base URL, without /v1")
    parser.add_argument(
        "--model", nargs="+", action="append", required=True, help="one case; may be repeated"
    )
    parser.add_argument(
        "--deltas", type=int, nargs="+", help="cases by number of deltas, 0: the first --model"
    )
    parser.add_argument(
        "--pattern", default="*", help="which of the listed models are deltas (shell pattern)"
    )
    parser.add_argument(
        "--bodies", type=_json_file, default={}, help="JSON file: model -> fields of its requests"
    )
    parser.add_argument("--server", help="what to call the server in the result")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--per-place", type=int, default=3, help="requests per place in flight and round")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--text", action="store_true", help="send words instead of token ids")
    parser.add_argument("--extra", type=json.loads, default={}, help="JSON object merged into every request")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with a bearer token")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    args = parser.parse_args(argv)
    headers = {"authorization": f"Bearer {os.environ[args.api_key_env]}"} if args.api_key_env else {}

    async def run() -> list[Record]:
        limits = httpx.Limits(max_connections=max(args.concurrency))
        async with httpx.AsyncClient(
            base_url=args.url, headers=headers, timeout=args.timeout, limits=limits
        ) as client:
            return await measure(client, args)

    records = asyncio.run(run())
    title = f"{args.server or args.url}, outputs of {args.output_tokens}, median (min-max) of {args.rounds}"
    publish(title, shlex.join(["http", *argv]), records, args.json)
