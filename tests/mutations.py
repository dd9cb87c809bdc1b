"""Uploads with one thing changed: each is refused by name, or provably means what its files still say.

    python -m tests.mutations [--cases 20000] [--seed 0] [--only NUMBER]

Sources are all adapters of `tests/cases.py`, as PEFT and AdapterHub saved them. A mutant may be accepted only where
its delta equals the source's (`same`: an inert key, a superfluous copy) or is the one that the changed files describe
(`as stored`: tensors rounded to another float type, layers exchanged as a whole). Everything else must be refused with
a message that names the changed thing. Exit status 1 where one is neither, or where a reader fails otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.canonical import to_canonical
from adapters.errors import InvalidDelta, PayloadTooLarge
from adapters.formats import read_upload
from adapters.normal_form import AttnPrefix, Delta, Site
from tests.cases import (
    ENCODER_GOLDEN_CASES,
    GOLDEN_CASES,
    GOLDEN_NAME,
    PEFT_CASES,
    Case,
    GoldenCase,
    case_id,
    spec_of,
    tiny_backbone,
)
from tests.families import Encoder, Family

CONFIG = "adapter_config.json"
# A source per way of storing things, for the default tests; the command takes all.
FEW = (
    "llama-lora_all_linear",
    "gpt2-lora_bias_all",
    "gpt2-dora",
    "llama-alora",
    "llama-ia3",
    "gpt2-saved_embedding",
    "llama-shira",
    "llama-vera",
    "gpt2-trainable_tokens",
    "gpt2-prompt",
    "llama-prefix",
    "hub-llama-seq_bn",
    "hub-gpt2-double_seq_bn",
    "hub-llama-par_bn_channel",
    "hub-gpt2-lora_everywhere",
    "hub-llama-loreft",
    "hub-llama-mam",
    "hub-llama-compacterpp_shared_w",
    "hub-bert-seq_bn_mh",
)
KEYS_START = "base_model.model."
PREFIXES = ("x", "module", "base_model", "base_model.model")
FLOATS = (torch.float16, torch.bfloat16)
OTHER_TYPES = (
    torch.float64,
    torch.int32,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
)
SIZES = (
    "r",
    "init_r",
    "num_virtual_tokens",
    "token_dim",
    "num_layers",
    "num_attention_heads",
    "block_size",
    "oft_block_size",
    "boft_block_size",
    "boft_block_num",
    "num_vectors",
    "vector_length",
    "theta_d_length",
    "num_ranks",
    "num_tasks",
    "n_skills",
    "n_splits",
    "gralora_k",
    "hybrid_r",
    "mini_r",
    "adapter_len",
    "adapter_layers",
    "reduction_factor",
    "prefix_length",
    "bottleneck_size",
    "phm_rank",
)
NONSENSE: tuple[object, ...] = ("nonsense", {"nonsense": {}}, [None], -3, 10**400, "x\u202ey")

Config = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """One adapter as its library saved it, the backbone it belongs to and what it means."""

    name: str
    spec: BackboneSpec
    tensors_file: str
    config: bytes
    tensors: bytes
    meaning: Delta

    @property
    def files(self) -> tuple[Config, Tensors]:
        """Config and tensors, to be changed at will."""
        return json.loads(self.config), load(self.tensors)


@dataclass
class Mutant:
    """The changed files, a word for the change, and what a refusal may call it (any of `names`).

    `may_be_idle`: it may also be accepted and change nothing. `meant`: whether a delta is the one that the changed
    files describe, where they still describe one; None where they do not.
    """

    what: str
    names: tuple[str, ...]
    config: bytes
    tensors: bytes
    may_be_idle: bool = False
    meant: Callable[[Delta], bool] | None = None


@dataclass
class Report:
    """Outcomes per kind of mutation, and what went wrong."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


# ---- sources ------------------------------------------------------------------------------------------------------

GOLDENS = (*GOLDEN_CASES, *ENCODER_GOLDEN_CASES)
CASES: Mapping[str, Case | GoldenCase] = {
    **{case_id(case): case for case in PEFT_CASES},
    **{f"hub-{case_id(case)}": case for case in GOLDENS},
}


