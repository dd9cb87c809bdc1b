"""One row of the performance budgets: `python -m loadtest budget NAME`.

Names, and what each takes on two cores at the default options:
  decode    bare engine against transformers' static `generate`, 32 rows             (60m: 3 min)
  lora      32 distinct rank-16 LoRAs on q, k, v, o against bare rows                (160m: 2 min)
  mixed     6 methods, ranks 8-64, all linears, against bare rows and the floor      (160m: 6 min)
  loaded    bare rows while 32 deltas are loaded against none loaded                 (160m: 2 min)
  cold      TTFT that a delta in host memory adds, against one decode step           (60m: 1 min)
  overhead  the engine's own Python as a share of the step, 32 rows                  (60m: 30 s)
"""

from __future__ import annotations

import argparse
import random
import shlex
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from adapters.normal_form import Delta
from loadtest.backbones import SIZES, random_backbone, random_llama
from loadtest.deltas import METHODS, mixed_deltas, placed_bytes, random_lora
from loadtest.floor import measure_machine
from loadtest.inprocess import NO_DELTAS, PAUSE_S, InProcess
from loadtest.library import generate
from loadtest.profile import profile_records
from loadtest.report import Record, Spread, alternate, make_parser, publish, seconds
from loadtest.workload import random_prompts
from serving.model.backbone import Backbone

PROMPT_TOKENS = 64
MAX_OVER_FLOOR = 1.5
"""Most that mixed deltas may add to a step, against reading their weights once."""


