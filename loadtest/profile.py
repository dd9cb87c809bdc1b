"""Where a decode step goes: schedule, build batch, compile programs, plan, forward, sample, emit, and our hooks.

The parts are timed from outside, by wrapping the engine's functions for the measured steps. Own Python is all of the
step but the forward pass, plus what our hooks cost inside of it: the site hooks (their cost a call, measured on a
module that does nothing, times the modules), and the Python around the kernels in attention and delta programs.
Sampling counts as own, although most of it is torch.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from adapters.backbone_spec import ModuleShape, ModuleSpec, Slice
from adapters.normal_form import Site
from loadtest.backbones import random_backbone
from loadtest.deltas import RANKS, random_lora
from loadtest.inprocess import InProcess
from loadtest.report import Record, Spread
from loadtest.workload import random_prompts
from serving.kernels.cpu import CpuBatch
from serving.kernels.cpu_attention import CpuDecodeAttention
from serving.model.context import ForwardContext, forward_context
from serving.model.kv_cache import SlotAttention
from serving.model.programs import ModuleProgram
from serving.model.sites import install_sites

PARTS = ("schedule", "build batch", "compile programs", "plan", "forward", "sample", "emit")
HOOK_CALLS = 20_000


class Timers:
    """Seconds by label, gathered by wrapped functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """`function`, its time added to `label`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[label] += time.perf_counter() - started

        return run

    @contextmanager
    def installed(self, bench: InProcess) -> Iterator[None]:
        """Time the parts of `bench`'s steps."""
        engine, runner = bench.engine, bench.engine.runner
        places = [
            (engine.scheduler, "schedule", "schedule"),
            ("serving.engine.runner", "build_batch", "build batch"),
            (runner, "_compile", "compile programs"),
            (runner.cache, "plan", "plan"),
            (runner.backbone, "forward", "forward"),
            (engine, "_sample", "sample"),
            (engine, "_advance", "emit"),
            (engine, "_flush", "emit"),
            (SlotAttention, "attend", "attention"),
            (CpuDecodeAttention, "attend", "attention kernel"),
            (CpuBatch, "_call", "delta kernels"),
            (ModuleProgram, "_general_output", "delta kernels"),
        ]
        with ExitStack() as stack:
            for owner, name, label in places:
                if isinstance(owner, str):
                    module = __import__(owner, fromlist=[name])
                    timed = self.timed(getattr(module, name), label)
                    stack.enter_context(patch.object(module, name, timed))
                else:
                    stack.enter_context(patch.object(owner, name, self.timed(getattr(owner, name), label)))
            stack.enter_context(patch.object(ModuleProgram, "run", self._program(ModuleProgram.run)))
            yield

    def _program(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(
            program: Any, context: Any, base: Callable[..., Any], x: Any, args: Any, kwargs: Any
        ) -> Any:
            started = time.perf_counter()
            out = run(program, context, self.timed(base, "base in programs"), x, args, kwargs)
            self.seconds["programs"] += time.perf_counter() - started
            return out

        return timed


def hook_seconds() -> float:
    """What a site hook without a program costs a call."""
    model = nn.Sequential(nn.Identity())
    bare = _call_seconds(model[0])
    shape = ModuleShape("layer", 1, 1, has_bias=False)
    site = ModuleSpec("0", None, (Slice(Site("layer.out", 0), 0, 1),), shape)
    install_sites(model, SimpleNamespace(modules=[site], kind="decoder"))  # type: ignore[arg-type]
    with forward_context(ForwardContext([None], attention=None)):  # type: ignore[arg-type]
        return max(0.0, _call_seconds(model[0]) - bare)


def _call_seconds(module: nn.Module) -> float:
    x = torch.zeros(1)
    started = time.perf_counter()
    for _ in range(HOOK_CALLS):
        module(x)
    return (time.perf_counter() - started) / HOOK_CALLS


def profile_records(
    size: str, dtype: str, *, rows: int, num_deltas: int, steps: int, rounds: int
) -> list[Record]:
    """Milliseconds and share of each part of a decode step, bare and with `num_deltas` LoRAs."""
    backbone = random_backbone(size, dtype)
    deltas = {
        f"lora-{i}": random_lora(backbone.spec, RANKS[i % len(RANKS)], i + 1) for i in range(num_deltas)
    }
    prompts = random_prompts(rows)
    digests = list(deltas)
    records: list[Record] = []
    with InProcess(backbone, deltas.__getitem__, max_num_seqs=rows, delta_bytes=8 << 30) as bench:
        for label, chosen in (
            ("bare", [None] * rows),
            (f"{num_deltas} LoRAs", [digests[i % num_deltas] for i in range(rows)] if digests else []),
        ):
            if not chosen:
                continue
            bench.generate(prompts, chosen, 1)
            found = [_one_round(bench, prompts, chosen, steps) for _ in range(rounds)]
            for part in found[0]:
                values = {
                    "ms": Spread.of([f[part] * 1e3 for f in found]),
                    "%": Spread.of([100 * f[part] / f["whole step"] for f in found]),
                }
                records.append(Record(f"{part}, {label}", values))
    return records


def _one_round(bench: InProcess, prompts: Any, digests: Any, steps: int) -> dict[str, float]:
    """Seconds a step by part."""
    timers = Timers()
    step = bench.engine.step

    def counted() -> bool:
        """Time steps in which every row decodes; earlier ones prefill."""
        if not all(outcome.token_ids for outcome in bench.requests.values()):
            return step()
        with timers.installed(bench):
            ran: bool = timers.timed(step, "whole step")()
        counted_steps[0] += ran
        return ran

    counted_steps = [0]
    with patch.object(bench.engine, "step", counted):
        bench.decode_step_s(prompts, digests, steps)
    per_step = {label: total / counted_steps[0] for label, total in timers.seconds.items()}
    sites = len(bench.engine.backbone.spec.modules) * hook_seconds()
    kernels = per_step.get("delta kernels", 0.0) + per_step.get("base in programs", 0.0)
    programs = max(0.0, per_step.get("programs", 0.0) - kernels)
    attention = 0.0
    if (
        "attention kernel" in per_step
    ):  # else torch's own attention, which can't be told from the Python around it
        attention = per_step["attention"] - per_step["attention kernel"]
    parts = {part: per_step[part] for part in PARTS}
    parts["rest of the step"] = per_step["whole step"] - sum(parts.values())
    parts["hooks: sites"] = sites
    parts["hooks: attention"] = attention
    parts["hooks: delta programs"] = programs
    hooks = sites + attention + programs
    parts["own Python"] = per_step["whole step"] - per_step["forward"] + hooks
    parts["whole step"] = per_step["whole step"]
    return parts
