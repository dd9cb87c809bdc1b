"""Ways to spoil an upload. Those of `INVALID` must be refused whatever they hit; those of `ANY` may leave it valid."""

from __future__ import annotations

import json
import random
import string
import struct
from collections.abc import Callable, Mapping
from typing import Any

from tests.hostile.seeds import Seed

Files = Mapping[str, bytes]
Mutation = Callable[[Seed, random.Random], Files]

JUNK: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, "", "x", "../../etc/passwd", "(a+)+$", "\x00", "\u202e", [], [[]],
    {}, {"a": {}}, ["q_proj", 1], "a" * 3000, [0] * 50, {"__class__": "x"}, "cuda", "F8_E4M3", 0.1, -0.0,
]  # fmt: skip


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a valid safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: object, data: bytes) -> bytes:
    """A safetensors file with this header, which may be bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _with_header(change: Callable[[dict[str, Any], random.Random], None]) -> Mutation:
    def mutate(seed: Seed, chooser: random.Random) -> Files:
        header, data = split(seed.files[seed.tensors])
        change(header, chooser)
        return {**seed.files, seed.tensors: join(header, data)}

    return mutate


def _tensor(header: dict[str, Any], chooser: random.Random) -> str:
    return chooser.choice(sorted(key for key in header if key != "__metadata__"))


def _rename_tensor(header: dict[str, Any], chooser: random.Random) -> None:
    key = _tensor(header, chooser)
    name = list(key)
    name[chooser.randrange(len(name))] = chooser.choice(string.printable + "\x00\u202eé")
    header["".join(name) if "".join(name) != key else key + "x"] = header.pop(key)


def _drop_tensor(header: dict[str, Any], chooser: random.Random) -> None:
    del header[_tensor(header, chooser)]


def _shape(header: dict[str, Any], chooser: random.Random) -> None:
    entry = header[_tensor(header, chooser)]
    options = [
        entry["shape"][:-1],
        [*entry["shape"], 1, 1, 1],
        [size + 1 for size in entry["shape"]],
        [0],
        [2**62, 4],
    ]
    entry["shape"] = chooser.choice(options)


def _offsets(header: dict[str, Any], chooser: random.Random) -> None:
    entry = header[_tensor(header, chooser)]
    at = chooser.randrange(2)
    entry["data_offsets"][at] += chooser.choice([-4, -1, 1, 4, 2**40, 2**63])


def _dtype(header: dict[str, Any], chooser: random.Random) -> None:
    header[_tensor(header, chooser)]["dtype"] = chooser.choice(
        ["F64", "I64", "BOOL", "F16", "F8_E4M3", "", "f32", 3]
    )


def _entry_junk(header: dict[str, Any], chooser: random.Random) -> None:
    header[_tensor(header, chooser)] = chooser.choice(JUNK)


def _duplicate_key(seed: Seed, chooser: random.Random) -> Files:
    name = chooser.choice([seed.config, seed.tensors])
    text = seed.files[name]
    if name == seed.config:
        return {**seed.files, name: text[:-1] + b"," + text[1:]}
    length = int.from_bytes(text[:8], "little")
    header = text[8 : 8 + length].strip()
    return {**seed.files, name: join(header[:-1] + b"," + header[1:], text[8 + length :])}


def _not_finite(seed: Seed, chooser: random.Random) -> Files:
    header, data = split(seed.files[seed.tensors])
    at = 4 * chooser.randrange(len(data) // 4)
    bad = struct.pack("<f", chooser.choice([float("nan"), float("inf"), float("-inf")]))
    return {**seed.files, seed.tensors: join(header, data[:at] + bad + data[at + 4 :])}


def _truncate(seed: Seed, chooser: random.Random) -> Files:
    name = chooser.choice([seed.config, seed.tensors])
    data = seed.files[name]
    return {**seed.files, name: data[: chooser.randrange(len(data))]}


def _extend(seed: Seed, chooser: random.Random) -> Files:
    return {
        **seed.files,
        seed.tensors: seed.files[seed.tensors] + chooser.randbytes(chooser.choice([1, 4, 1000])),
    }


def _unknown_key(seed: Seed, chooser: random.Random) -> Files:
    config = json.loads(seed.files[seed.config])
    config["".join(chooser.choices(string.ascii_lowercase, k=6)) + "_x"] = chooser.choice(JUNK)
    return {**seed.files, seed.config: json.dumps(config).encode()}


def _other_file(seed: Seed, chooser: random.Random) -> Files:
    name = chooser.choice(
        ["adapter_model.bin", "../adapter_config.json", "x.pkl", "", "head_config.json", "a\x00b"]
    )
    return {**seed.files, name: b"x"}


def _rank(seed: Seed, chooser: random.Random) -> Files:
    config = json.loads(seed.files[seed.config])
    wrong = {
        "LORA": {"r": chooser.choice([1, 3, 0, -1, 2**31, "2", None])},
        "IA3": {"target_modules": ["q_proj"]},
    }
    config.update(wrong.get(config.get("peft_type"), {"format": "deltamux/2"}))
    return {**seed.files, seed.config: json.dumps(config).encode()}


INVALID: dict[str, Mutation] = {
    "a tensor renamed": _with_header(_rename_tensor),
    "a tensor dropped": _with_header(_drop_tensor),
    "a shape changed": _with_header(_shape),
    "offsets changed": _with_header(_offsets),
    "a dtype changed": _with_header(_dtype),
    "an entry replaced": _with_header(_entry_junk),
    "a key twice": _duplicate_key,
    "a value not finite": _not_finite,
    "truncated": _truncate,
    "extended": _extend,
    "an unknown key": _unknown_key,
    "a file that does not belong": _other_file,
    "another rank, targets or format": _rank,
}


def _flip(seed: Seed, chooser: random.Random) -> Files:
    name = chooser.choice([seed.config, seed.tensors])
    data = bytearray(seed.files[name])
    for _ in range(chooser.choice([1, 1, 2, 8])):
        data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
    return {**seed.files, name: bytes(data)}


def _flip_header(seed: Seed, chooser: random.Random) -> Files:
    data = bytearray(seed.files[seed.tensors])
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(chooser.choice([1, 2])):
        data[chooser.randrange(end)] = chooser.choice(b'0123456789[]{}",: -eE.\\u\x00\xff')
    return {**seed.files, seed.tensors: bytes(data)}


def _splice(seed: Seed, chooser: random.Random) -> Files:
    name = chooser.choice([seed.config, seed.tensors])
    data = seed.files[name]
    start, end = sorted(chooser.randrange(len(data)) for _ in range(2))
    piece = chooser.choice(
        [b"", data[start:end] * 2, chooser.randbytes(9), b"[" * 200, b'{"a":' * 40, b"9" * 5000]
    )
    return {**seed.files, name: data[:start] + piece + data[end:]}


def _config_junk(seed: Seed, chooser: random.Random) -> Files:
    config = json.loads(seed.files[seed.config])
    config[chooser.choice(sorted(config))] = chooser.choice(JUNK)
    return {**seed.files, seed.config: json.dumps(config).encode()}


def _noise(seed: Seed, chooser: random.Random) -> Files:
    name = chooser.choice([seed.config, seed.tensors])
    return {**seed.files, name: chooser.randbytes(chooser.randrange(300))}


def _metadata(seed: Seed, chooser: random.Random) -> Files:
    header, data = split(seed.files[seed.tensors])
    header["__metadata__"] = chooser.choice(
        [{"k": "v" * 5000}, {"../x": "\x00"}, {}, {"k": 1}, [], None, {"k": {}}]
    )
    return {**seed.files, seed.tensors: join(header, data)}


ANY: dict[str, Mutation] = {
    "bits flipped": _flip,
    "header bytes replaced": _flip_header,
    "a piece replaced": _splice,
    "a config value replaced": _config_junk,
    "noise": _noise,
    "metadata replaced": _metadata,
}
