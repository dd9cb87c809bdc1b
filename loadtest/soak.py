"""Churn of deltas over little room, with the right answer known for every token.

Each delta signs: whatever the prompt, every token it generates is its own signature token (see `signed.py`). Beside
what signs it has random LoRAs of its own rank or a random prefix, so that segments, ranks, KV slots and positions are
all in play. Bare rows must repeat, token for token, what the same prompt gave alone, for prompts whose top two logits
are never close.

Requests come and go at random, some are cancelled, and deltas are unloaded while others run. At the end everything must
be free: no row, no KV slot, no lease, no byte of delta memory. --minutes or --seconds says how long (default 60 s). The
memory trend is a least-squares line through the second half of the run; resident memory counts as flat up to 0.5 MB a
minute, which a run of ten minutes or more must hold. A shorter one is still filling its caches and is not judged.
Exit status 1 where a token was wrong, something leaked or memory grew.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from loadtest.backbones import SIZES, random_backbone
from loadtest.deltas import placed_bytes
from loadtest.inprocess import PAUSE_S, InProcess
from loadtest.report import Record, Spread, make_parser, publish
from loadtest.signed import head_of, signature_of, signed_delta
from loadtest.workload import VOCAB_SIZE, random_prompts

PREFIX = "signed-"
OUTPUT_TOKENS = 24
BARE_PROMPTS = 8
SAFE_GAP = 1e-3
"""Between the log-probabilities of the best two tokens; rounding differs by about 1e-6 between batches."""

FLAT_MB_A_MINUTE = 0.5
"""Resident memory may grow so fast over the second half, of about 700 MB in all; 30 minutes measured 0.005."""
JUDGED_FROM_S = 600.0
"""The shortest run whose memory trend is judged; three on a busy machine were still settling, at 1 MB each."""

CANCELLED, UNLOADED, BARE = 0.1, 0.02, 0.15
"""Shares of the requests that are cancelled, that begin with an unload of some delta, that are bare."""


@dataclass(slots=True)
class Tally:
    """What the soak has seen."""

    requests: int = 0
    tokens: int = 0
    wrong_tokens: int = 0
    refused: int = 0
    cancelled: int = 0
    unloaded: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Soak:
    """One engine, its signed deltas, and the requests in flight: id -> expected tokens and delta."""

    def __init__(
        self, bench: InProcess, bare: dict[tuple[int, ...], list[int]], num_deltas: int, seed: int
    ) -> None:
        self.bench = bench
        self.bare = bare
        self.num_deltas = num_deltas
        self.draw = random.Random(seed)  # noqa: S311
        self.open: dict[str, tuple[list[int], str | None]] = {}
        self.unloading: dict[str, Future[int]] = {}
        self.tally = Tally()

    def run(self, duration_s: float, in_flight: int, least: int) -> None:
        """Keep `in_flight` requests going for `duration_s` and at least `least` of them, then let them end."""
        started = time.monotonic()
        sampled = -1.0
        while (now := time.monotonic() - started) < duration_s or self.tally.requests < least:
            if now - sampled >= min(1.0, 0.1 + duration_s / 20):
                self.tally.memory.append((now, resident_bytes()))
                sampled = now
            while len(self.open) < in_flight:
                self._submit()
            self._step()
        while self.open:
            self._step()

    def _submit(self) -> None:
        draw = self.draw
        if draw.random() < UNLOADED:
            digest = f"{PREFIX}{draw.randrange(self.num_deltas)}"
            if digest not in self.unloading:
                self.unloading[digest] = self.bench.engine.release(digest)
                self.tally.unloaded += 1
        length = draw.randint(1, OUTPUT_TOKENS)
        if draw.random() < BARE:
            prompt, alone = draw.choice(list(self.bare.items()))
            request_id, expected, chosen = self.bench.submit(prompt, None, length), alone[:length], None
        else:
            index = draw.randrange(self.num_deltas)
            chosen = f"{PREFIX}{index}"
            words = [draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(1, 64))]
            request_id = self.bench.submit(words, chosen, length)
            expected = [signature_of(index)] * length
        self.open[request_id] = (expected, chosen)
        self.tally.requests += 1
        if draw.random() < CANCELLED:
            self.bench.engine.cancel(request_id)
            self.tally.cancelled += 1

    def _step(self) -> None:
        if not self.bench.step():
            time.sleep(PAUSE_S)
        for request_id in [i for i in self.open if self.bench.requests[i].ended]:
            self._judge(request_id)
        self.unloading = {digest: future for digest, future in self.unloading.items() if not future.done()}

    def _judge(self, request_id: str) -> None:
        """A cancelled or refused request may be short; what it did give must be right."""
        expected, chosen = self.open.pop(request_id)
        outcome = self.bench.requests.pop(request_id)
        got = outcome.token_ids
        wrong = sum(a != b for a, b in zip(got, expected, strict=False)) + max(0, len(got) - len(expected))
        self.tally.tokens += len(got)
        self.tally.wrong_tokens += wrong
        if wrong and len(self.tally.problems) < 10:
            self.tally.problems.append(f"{chosen}: {got} for {expected}")
        if outcome.error is not None:
            self.tally.refused += 1
            if "unloaded" not in outcome.error:
                self.tally.problems.append(f"{chosen}: {outcome.error}")

    def leaks(self) -> list[str]:
        """What is not free although nothing runs; deltas that nobody uses are unloaded first."""
        engine = self.bench.engine
        digests = [f"{PREFIX}{i}" for i in range(self.num_deltas)]
        held = sum(engine.deltas.residency.leases(digest) for digest in digests)
        freed = [engine.release(digest) for digest in digests]
        for _ in range(2):  # the releases begin and end in one step where nothing holds them up
            self.bench.step()
        state = {
            "leases": held,
            "deltas that can't be unloaded": sum(not future.done() for future in freed),
            "running rows": len(engine.scheduler.running),
            "share of the KV cache": engine.scheduler.kv.usage,
            "bytes of deltas on the device": engine.deltas.residency.used_bytes,
            "bytes of deltas on the host": engine.deltas.host.used_bytes,
            "requests without an end": len(self.bench.requests),
        }
        return [f"{what}: {left} left at the end" for what, left in state.items() if left]


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_slope(samples: Sequence[tuple[float, float]]) -> float:
    """Bytes a second over the second half of the samples (least squares); 0 with fewer than two."""
    half = np.array(samples[len(samples) // 2 :], dtype=np.float64)
    if len(half) < 2:
        return 0.0
    return float(np.polyfit(half[:, 0], half[:, 1], 1)[0])


def memory_problems(samples: Sequence[tuple[float, float]], seconds: float) -> list[str]:
    """That resident memory grew, where a run of so many seconds is long enough to say so."""
    slope = memory_slope(samples) * 60 / 1e6
    if seconds < JUDGED_FROM_S or slope <= FLAT_MB_A_MINUTE:
        return []
    return [
        f"resident memory: {slope:.3g} MB a minute over the second half, at most {FLAT_MB_A_MINUTE:g} allowed"
    ]


def bare_answers(bench: InProcess) -> dict[tuple[int, ...], list[int]]:
    """Prompts and what each gives alone, where the best two tokens are never close."""
    found: dict[tuple[int, ...], list[int]] = {}
    for prompt in random_prompts(20 * BARE_PROMPTS, shortest=8, longest=48):
        request_id = bench.submit(prompt, None, OUTPUT_TOKENS, logprobs=2)
        outcome = bench.finish([request_id])[0]
        gaps = [known.top[0].logprob - known.top[1].logprob for known in outcome.logprobs]
        if min(gaps) >= SAFE_GAP:
            found[tuple(prompt)] = outcome.token_ids
        if len(found) == BARE_PROMPTS:
            break
    assert found, "every bare prompt has close logits"
    return found


def soak(
    size: str, *, seconds: float, num_deltas: int, room: int, in_flight: int, seed: int, least: int = 0
) -> Tally:
    """Run the soak; `problems` of the tally names what was wrong and what leaked."""
    backbone = random_backbone(size, "float32")
    head = head_of(backbone)
    largest = max(placed_bytes(signed_delta(backbone, head, i), backbone) for i in range(12))
    with InProcess(
        backbone,
        lambda digest: signed_delta(backbone, head, int(digest.removeprefix(PREFIX))),
        max_num_seqs=max(1, in_flight * 3 // 4),
        delta_bytes=room * largest,
        host_cache_bytes=2 * room * largest,
        max_num_batched_tokens=96,
    ) as bench:
        run = Soak(bench, bare_answers(bench), num_deltas, seed)
        run.run(seconds, in_flight, least)
        run.tally.problems += run.leaks() + memory_problems(run.tally.memory, seconds)
        return run.tally


def main(argv: Sequence[str]) -> None:
    """Soak, print the tally, and exit 1 where something was wrong."""
    parser = make_parser("soak", __doc__, rounds=1)
    parser.add_argument("--size", choices=SIZES, default="2m")
    duration = parser.add_mutually_exclusive_group()
    duration.add_argument("--seconds", type=float, default=60.0)
    duration.add_argument("--minutes", type=float)
    parser.add_argument("--deltas", type=int, default=64)
    parser.add_argument("--room", type=int, default=10, help="of the largest deltas that fit the device")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.minutes is not None:
        args.seconds = 60 * args.minutes
    torch.set_num_threads(args.threads)
    tally = soak(
        args.size, seconds=args.seconds, num_deltas=args.deltas, room=args.room,
        in_flight=args.in_flight, seed=args.seed,
    )  # fmt: skip
    publish(
        f"soak of {args.seconds:g} s, {args.deltas} deltas, room for {args.room}, {args.size} float32",
        shlex.join(["soak", *argv]),
        [_record(tally, args)],
        args.json,
    )
    for problem in tally.problems:
        sys.stderr.write(f"{problem}\n")
    if tally.problems or tally.wrong_tokens:
        sys.exit(1)


def _record(tally: Tally, args: argparse.Namespace) -> Record:
    memory = [used / 1e6 for _, used in tally.memory]
    values = {"resident MB": Spread.of(memory)}
    facts = {
        "requests": tally.requests,
        "tokens": tally.tokens,
        "wrong tokens": tally.wrong_tokens,
        "cancelled": tally.cancelled,
        "unloads": tally.unloaded,
        "refused while unloading": tally.refused,
        "MB a minute, second half": memory_slope(tally.memory) * 60 / 1e6,
        "limit": "not judged" if args.seconds < JUDGED_FROM_S else f"<= {FLAT_MB_A_MINUTE:g}",
        "problems": len(tally.problems),
        "verdict": "missed" if tally.problems or tally.wrong_tokens else "met",
    }
    return Record(f"{args.deltas} signed deltas", values, facts)