@cache
def _spec(family: Family) -> BackboneSpec:
    return spec_of(tiny_backbone(family), "tiny-base")


@cache
def _golden_spec(family: Family | Encoder) -> BackboneSpec:
    return spec_of(next(case for case in GOLDENS if case.family == family).backbone(), GOLDEN_NAME)


@cache
def source(name: str) -> Source:
    """The adapter of this name, trained and saved when it is first asked for."""
    case = CASES[name]
    if isinstance(case, GoldenCase):
        file, spec = "adapter.safetensors", _golden_spec(case.family)
        config, tensors = ((case.directory / part).read_bytes() for part in (CONFIG, file))
    else:
        file, spec = "adapter_model.safetensors", _spec(case.family)
        with TemporaryDirectory() as directory:
            case.save(Path(directory))
            config, tensors = ((Path(directory) / part).read_bytes() for part in (CONFIG, file))
    return Source(name, spec, file, config, tensors, read_upload({CONFIG: config, file: tensors}, spec))


# ---- mutations ----------------------------------------------------------------------------------------------------


def _mutant(what: str, names: Sequence[str], config: Config, tensors: Tensors, **accepted: Any) -> Mutant:
    return Mutant(what, tuple(names), json.dumps(config).encode(), save(tensors), **accepted)


def _names(key: str, spec: BackboneSpec) -> tuple[str, ...]:
    """What a message may call the tensor `key`: the key itself, its end, or the module that it belongs to."""
    ends = {key.removeprefix(start) for start in (KEYS_START, "base_model.")}
    starts = {".".join(end.split(".")[:stop]) for end in ends for stop in range(1, end.count(".") + 2)}
    return (key, *ends, *(f"'{path}'" for path in starts if path in spec.by_path))


def drop(origin: Source, draw: random.Random) -> Mutant:
    """A tensor is not there."""
    config, tensors = origin.files
    key = draw.choice(sorted(tensors))
    del tensors[key]
    return _mutant(f"drop {key}", _names(key, origin.spec), config, tensors, may_be_idle=True)


def duplicate(origin: Source, draw: random.Random) -> Mutant:
    """A tensor or a config key is there twice, under one name or two."""
    config, tensors = origin.files
    key = draw.choice(sorted(tensors))
    match draw.randrange(4):
        case 0:
            config_key = draw.choice(sorted(config))
            text = f"{json.dumps(config)[:-1]}, {json.dumps(config_key)}: {json.dumps(config[config_key])}}}"
            return Mutant(f"config key {config_key} twice", (config_key,), text.encode(), origin.tensors)
        case 1:
            length = int.from_bytes(origin.tensors[:8], "little")
            header = origin.tensors[8 : 8 + length].decode().rstrip()
            again = f"{header[:-1]},{json.dumps(key)}:{json.dumps(json.loads(header)[key])}}}".encode()
            again += b" " * (-len(again) % 8)
            data = len(again).to_bytes(8, "little") + again + origin.tensors[8 + length :]
            return Mutant(f"header entry {key} twice", _names(key, origin.spec), origin.config, data)
        case 2:
            copy = re.sub(r"\.(\d+)\.", lambda m: f".{int(m[1]) + draw.choice((3, 7, 100))}.", key, count=1)
            copy = copy if copy != key else f"{key}.copy"
        case _:
            copy = draw.choice(
                (f"{key}.copy", f"{key}.weight", f"copy.{key}", key.replace(".weight", ".bias"))
            )
            copy = copy if copy not in tensors else f"{key}_copy"
    tensors[copy] = tensors[key].clone()
    return _mutant(f"{key} again as {copy}", _names(copy, origin.spec), config, tensors)


