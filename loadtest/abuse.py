"""One tenant at ten times its share, by scheduling policy.

8 tenants share one engine in this process, each with deltas of its own. Seven of them arrive at half their share of
what the engine can do (Poisson), one at ten times its share, which is more than the engine has. Every round plays the
same arrivals three times: the seven alone, all under `fair`, all under `first_come`.

  TTFT           of the seven, from arrival to first token; the budget is a p99 of at most 1.5 times that of alone
  service gap    two tenants with requests waiting all the time, one with ten times as many as the other: how far their
                 weighted tokens (1 a prompt token, 2 a generated one) drift apart, at most, over any interval
  bound          what virtual token counters promise for that gap: 2 max(1 L, 2 M), L the longest prompt and M the most
                 tokens that a running batch holds (Sheng et al., arXiv 2401.00588, theorem 4.4)

Duration: rounds + 1 times about 6 times --seconds.
"""

from __future__ import annotations

import argparse
import random
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch

from adapters.normal_form import Delta
from loadtest.backbones import SIZES, random_backbone
from loadtest.deltas import random_lora
from loadtest.inprocess import PAUSE_S, InProcess
from loadtest.report import Record, Spread, alternate, make_parser, percentile, publish
from loadtest.workload import VOCAB_SIZE, gamma_times
from serving.engine.scheduler import OUTPUT_COST
from serving.model.backbone import Backbone

ABUSER, RIVAL = "abuser", "rival"
QUIET = 7
QUIET_SHARE, ABUSE = 0.5, 10.0
"""Of a tenant's fair share of the engine's speed: what the others ask for, and the abuser."""
DELTAS_EACH = 2
RANK = 8
PROMPTS, OUTPUTS = (16, 96), (16, 64)
"""Shortest and longest, tokens."""
BACKLOG, RIVAL_BACKLOG = 40, 4
POLICIES = ("fair", "first_come")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a plan."""

    at_s: float
    tenant: str
    prompt: tuple[int, ...]
    digest: str
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """One play of a plan: seconds to the first token of each quiet request, and the weighted service by tenant."""

    waits_s: list[float]
    service: Mapping[str, float]
    seconds: float


def main(argv: Sequence[str]) -> None:
    """Measure both policies."""
    parser = make_parser("abuse", __doc__)
    parser.add_argument("--size", choices=SIZES, default="2m")
    parser.add_argument("--rows", type=int, default=32, help="requests in one batch")
    parser.add_argument("--seconds", type=float, default=8.0, help="arrivals of one play")
    parser.add_argument("--turns", type=int, default=600, help="steps of the two backlogged tenants")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    backbone = random_backbone(args.size, "float32")
    with _bench(backbone, "fair", args.rows) as fair, _bench(backbone, "first_come", args.rows) as plain:
        records = _measure({"fair": fair, "first_come": plain}, args)
    title = (
        f"one of {QUIET + 1} tenants at {ABUSE:g} times its share, {args.rows} rows, {args.size} float32,"
        f" {args.threads} threads, median (min-max) of {args.rounds}"
    )
    publish(title, shlex.join(["abuse", *argv]), records, args.json)


def _bench(backbone: Backbone, policy: str, rows: int) -> InProcess:
    def load(digest: str) -> Delta:
        return random_lora(backbone.spec, RANK, int(digest.rpartition("-")[2]) + 1)

    return InProcess(backbone, load, max_num_seqs=rows, scheduling=policy)


def _measure(benches: Mapping[str, InProcess], args: argparse.Namespace) -> list[Record]:
    speed = _requests_per_s(benches["fair"], args.rows)
    share = speed / (QUIET + 1)
    turns = count()

    def play(policy: str, *, abused: bool) -> Run:
        plan = _plan(share, args.seconds, abused=abused, seed=next(turns) // 3)
        return _play(benches[policy], plan)

    cases = {"alone": partial(play, "fair", abused=False)}
    cases |= {policy: partial(play, policy, abused=True) for policy in POLICIES}
    found = alternate(cases, args.rounds)
    alone = [percentile(run.waits_s, 99) for run in found["alone"]]
    bound = 2 * max(PROMPTS[1], OUTPUT_COST * args.rows * (PROMPTS[1] + OUTPUTS[1]))
    gaps = alternate({p: partial(_gap, benches[p], args.turns) for p in POLICIES}, args.rounds)
    records = [Record("the seven alone", _waits(found["alone"], alone), {"requests/s": speed})]
    for policy in POLICIES:
        runs = found[policy]
        values = _waits(runs, alone)
        values["abuser's share of the service"] = Spread.of(
            [run.service[ABUSER] / sum(run.service.values()) for run in runs]
        )
        values["service gap"] = Spread.of(gaps[policy])
        held = values["p99 / alone"].median <= 1.5
        facts = {
            "bound of the gap": bound,
            "gap within it": "yes" if values["service gap"].high <= bound else "no",
            "budget": "p99 / alone <= 1.5",
            "verdict": "met" if held else "missed",
        }
        records.append(Record(policy, values, facts))
    return records


def _waits(runs: Sequence[Run], alone: Sequence[float]) -> dict[str, Spread]:
    p99 = [percentile(run.waits_s, 99) for run in runs]
    return {
        "TTFT p50 ms": Spread.of([percentile(run.waits_s, 50) * 1e3 for run in runs]),
        "TTFT p99 ms": Spread.of([wait * 1e3 for wait in p99]),
        "p99 / alone": Spread.ratio(p99, alone),
    }


def _request(draw: random.Random, at_s: float, tenant: str, place: int) -> Ask:
    prompt = tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(*PROMPTS)))
    digest = f"{tenant}-{place * DELTAS_EACH + draw.randrange(DELTAS_EACH)}"
    return Ask(at_s, tenant, prompt, digest, draw.randint(*OUTPUTS))


def _plan(share: float, seconds: float, *, abused: bool, seed: int) -> list[Ask]:
    """Arrivals of `seconds`, in order; the quiet tenants' are the same with and without the abuser."""
    rates = {f"quiet-{i}": QUIET_SHARE * share for i in range(QUIET)} | {ABUSER: ABUSE * share}
    asks = []
    for place, (tenant, rate) in enumerate(rates.items()):
        draw = random.Random(1000 * seed + place)  # noqa: S311
        times = gamma_times(max(2, int(rate * seconds * 1.5)), rate, 1.0, seed=1000 * seed + place)
        planned = [_request(draw, at, tenant, place) for at in times if at < seconds]
        asks += planned if abused or tenant != ABUSER else []
    return sorted(asks, key=lambda ask: ask.at_s)


