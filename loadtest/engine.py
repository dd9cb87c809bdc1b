"""Tokens per second in process: our engine and PEFT's mixed batch on the same model, prompts and LoRAs.

Each round measures all four cases of one row count in turn, so that ratios compare neighbours in time. Greedy,
no stop token, prompts of 16 to 128 tokens; a figure counts generated tokens over the whole time, prefill included.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from prometheus_client import CollectorRegistry

from adapters.normal_form import Delta, LowRank, Site
from loadtest.backbones import TARGETS, name_of, random_llama, random_loras, random_prompts
from loadtest.report import Spread, publish
from serving.config import Engine as EngineSettings
from serving.core import Event, Request, SamplingParams, TokenEvent
from serving.engine.engine import Engine
from serving.metrics import EngineMetrics
from serving.model.backbone import adopt_backbone

CASES = ("ours bare", "ours LoRA", "PEFT bare", "PEFT LoRA")
SITES = {"q_proj": ("attn.x", "q.out"), "k_proj": ("attn.x", "k.out"), "v_proj": ("attn.x", "v.out"),
         "o_proj": ("ctx", "o.out")}  # fmt: skip


def run(
    *,
    size: str,
    dtype: str,
    row_counts: Sequence[int],
    output_tokens: int,
    rounds: int,
    threads: int,
    json_path: Path | None,
) -> None:
    """Measure, print the table, write the JSON."""
    torch.set_num_threads(threads)
    served = getattr(torch, dtype)
    most = max(row_counts)
    peft_model = random_loras(random_llama(size, served), most)
    backbone = adopt_backbone(random_llama(size, served), name=size, device="cpu", dtype=dtype)
    deltas = {name_of(i): _delta(peft_model, name_of(i), backbone.spec.digest) for i in range(most)}
    events: list[tuple[str, Event]] = []
    engine = Engine(
        backbone,
        deltas.__getitem__,
        events.extend,
        metrics=EngineMetrics(CollectorRegistry()),
        settings=EngineSettings(max_num_seqs=most, prefix_cache="off"),  # every round repeats its prompts
    )
    prompts = random_prompts(most, backbone.spec.vocab_size)
    table, figures = [], []
    for count in row_counts:
        chosen = prompts[:count]
        names = [name_of(i) for i in range(count)]
        bare: list[str | None] = [None] * count
        runs: dict[str, Callable[[], None]] = {
            "ours bare": partial(_ours, engine, events, chosen, bare, output_tokens),
            "ours LoRA": partial(_ours, engine, events, chosen, names, output_tokens),
            "PEFT bare": partial(_peft, peft_model, chosen, ["__base__"] * count, output_tokens),
            "PEFT LoRA": partial(_peft, peft_model, chosen, names, output_tokens),
        }
        for case in CASES:  # first use: allocations, loads of deltas
            runs[case]()
        speeds: dict[str, list[float]] = {case: [] for case in CASES}
        for _ in range(rounds):
            for case in CASES:
                started = time.perf_counter()
                runs[case]()
                speeds[case].append(count * output_tokens / (time.perf_counter() - started))
        ratios = {
            "LoRA/bare ours": _ratio(speeds, "ours LoRA", "ours bare"),
            "LoRA/bare PEFT": _ratio(speeds, "PEFT LoRA", "PEFT bare"),
            "ours/PEFT bare": _ratio(speeds, "ours bare", "PEFT bare"),
            "ours/PEFT LoRA": _ratio(speeds, "ours LoRA", "PEFT LoRA"),
        }
        spreads = {case: Spread.of(values) for case, values in speeds.items()}
        table.append(
            [str(count), *(s.text(0) for s in spreads.values()), *(r.text(2) for r in ratios.values())]
        )
        figures.append({"rows": count, "tokens_per_s": {c: asdict(s) for c, s in spreads.items()},
                        "ratios": {name: asdict(r) for name, r in ratios.items()}})  # fmt: skip
    columns = ["rows = LoRAs", *(f"{case} tok/s" for case in CASES), *ratios]
    publish(
        f"engine, {size} {dtype}, {threads} threads, median (min-max) of {rounds}",
        columns,
        table,
        figures,
        json_path,
    )


def _ratio(speeds: dict[str, list[float]], above: str, below: str) -> Spread:
    return Spread.of([a / b for a, b in zip(speeds[above], speeds[below], strict=True)])


def _delta(peft_model: Any, name: str, backbone_digest: str) -> Delta:
    """One of the model's LoRAs in normal form, straight from memory: this measures the engine, not the reader."""
    state = get_peft_model_state_dict(peft_model, adapter_name=name)
    config = peft_model.peft_config[name]
    ops = []
    for layer in range(peft_model.config.num_hidden_layers):
        for target in TARGETS:
            key = f"base_model.model.model.layers.{layer}.self_attn.{target}."
            read, write = SITES[target]
            ops.append(
                LowRank(
                    read=Site(read, layer),
                    write=Site(write, layer),
                    A=state[key + "lora_A.weight"].detach(),
                    B=state[key + "lora_B.weight"].detach(),
                    scaling=config.lora_alpha / config.r,
                )
            )
    return Delta(method="LORA", ops=tuple(ops), backbone_digest=backbone_digest)


def _ours(
    engine: Engine,
    events: list[tuple[str, Event]],
    prompts: Sequence[list[int]],
    digests: Sequence[str | None],
    output_tokens: int,
) -> None:
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    for index, (prompt, digest) in enumerate(zip(prompts, digests, strict=True)):
        engine.submit(
            Request(
                request_id=str(index),
                prompt_token_ids=tuple(prompt),
                sampling=sampling,
                adapter_digest=digest,
            )
        )
    generated = ended = 0
    while ended < len(prompts):
        if not engine.step():
            time.sleep(0.0005)  # a delta is being loaded
        for _, event in events:
            if isinstance(event, TokenEvent):
                assert event.error is None, event.error
                generated += len(event.token_ids)
                ended += event.finish_reason is not None
        events.clear()
    assert generated == len(prompts) * output_tokens, generated


@torch.inference_mode()
def _peft(model: Any, prompts: Sequence[list[int]], adapter_names: list[str], output_tokens: int) -> None:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            adapter_names=adapter_names,
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    assert out.shape[1] == longest + output_tokens, out.shape