def rename(origin: Source, draw: random.Random) -> Mutant:
    """A tensor has another name."""
    config, tensors = origin.files
    key = draw.choice(sorted(tensors))
    at = draw.randrange(len(key))
    other = draw.choice(
        (
            f"{key}_",
            f"{draw.choice(PREFIXES)}.{key}",
            key[:at] + chr(97 + (ord(key[at]) + draw.randrange(1, 20)) % 26) + key[at + 1 :],
            key.replace(".weight", ".default.weight") if ".weight" in key else f"{key}.default",
            key[:at] + key[at + 1 :],
            key.upper(),
        )
    )
    if other in ("", key) or other in tensors:
        other = f"{key}x"
    tensors[other] = tensors.pop(key)
    names = (*_names(other, origin.spec), *_names(key, origin.spec), repr(other))
    return _mutant(f"{key} as {other!r}", names, config, tensors)


def reshape(origin: Source, draw: random.Random) -> Mutant | None:
    """A tensor has another shape."""
    config, tensors = origin.files
    key = draw.choice(sorted(tensors))
    tensor = tensors[key]
    changed = draw.choice(
        (
            torch.cat([tensor, tensor[:1]]),
            tensor[:-1],
            tensor[None],
            tensor.reshape(-1),
            tensor.mT if tensor.dim() > 1 else tensor[:, None],
            tensor[..., :0],
            torch.cat([tensor, tensor], dim=-1),
            torch.zeros(()),
        )
    )
    if changed.shape == tensor.shape:  # a square or a vector
        return None
    tensors[key] = changed.clone().contiguous()
    return _mutant(
        f"{key} {list(tensor.shape)} to {list(changed.shape)}", _names(key, origin.spec), config, tensors
    )


def retype(origin: Source, draw: random.Random) -> Mutant | None:
    """A tensor has another dtype; a smaller float is a rounded tensor, and read as such."""
    config, tensors = origin.files
    key = draw.choice(sorted(tensors))
    old, dtype = tensors[key], draw.choice((*FLOATS, *OTHER_TYPES))
    if old.dtype == dtype:
        return None
    tensors[key] = old.to(dtype)
    what = f"{key} to {dtype}"
    if dtype not in FLOATS or not old.dtype.is_floating_point:
        idle = torch.equal(tensors[key].double(), old.double())  # the same indices in wider integers
        return _mutant(what, _names(key, origin.spec), config, tensors, may_be_idle=idle)
    plain = {**tensors, key: tensors[key].to(old.dtype)}
    files = {CONFIG: origin.config, origin.tensors_file: save(plain)}

    def meant(delta: Delta) -> bool:
        return _tensors_of(delta) == _tensors_of(read_upload(files, origin.spec))

    return _mutant(what, _names(key, origin.spec), config, tensors, may_be_idle=True, meant=meant)


def nan(origin: Source, draw: random.Random) -> Mutant | None:
    """A tensor has a value that is not finite."""
    config, tensors = origin.files
    key = draw.choice(sorted(tensors))
    if not (tensors[key].dtype.is_floating_point and tensors[key].numel()):
        return None
    value = draw.choice((float("nan"), float("inf"), float("-inf")))
    tensors[key].view(-1)[draw.randrange(tensors[key].numel())] = value
    return _mutant(f"{value} in {key}", _names(key, origin.spec), config, tensors)


def swap_tensors(origin: Source, draw: random.Random) -> Mutant | None:
    """Two tensors of different shapes have each other's name."""
    config, tensors = origin.files
    key = draw.choice(sorted(tensors))
    others = [other for other in sorted(tensors) if tensors[other].shape != tensors[key].shape]
    if not others:
        return None
    other = draw.choice(others)
    tensors[key], tensors[other] = tensors[other], tensors[key]
    names = (*_names(key, origin.spec), *_names(other, origin.spec))
    return _mutant(f"{key} and {other} exchanged", names, config, tensors)


def swap_layers(origin: Source, draw: random.Random) -> Mutant | None:
    """Two layers have each other's tensors; the result is an adapter like any other, with its layers exchanged."""
    config, tensors = origin.files
    one, other = draw.sample(range(origin.spec.num_layers + 1), 2)
    turned = {one: other, other: one}

    def moved(match: re.Match[str]) -> str:
        return f".{turned.get(int(match[1]), int(match[1]))}."

    new = {re.sub(r"\.(\d+)\.", moved, key, count=1): tensor for key, tensor in tensors.items()}
    if new.keys() == tensors.keys() and all(torch.equal(new[key], tensors[key]) for key in new):
        return None
    names = tuple(name for key in new.keys() | tensors.keys() for name in _names(key, origin.spec))

    def meant(delta: Delta) -> bool:
        return _tensors_of(delta) == _tensors_of(origin.meaning, turned)

    return _mutant(f"layers {one} and {other} exchanged", names, config, new, meant=meant)


