"""Kernel time: compiled row kernels and decode attention against plain torch and against the bandwidth floor.

  rows       T tokens through LowRanks of one linear layer: segment shapes and ranks
  crossover  compiled over plain torch by tokens per segment (1-64) and number of deltas: decides MAX_SEGMENT_TOKENS
  attention  32 rows of one new token each, by context length

A figure is the time of one module's call, averaged over as many modules with weights of their own as exceed the
processor's caches, so that weights come from memory as in a model. Floor: bytes of weights (or of keys and values) over
the read bandwidth measured in the same run. At the default options on two cores 3 minutes for each dtype.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loadtest.deltas import RANKS
from loadtest.floor import Machine, measure_machine
from loadtest.report import Record, Spread, alternate, make_parser, publish, seconds
from loadtest.workload import zipf_choices
from serving.kernels.cpu import CpuRows
from serving.kernels.cpu_attention import CpuDecodeAttention
from serving.kernels.ops import DecodeAttention, FusedSegment, LowRankSegment, LowRankWeights, PlacedModule
from serving.kernels.reference import ReferenceKernels
from serving.model.kv_cache import KVShape, RowSpan, SlotKVCache

COLD_BYTES = 128 << 20
MAX_MODULES = 2048
CROSSOVER_TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
HEADS = KVShape(num_layers=1, num_kv_heads=7, num_heads=14, head_dim=64)


class Span(NamedTuple):
    """Tokens [start, stop) of delta number `delta`."""

    start: int
    stop: int
    delta: int


def main(argv: Sequence[str]) -> None:
    """Measure the chosen parts."""
    parser = make_parser("kernels", __doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=("rows", "crossover", "attention"), default=["rows", "crossover", "attention"]
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"]
    )
    parser.add_argument("--width", type=int, default=896, help="input and output width of the linear layer")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of the batch in `rows`")
    parser.add_argument("--deltas", type=int, nargs="+", default=[1, 8, 32], help="for `crossover`")
    parser.add_argument("--rank", type=int, default=16, help="for `crossover`")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024], help="for `attention`")
    parser.add_argument("--cold-bytes", type=int, default=COLD_BYTES, help="weights to go round, in bytes")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    machine = measure_machine()
    measure = {"rows": _rows, "crossover": _crossover, "attention": _attention}
    records = [
        record
        for name in args.dtypes
        for part in args.parts
        for record in measure[part](args, getattr(torch, name), machine)
    ]
    title = (
        f"kernels, width {args.width}, {args.threads} threads, {machine.bandwidth / 1e9:.1f} GB/s,"
        f" median (min-max) of {args.rounds}"
    )
    publish(title, shlex.join(["kernels", *argv]), records, args.json)


def segment_shapes(tokens: int) -> dict[str, list[Span]]:
    """How a batch of decode rows spreads over deltas."""
    hot = max(1, tokens * 3 // 4)
    return {
        "identical": _spans([0] * tokens),
        "distinct": _spans(list(range(tokens))),
        "uniform": _spans([i // 4 for i in range(tokens)]),
        "zipf 1.5": _spans(sorted(zipf_choices(tokens, tokens, 1.5))),
        "skewed": _spans([0] * hot + list(range(1, tokens - hot + 1))),
        "empty": [],
    }


def _spans(owners: Sequence[int]) -> list[Span]:
    spans: list[Span] = []
    for token, owner in enumerate(owners):
        if spans and spans[-1].delta == owner:
            spans[-1] = Span(spans[-1].start, token + 1, owner)
        else:
            spans.append(Span(token, token + 1, owner))
    return spans


class Layers:
    """One batch at many modules, each with weights of its own for every delta."""

    def __init__(self, spans: Sequence[Span], ranks: Sequence[int], width: int, cold_bytes: int) -> None:
        per_module = sum(8 * width * ranks[span.delta % len(ranks)] for span in spans)
        self.num_bytes = per_module
        self.count = 0 if not spans else max(1, min(MAX_MODULES, -(-cold_bytes // per_module)))
        self.kernels, self.general = CpuRows(), ReferenceKernels()
        owned = {
            span.delta: [_low_rank(ranks[span.delta % len(ranks)], width) for _ in range(self.count)]
            for span in spans
        }
        self.segments = [
            [LowRankSegment(s.start, s.stop, owned[s.delta][i]) for s in spans] for i in range(self.count)
        ]
        encoded = {
            delta: self.kernels.encode(
                {i: PlacedModule(parallel=[w]) for i, w in enumerate(weights)}, {}, self.count
            )
            for delta, weights in owned.items()
        }
        self.bound = (
            self.kernels.bind([FusedSegment(s.start, s.stop, encoded[s.delta]) for s in spans])
            if spans
            else None
        )

    def compiled(self, y: Tensor, x: Tensor) -> float:
        """Seconds a module by the compiled kernels, in place in y's dtype."""
        if self.bound is None:
            return 0.0
        bound = self.bound
        return self._mean(lambda i: bound.run_output(i, y, x))

    def plain(self, y: Tensor, x: Tensor) -> float:
        """Seconds a module in plain torch, in fp32 and back, as a module program runs it."""

        def run(index: int) -> None:
            out = y.to(torch.float32)
            self.general.add_low_rank(out, x.to(torch.float32), self.segments[index])
            out.to(y.dtype)

        return self._mean(run)

    def _mean(self, run: Callable[[int], object]) -> float:
        return seconds(lambda: [run(i) for i in range(self.count)]) / max(1, self.count)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _low_rank(rank: int, width: int) -> LowRankWeights:
    return LowRankWeights(
        A=torch.randn(rank, width) / width**0.5, B=torch.randn(rank, width), scaling=0.01,
        activation="identity", a_bias=None, b_bias=None, start=0, stop=width,
    )  # fmt: skip


