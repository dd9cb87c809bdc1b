"""Tokens per second in process: our engine and PEFT's mixed batch on the same model, prompts and LoRAs.

For each concurrency and number of deltas, rows take the deltas in turn, and successive rounds go on where the last one
stopped, so that one row with 32 deltas meets another delta each round. Greedy, no stop token, prompts of 16 to 128
tokens, LoRAs of ranks 8, 16, 32, 64 on q, k, v, o; a figure counts generated tokens over the whole time, prefill
included. With 0 deltas PEFT's adapters are switched off.

--profile instead prints where a decode step goes and what of it is our own Python.

At the default options on two cores: 60m 20 minutes, 160m 50; --profile 1 minute.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from peft import get_peft_model_state_dict

from adapters.normal_form import Delta, LowRank, Site
from loadtest.backbones import SIZES, TARGETS, name_of, random_backbone, random_llama, random_loras
from loadtest.inprocess import InProcess
from loadtest.library import generate
from loadtest.profile import profile_records
from loadtest.report import Record, Spread, alternate, make_parser, publish, seconds
from loadtest.workload import random_prompts

SITES = {"q_proj": ("attn.x", "q.out"), "k_proj": ("attn.x", "k.out"), "v_proj": ("attn.x", "v.out"),
         "o_proj": ("ctx", "o.out")}  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Measure the table, or the profile."""
    parser = make_parser("engine", __doc__)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--deltas", type=int, nargs="+", default=[0, 1, 8, 32])
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--profile", action="store_true", help="where a decode step goes, and nothing else")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.profile:
        title = f"profile of a decode step, {max(args.concurrency)} rows"
        records = profile_records(
            args.size,
            args.dtype,
            rows=max(args.concurrency),
            num_deltas=max(args.deltas),
            steps=args.output_tokens,
            rounds=args.rounds,
        )
    else:
        title = f"engine and PEFT's mixed batch, outputs of {args.output_tokens}"
        records = _table(args)
    title += f", {args.size} {args.dtype}, {args.threads} threads, median (min-max) of {args.rounds}"
    publish(title, shlex.join(["engine", *argv]), records, args.json)


def _table(args: argparse.Namespace) -> list[Record]:
    most = max(args.deltas)
    library = random_llama(args.size, getattr(torch, args.dtype))
    if most:
        library = random_loras(library, most)
    backbone = random_backbone(args.size, args.dtype)
    deltas = {name_of(i): _delta(library, name_of(i), backbone.spec.digest) for i in range(most)}
    records = []
    room = 8 * sum(delta.size_bytes for delta in deltas.values()) + (64 << 20)
    with InProcess(
        backbone, deltas.__getitem__, max_num_seqs=max(args.concurrency), delta_bytes=room
    ) as bench:
        if most:
            bench.generate(random_prompts(most), list(deltas), 1)  # loads
        for rows in args.concurrency:
            for num_deltas in args.deltas:
                label = f"{rows} in flight, {num_deltas} deltas"
                records.append(Record(label, _point(bench, library, rows, num_deltas, args)))
    return records


def _point(
    bench: InProcess, library: Any, rows: int, num_deltas: int, args: argparse.Namespace
) -> dict[str, Spread]:
    """Both sides with deltas and, in the same rounds, bare."""
    prompts = random_prompts(rows)
    bare: list[str | None] = [None] * rows
    turns = {"ours": count(), "PEFT": count()}

    def names(side: str) -> list[str | None]:
        turn = next(turns[side])
        return [name_of((turn * rows + i) % num_deltas) for i in range(rows)]

    def ours(chosen: list[str | None]) -> float:
        return _speed(lambda: bench.generate(prompts, chosen, args.output_tokens), rows, args)

    def peft(chosen: list[str | None]) -> float:
        given = chosen if args.deltas != [0] else None
        return _speed(lambda: generate(library, prompts, args.output_tokens, adapter_names=given), rows, args)

    cases: dict[str, Callable[[], float]] = {"ours bare": lambda: ours(bare), "PEFT bare": lambda: peft(bare)}
    if num_deltas:
        cases |= {"ours": lambda: ours(names("ours")), "PEFT": lambda: peft(names("PEFT"))}
    found = alternate(cases, args.rounds)
    values = {f"{case} tok/s": Spread.of(speeds) for case, speeds in found.items()}
    values["ours/PEFT bare"] = Spread.ratio(found["ours bare"], found["PEFT bare"])
    if num_deltas:
        values["ours/PEFT"] = Spread.ratio(found["ours"], found["PEFT"])
        values["deltas/bare ours"] = Spread.ratio(found["ours"], found["ours bare"])
        values["deltas/bare PEFT"] = Spread.ratio(found["PEFT"], found["PEFT bare"])
    return values


def _speed(work: Callable[[], object], rows: int, args: argparse.Namespace) -> float:
    return rows * int(args.output_tokens) / seconds(work)


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