def another_base(origin: Source, draw: random.Random) -> Mutant:
    """The config says that another model was adapted."""
    config, tensors = origin.files
    claims: dict[str, object] = {"base_model_name_or_path": f"org/other-{draw.randrange(99)}"}
    if "model_name" in config:
        claims = {"model_name": "org/other", "model_type": "opt", "hidden_size": config["hidden_size"] + 8}
    elif "token_dim" in config:
        claims |= {"token_dim": 4096, "num_layers": 99, "num_attention_heads": 77}
    key = draw.choice(sorted(claims))
    config[key] = claims[key]
    return _mutant(f"{key} = {claims[key]}", (key,), config, tensors)


def unknown_key(origin: Source, draw: random.Random) -> Mutant:
    """The config has a key that nobody knows."""
    config, tensors = origin.files
    inner = config["config"] if isinstance(config.get("config"), dict) and draw.random() < 0.5 else config
    old = draw.choice(sorted(inner))
    key = draw.choice((f"{old}s", f"_{old}", old.upper(), "".join(draw.choices("abc_xyz", k=9))))
    inner[key] = draw.choice((None, 0, False, True, [], {}, "x", inner[old]))
    return _mutant(f"config key {key}", (key,), config, tensors)


def unknown_value(origin: Source, draw: random.Random) -> Mutant:
    """A config key has a value that makes no sense: it is refused, or the key changes nothing."""
    config, tensors = origin.files
    inner = config["config"] if isinstance(config.get("config"), dict) and draw.random() < 0.5 else config
    key = draw.choice(sorted(inner))
    value = draw.choice(NONSENSE)
    inner[key] = value
    shown = json.dumps(value).strip('"')  # a name (AdapterHub's) is part of the keys that are then missing
    return _mutant(f"{key} = {shown[:20]}", (key, shown), config, tensors, may_be_idle=True)


def other_size(origin: Source, draw: random.Random) -> Mutant | None:
    """The config has another size than its tensors."""
    config, tensors = origin.files
    inner = config["config"] if isinstance(config.get("config"), dict) else config
    keys = [key for key in sorted(inner) if key in SIZES and type(inner[key]) in (int, float) and inner[key]]
    if not keys:
        return None
    key = draw.choice(keys)
    inner[key] = draw.choice((inner[key] + 1, inner[key] * 2, inner[key] * 4))
    # the shapes that no longer fit are named, not the size that they do not fit
    names = (
        key,
        "A site without a tensor",
        *(name for tensor in tensors for name in _names(tensor, origin.spec)),
    )
    return _mutant(f"{key} = {inner[key]}", names, config, tensors, may_be_idle=True)


def unknown_activation(origin: Source, draw: random.Random) -> Mutant | None:
    """An AdapterHub adapter has another activation than the library's."""
    config, tensors = origin.files
    inner = config.get("config")
    if not isinstance(inner, dict) or not isinstance(old := inner.get("non_linearity"), str):
        return None
    value = draw.choice(
        ("prelu", "mish", "gelu_fats", f"{old} ", "", 3, None, [old], {"name": old}, old.upper())
    )
    if value is None and inner.get("architecture") == "reft":  # means something there
        return None
    inner["non_linearity"] = value
    return _mutant(f"non_linearity = {value!r}", ("non_linearity",), config, tensors, may_be_idle=True)


Mutation = Callable[[Source, random.Random], Mutant | None]
KINDS: tuple[Mutation, ...] = (
    drop,
    duplicate,
    rename,
    reshape,
    retype,
    nan,
    swap_tensors,
    swap_layers,
    another_base,
    unknown_key,
    unknown_value,
    other_size,
    unknown_activation,
)


# ---- what a delta means -------------------------------------------------------------------------------------------