def main(argv: Sequence[str]) -> None:
    """Measure one row."""
    parser = make_parser("budget", __doc__)
    parser.add_argument("name", choices=ROWS)
    parser.add_argument("--size", choices=SIZES, help="backbone (default: the budget's own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32, help="decode steps per round")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    default_size, measure = ROWS[args.name]
    args.size = args.size or default_size
    title = f"budget {args.name}: {args.size} {args.dtype}, {args.rows} rows, {args.threads} threads"
    records = measure(args)
    publish(f"{title}, median (min-max) of {args.rounds}", shlex.join(["budget", *argv]), records, args.json)


def _judged(label: str, values: Mapping[str, Spread], name: str, limit: float, *, most: bool) -> Record:
    """A record with its budget, the limit of the figure `name`, and whether the median keeps it."""
    median = values[name].median
    met = median <= limit if most else median >= limit
    budget = f"{name} {'<=' if most else '>='} {limit:g}"
    return Record(label, values, {"budget": budget, "verdict": "met" if met else "missed"})


def _decode(args: argparse.Namespace) -> list[Record]:
    """Equal lengths: the same steps on both sides. Ragged: a static batch waits for its longest request."""
    backbone = random_backbone(args.size, args.dtype)
    stock = random_llama(args.size, getattr(torch, args.dtype))
    equal = random_prompts(args.rows, shortest=PROMPT_TOKENS, longest=PROMPT_TOKENS)
    ragged = random_prompts(args.rows, shortest=PROMPT_TOKENS // 2, longest=2 * PROMPT_TOKENS)
    draw = random.Random(3)  # noqa: S311
    outputs = [draw.randint(args.steps // 4, 7 * args.steps // 4) for _ in ragged]
    bare = [None] * args.rows

    def ours_ragged(bench: InProcess) -> None:
        bench.finish([bench.submit(p, None, n) for p, n in zip(ragged, outputs, strict=True)])

    with InProcess(backbone, NO_DELTAS.__getitem__, max_num_seqs=args.rows) as bench:
        found = alternate(
            {
                "ours, step": lambda: bench.decode_step_s(equal, bare, args.steps),
                "generate, step": lambda: generate(stock, equal, args.steps + 1),
                "ours, ragged": lambda: seconds(lambda: ours_ragged(bench)),
                "generate, ragged": lambda: seconds(lambda: generate(stock, ragged, max(outputs))),
            },
            args.rounds,
        )
    steps = {
        "ours ms": _ms(found["ours, step"]),
        "generate ms": _ms(found["generate, step"]),
        "speedup": Spread.ratio(found["generate, step"], found["ours, step"]),
    }
    whole = {
        "ours ms": _ms(found["ours, ragged"]),
        "generate ms": _ms(found["generate, ragged"]),
        "speedup": Spread.ratio(found["generate, ragged"], found["ours, ragged"]),
    }
    return [
        _judged("decode step, equal lengths", steps, "speedup", 1.8, most=False),
        _judged(
            f"whole run, prompts {PROMPT_TOKENS // 2}-{2 * PROMPT_TOKENS}, outputs {min(outputs)}-{max(outputs)}",
            whole, "speedup", 1.8, most=False,
        ),
    ]  # fmt: skip


def _lora(args: argparse.Namespace) -> list[Record]:
    backbone = random_backbone(args.size, args.dtype)
    deltas = {f"lora-{i}": random_lora(backbone.spec, 16, i + 1) for i in range(args.rows)}
    return [_against_bare(args, backbone, deltas, f"{args.rows} rank-16 LoRAs on q, k, v, o", 0.90)]


def _mixed(args: argparse.Namespace) -> list[Record]:
    backbone = random_backbone(args.size, args.dtype)
    deltas = mixed_deltas(backbone.spec, args.rows)
    label = f"{args.rows} deltas of {', '.join(METHODS)}, ranks 8-64"
    return [_against_bare(args, backbone, deltas, label, 0.75)]


def _against_bare(
    args: argparse.Namespace, backbone: Backbone, deltas: Mapping[str, Delta], label: str, limit: float
) -> Record:
    """Decode throughput with one delta a row as a share of bare throughput, and the added time over its floor."""
    machine = measure_machine()
    num_bytes = sum(placed_bytes(delta, backbone) for delta in deltas.values())
    floor_s = machine.floor_s(num_bytes, 2 * num_bytes / 4)  # one multiply-add a weight and token
    prompts = random_prompts(args.rows)
    settings = {"max_num_seqs": args.rows, "delta_bytes": 4 * num_bytes + (64 << 20)}
    with InProcess(backbone, deltas.__getitem__, **settings) as bench:
        bench.generate(prompts, list(deltas), 1)  # loads
        found = alternate(
            {
                "bare": lambda: bench.decode_step_s(prompts, [None] * args.rows, args.steps),
                "deltas": lambda: bench.decode_step_s(prompts, list(deltas), args.steps),
            },
            args.rounds,
        )
    added = [a - b for a, b in zip(found["deltas"], found["bare"], strict=True)]
    values = {
        "bare ms": _ms(found["bare"]),
        "deltas ms": _ms(found["deltas"]),
        "ratio": Spread.ratio(found["bare"], found["deltas"]),
        "added ms": _ms(added),
        "added / floor": Spread.of([a / floor_s for a in added]),
    }
    record = _judged(label, values, "ratio", limit, most=False)
    facts = {
        "floor ms": floor_s * 1e3,
        "delta MB": num_bytes / 1e6,
        "GB/s": machine.bandwidth / 1e9,
        "GFLOP/s": machine.rate / 1e9,
    }
    judged = dict(record.facts)
    if args.name == "mixed":
        judged["budget"] = f"{judged['budget']}, added / floor <= {MAX_OVER_FLOOR:g}"
        if values["added / floor"].median > MAX_OVER_FLOOR:
            judged["verdict"] = "missed"
    return Record(label, values, {**judged, **facts})


def _loaded(args: argparse.Namespace) -> list[Record]:
    """Two engines over one backbone: one without deltas, one that has run one of each and keeps them."""
    backbone = random_backbone(args.size, args.dtype)
    deltas = mixed_deltas(backbone.spec, args.rows)
    prompts = random_prompts(args.rows)
    room = 4 * sum(placed_bytes(delta, backbone) for delta in deltas.values()) + (64 << 20)
    bare = [None] * args.rows
    with (
        InProcess(backbone, NO_DELTAS.__getitem__, max_num_seqs=args.rows) as without,
        InProcess(backbone, deltas.__getitem__, max_num_seqs=args.rows, delta_bytes=room) as holding,
    ):
        holding.generate(prompts, list(deltas), 1)
        found = alternate(
            {
                "none": lambda: without.decode_step_s(prompts, bare, args.steps),
                "loaded": lambda: holding.decode_step_s(prompts, bare, args.steps),
            },
            args.rounds,
        )
    values = {
        "none loaded ms": _ms(found["none"]),
        "loaded ms": _ms(found["loaded"]),
        "ratio": Spread.ratio(found["none"], found["loaded"]),
    }
    return [_judged(f"bare rows, {len(deltas)} deltas loaded", values, "ratio", 0.99, most=False)]


def _cold(args: argparse.Namespace) -> list[Record]:
    """One request beside rows that decode, through a delta that has just left the device, and once more."""
    backbone = random_backbone(args.size, args.dtype)
    deltas = {"lora": random_lora(backbone.spec, 16, 1)}
    room = 2 * placed_bytes(deltas["lora"], backbone)
    prompts = random_prompts(args.rows)
    extra = random_prompts(1, shortest=32, longest=32, seed=8)[0]
    with InProcess(backbone, deltas.__getitem__, max_num_seqs=args.rows, delta_bytes=room) as bench:
        bench.finish([bench.submit(extra, "lora", 1)])  # into host memory
        running = [bench.submit(p, None, 800) for p in prompts[: args.rows - 1]]
        while not all(bench.requests[i].token_ids for i in running):
            bench.step()
        before = bench.counter("deltamux_adapter_loads_total")
        step, warm, cold = [], [], []
        for _ in range(args.rounds):
            _leave_device(bench, "lora")
            cold.append(_ttft(bench, extra, "lora"))
            warm.append(_ttft(bench, extra, "lora"))
            step.append(seconds(bench.step))
        loads = bench.counter("deltamux_adapter_loads_total") - before
        assert loads == args.rounds, (loads, args.rounds)
        for request_id in running:
            bench.engine.cancel(request_id)
        bench.finish(running)
    added = [c - w for c, w in zip(cold, warm, strict=True)]
    values = {
        "warm TTFT ms": _ms(warm),
        "cold TTFT ms": _ms(cold),
        "added ms": _ms(added),
        "decode step ms": _ms(step),
        "added / step": Spread.ratio(added, step),
    }
    label = f"rank-16 LoRA on q, k, v, o beside {args.rows - 1} decoding rows"
    return [_judged(label, values, "added / step", 1.0, most=True)]


def _leave_device(bench: InProcess, digest: str) -> None:
    """Take an idle delta off the device, but not out of host memory."""
    residency = bench.engine.deltas.residency
    residency.start_release(digest)
    assert residency.finish_release(digest), digest
    bench.engine.runner.forget_programs()


def _ttft(bench: InProcess, prompt: Sequence[int], digest: str) -> float:
    request_id = bench.submit(prompt, digest, 1)
    while not bench.requests[request_id].ended:
        if not bench.step():
            time.sleep(PAUSE_S)
    return bench.finish([request_id])[0].ttft_s


def _overhead(args: argparse.Namespace) -> list[Record]:
    records = profile_records(
        args.size, args.dtype, rows=args.rows, num_deltas=args.rows, steps=args.steps, rounds=args.rounds
    )
    return [
        _judged(r.label, r.values, "%", 10, most=True) if r.label.startswith("own Python") else r
        for r in records
    ]


def _ms(values: Sequence[float]) -> Spread:
    return Spread.of([value * 1e3 for value in values])


ROWS: Mapping[str, tuple[str, Callable[[argparse.Namespace], list[Record]]]] = {
    "decode": ("60m", _decode),
    "lora": ("160m", _lora),
    "mixed": ("160m", _mixed),
    "loaded": ("160m", _loaded),
    "cold": ("60m", _cold),
    "overhead": ("60m", _overhead),
}