def _rows(args: argparse.Namespace, dtype: torch.dtype, machine: Machine) -> list[Record]:
    mixed: dict[str, Sequence[int]] = {str(rank): (rank,) for rank in RANKS}
    mixed["8-64"] = RANKS
    return [
        _compare(f"{shape}, rank {name}", Layers(spans, ranks, args.width, args.cold_bytes), args, dtype, machine)
        for shape, spans in segment_shapes(args.tokens).items()
        for name, ranks in mixed.items()
        if shape in ("distinct", "identical") or name == "8-64"
    ]  # fmt: skip


def _compare(
    label: str, layers: Layers, args: argparse.Namespace, dtype: torch.dtype, machine: Machine
) -> Record:
    x, y = torch.randn(args.tokens, args.width).to(dtype), torch.randn(args.tokens, args.width).to(dtype)
    if layers.count == 0:  # no module program exists, so nothing is called
        return Record(f"{label}, {_name(dtype)}", {"compiled us": Spread.of([0.0])}, {"floor us": 0.0})
    found = alternate(
        {"compiled": lambda: layers.compiled(y, x), "torch": lambda: layers.plain(y, x)}, args.rounds
    )
    return _record(f"{label}, {_name(dtype)}", found, machine.floor_s(layers.num_bytes, 0))


def _record(label: str, found: Mapping[str, Sequence[float]], floor_s: float) -> Record:
    values = {f"{case} us": Spread.of([v * 1e6 for v in times]) for case, times in found.items()}
    values["torch / compiled"] = Spread.ratio(found["torch"], found["compiled"])
    values["compiled / floor"] = Spread.of([v / floor_s for v in found["compiled"]])
    return Record(label, values, {"floor us": floor_s * 1e6})


def _crossover(args: argparse.Namespace, dtype: torch.dtype, machine: Machine) -> list[Record]:
    """Where torch wins for good: the fewest tokens per segment from which on compiled is never faster."""
    records = []
    for num_deltas in args.deltas:
        ratios: dict[int, float] = {}
        for tokens in CROSSOVER_TOKENS:
            spans = [Span(i * tokens, (i + 1) * tokens, i) for i in range(num_deltas)]
            layers = Layers(spans, (args.rank,), args.width, args.cold_bytes)
            x = torch.randn(num_deltas * tokens, args.width).to(dtype)
            y = torch.randn(num_deltas * tokens, args.width).to(dtype)
            found = alternate(
                {"compiled": lambda: layers.compiled(y, x), "torch": lambda: layers.plain(y, x)},  # noqa: B023
                args.rounds,
            )
            label = f"{num_deltas} deltas of {tokens} tokens, {_name(dtype)}"
            records.append(_record(label, found, machine.floor_s(layers.num_bytes, 0)))
            ratios[tokens] = records[-1].values["torch / compiled"].median
        slower = [n for n in CROSSOVER_TOKENS if all(ratios[m] < 1 for m in CROSSOVER_TOKENS if m >= n)]
        found_at = str(slower[0]) if slower else f"above {CROSSOVER_TOKENS[-1]}"
        records.append(
            Record(f"crossover, {num_deltas} deltas, {_name(dtype)}", {}, {"torch is faster from": found_at})
        )
    return records


def _attention(args: argparse.Namespace, dtype: torch.dtype, machine: Machine) -> list[Record]:
    longest = max(args.contexts) + 1
    cases = {str(context): [context] * args.tokens for context in args.contexts}
    low = min(args.contexts)
    cases[f"{low}-{longest - 1}"] = [
        low + (longest - 1 - low) * i // max(1, args.tokens - 1) for i in range(args.tokens)
    ]
    caches = {
        "compiled": _cache(args, dtype, longest, CpuDecodeAttention()),
        "torch": _cache(args, dtype, longest, None),
    }
    query = torch.randn(1, HEADS.num_heads, args.tokens, HEADS.head_dim).to(dtype)
    new = torch.randn(1, HEADS.num_kv_heads, args.tokens, HEADS.head_dim).to(dtype)
    records = []
    for label, past in cases.items():
        rows = [RowSpan(i, i + 1, i, p) for i, p in enumerate(past)]

        def attend(cache: SlotKVCache, rows: list[RowSpan] = rows) -> float:
            plan = cache.plan(rows)
            plan.attend(0, query, new, new, 0.125)  # masks of the plan, which all layers share
            return seconds(lambda: plan.attend(0, query, new, new, 0.125))

        found = alternate(
            {name: (lambda cache=cache: attend(cache)) for name, cache in caches.items()},  # type: ignore[misc]
            args.rounds,
        )
        num_bytes = sum(past) * 2 * HEADS.num_kv_heads * HEADS.head_dim * dtype.itemsize
        records.append(
            _record(
                f"attention, {args.tokens} rows, context {label}, {_name(dtype)}",
                found,
                machine.floor_s(num_bytes, 0),
            )
        )
    return records


def _cache(
    args: argparse.Namespace, dtype: torch.dtype, max_len: int, decode: DecodeAttention | None
) -> SlotKVCache:
    cache = SlotKVCache(
        HEADS, num_slots=args.tokens, max_len=max_len, dtype=dtype, device=torch.device("cpu"), decode=decode
    )
    for pool in (*cache.keys, *cache.values):
        pool.normal_()
    return cache