def _tensors_of(delta: Delta, turned: Mapping[int, int] | None = None) -> Counter[tuple[object, ...]]:
    """The ops, without order, factors and dtypes, layers renumbered by `turned`: the config says the factors."""
    found: Counter[tuple[object, ...]] = Counter()
    for op in delta.ops:
        parts: list[object] = [op.kind]
        for item in fields(op):
            value = getattr(op, item.name)
            if isinstance(value, Tensor):
                value = (tuple(value.shape), value.float().numpy().tobytes())
            elif isinstance(value, Site):
                value = Site(value.name, (turned or {}).get(value.layer, value.layer))
            elif isinstance(op, AttnPrefix) and item.name == "layer":
                value = (turned or {}).get(value, value)
            if item.name != "scaling":
                parts.append(value)
        found[tuple(parts)] += 1
    return found


def _digest(delta: Delta) -> str:
    return to_canonical(replace(delta, lineage={})).digest


def _says(problem: str, name: str) -> bool:
    """True where `problem` has `name` as a word of its own: half of all texts have an `r` somewhere."""
    return re.search(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])", problem) is not None


def judge(origin: Source, mutant: Mutant) -> tuple[str, str]:
    """(outcome, what is wrong with it): `refused`, `same`, `as stored`, or `violation` with the reason."""
    files = {CONFIG: mutant.config, origin.tensors_file: mutant.tensors}
    try:
        delta = read_upload(files, origin.spec)
    except (InvalidDelta, PayloadTooLarge) as error:
        problems = error.problems if isinstance(error, InvalidDelta) else (error.message,)
        if not (str(error).isascii() and str(error).isprintable()):
            return "violation", f"the message is not printable ASCII: {str(error)[:300]!r}"
        if any(_says(problem, name) for problem in problems for name in mutant.names):
            return "refused", ""
        return "violation", f"refused without naming it: {' | '.join(problems)[:300]}"
    except Exception as error:
        return "violation", f"{type(error).__name__}: {str(error)[:300]}"
    if _digest(delta) == _digest(origin.meaning):
        return ("same", "") if mutant.may_be_idle else ("violation", "accepted, as if nothing were wrong")
    if mutant.meant is not None and mutant.meant(delta):
        return "as stored", ""
    return "violation", "accepted, with another meaning"


def mutants(
    cases: Sequence[int], seed: int, names: Sequence[str]
) -> Iterator[tuple[str, Source, Mutant, int]]:
    """(kind, source, mutant, number) of each numbered case: the same for the same seed and names."""
    for number in cases:
        draw = random.Random(f"{seed}/{number}")
        mutant = None
        while mutant is None:
            origin, kind = source(draw.choice(names)), draw.choice(KINDS)
            mutant = kind(origin, draw)
        yield kind.__name__.replace("_", " "), origin, mutant, number


def run(cases: Sequence[int], seed: int, names: Sequence[str]) -> Report:
    """Judge the numbered cases over the named sources."""
    report = Report()
    for kind, origin, mutant, number in mutants(cases, seed, names):
        outcome, why = judge(origin, mutant)
        report.counts[kind, outcome] += 1
        if outcome == "violation":
            report.violations.append(f"case {number}, {origin.name}, {mutant.what}: {why}")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    options = parser.parse_args(arguments)
    cases = range(options.cases) if options.only is None else [options.only]
    started = time.perf_counter()
    report = run(cases, options.seed, sorted(CASES))
    outcomes = ("refused", "same", "as stored", "violation")
    print(f"{'mutation':20}" + "".join(f"{outcome:>11}" for outcome in outcomes))
    for kind in (kind.__name__.replace("_", " ") for kind in KINDS):
        print(f"{kind:20}" + "".join(f"{report.counts[kind, outcome]:11}" for outcome in outcomes))
    for text in report.violations[:50]:
        print(text)
    total = sum(report.counts.values())
    seconds = time.perf_counter() - started
    print(f"{total} mutants of {len(CASES)} adapters in {seconds:.0f} s: {len(report.violations)} violations")
    return int(bool(report.violations))


if __name__ == "__main__":
    sys.exit(main())