def _play(bench: InProcess, plan: Sequence[Ask]) -> Run:
    """The plan at its own times until the last quiet request has its first token; the rest is cancelled."""
    started = time.perf_counter()
    ids: dict[str, Ask] = {}
    waiting = list(reversed(plan))
    quiet: set[str] = set()
    while waiting or quiet:
        while waiting and waiting[-1].at_s <= time.perf_counter() - started:
            ask = waiting.pop()
            at = started + ask.at_s
            request_id = bench.submit(
                ask.prompt, ask.digest, ask.output_tokens, arrived=at, tenant=ask.tenant
            )
            ids[request_id] = ask
            if ask.tenant != ABUSER:
                quiet.add(request_id)
        if not bench.step():
            time.sleep(PAUSE_S)
        quiet = {i for i in quiet if not bench.requests[i].token_ids}
    took = time.perf_counter() - started
    service = dict.fromkeys((ask.tenant for ask in plan), 0.0)
    for request_id, ask in ids.items():
        service[ask.tenant] += _service(bench, request_id, ask)
    waits = [bench.requests[i].ttft_s for i, ask in ids.items() if ask.tenant != ABUSER]
    _clear(bench, list(ids))
    return Run(waits, service, took)


def _gap(bench: InProcess, steps: int) -> float:
    """How far the service of two tenants with a backlog drifts apart over `steps` steps, in weighted tokens."""
    draw = random.Random(0)  # noqa: S311
    backlogs = {ABUSER: BACKLOG, RIVAL: RIVAL_BACKLOG}
    live: dict[str, Ask] = {}
    done = dict.fromkeys(backlogs, 0.0)
    drift: list[float] = []
    for _ in range(steps):
        for place, (tenant, backlog) in enumerate(backlogs.items()):
            fresh = sum(ask.tenant == tenant and not bench.requests[i].token_ids for i, ask in live.items())
            for _ in range(backlog - fresh):
                ask = _request(draw, 0.0, tenant, place)
                live[bench.submit(ask.prompt, ask.digest, ask.output_tokens, tenant=tenant)] = ask
        if not bench.step():
            time.sleep(PAUSE_S)
        total = dict(done)
        for request_id, ask in list(live.items()):
            served = _service(bench, request_id, ask)
            total[ask.tenant] += served
            if bench.requests[request_id].ended:
                done[ask.tenant] += served
                bench.finish([request_id])
                del live[request_id]
        drift.append(total[ABUSER] - total[RIVAL])
    _clear(bench, list(live))
    return max(drift) - min(drift)


def _service(bench: InProcess, request_id: str, ask: Ask) -> float:
    made = len(bench.requests[request_id].token_ids)
    return len(ask.prompt) + OUTPUT_COST * made if made else 0.0


def _clear(bench: InProcess, ids: Sequence[str]) -> None:
    for request_id in ids:
        bench.engine.cancel(request_id)
    bench.finish(ids)


def _requests_per_s(bench: InProcess, rows: int) -> float:
    """What the engine can do with as many requests in flight as it has rows."""
    draw = random.Random(0)  # noqa: S311
    asks = [_request(draw, 0.0, f"quiet-{i % QUIET}", i % QUIET) for i in range(8 * rows)]
    took = 0.0
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        bench.finish([bench.submit(a.prompt, a.digest, a.output_tokens, tenant=a.tenant) for a in asks])
        took = time.perf_counter() - started
    return len(asks) / took
