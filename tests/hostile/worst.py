"""The dearest uploads: each of its kind is as large as the caps let through, or claims to be larger."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.hostile.mutations import join

BOUNDARY = "hostile"
WIDTH = 2048
"""Of the backbone that these are sent to: wide enough for a valid LoRA of 60 MiB."""
RANK = 3750
LARGE_BYTES = 60 << 20
CONFIG = {
    "peft_type": "LORA",
    "r": RANK,
    "lora_alpha": 2,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "tiny",
}


@dataclass(frozen=True)
class Request:
    """The body of one `PUT /v1/adapters/{name}/versions`, and whether it is valid."""

    body: bytes
    content_type: str = f"multipart/form-data; boundary={BOUNDARY}"
    headers: Mapping[str, str] = field(default_factory=dict)
    accepted: bool = False


def _form(files: Mapping[str, bytes]) -> bytes:
    pieces = []
    for name, data in files.items():
        head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        pieces += [head.encode(), data, b"\r\n"]
    return b"".join([*pieces, f"--{BOUNDARY}--\r\n".encode()])


def _peft(tensors: bytes) -> Request:
    config = json.dumps(CONFIG).encode()
    return Request(_form({"adapter_config.json": config, "adapter_model.safetensors": tensors}))


def _entry(begin: int, *shape: int) -> dict[str, object]:
    size = 2
    for length in shape:
        size *= length
    return {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, begin + size]}


def _many_lists() -> Request:
    return _peft(join(json.dumps({"a": {**_entry(0, 0), "x": [[]] * 260_000}}).encode(), b""))


def _empty_tensors() -> Request:
    return _peft(join({f"t{i}": _entry(0, 0) for i in range(14_000)}, b""))


def _small_tensors() -> Request:
    return _peft(join({f"t{i}": _entry(2 * i, 1) for i in range(13_000)}, b"\0\0" * 13_000))


def _nesting() -> Request:
    return _peft(join(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}", b""))


def _lengths_that_lie() -> Request:
    """A header of 2^63 bytes in a file of a few."""
    return _peft((1 << 63).to_bytes(8, "little") + b'{"a":')


def _shapes_that_lie() -> Request:
    """A kilobyte that declares tensors of 2^62 elements."""
    return _peft(join({f"t{i}": _entry(0, 1 << 31, 1 << 31) for i in range(100)}, b""))


def _large_nan() -> Request:
    return _peft(join({"a": _entry(0, LARGE_BYTES // 2)}, b"\xff" * LARGE_BYTES))


def _large_valid() -> Request:
    """Not hostile, but as much work as an upload can be: it is also written again, hashed and stored."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    size = 2 * RANK * WIDTH
    values = bytes(range(7, 57)) * (size // 50 + 1)  # all finite as F16, and none zero
    header = {name.format("A"): _entry(0, RANK, WIDTH), name.format("B"): _entry(size, WIDTH, RANK)}
    request = _peft(join(header, values[:size] + values[1 : size + 1]))
    return Request(request.body, headers={"idempotency-key": "again"}, accepted=True)


def _large_json() -> Request:
    """Sixty megabytes of lists where the ids of files are expected."""
    return Request(b'{"file_ids":[' + b"[]," * (LARGE_BYTES // 3) + b"[]]}", "application/json")


def _manifest() -> Request:
    ops = [{"kind": "low_rank", "A": "x", "B": "y", "read": "attn.x", "write": "q.out"}] * 40_000
    text = json.dumps({"format": "deltamux/1", "ops": ops}, separators=(",", ":")).encode()
    return Request(_form({"manifest.json": text, "tensors.safetensors": join({}, b"")}))


def _line_ends() -> Request:
    """Sixteen megabytes of which each byte could begin the next boundary."""
    return _peft(b"\r\n--host" * (2 << 20))


def _parts() -> Request:
    """Four hundred thousand parts."""
    return Request(f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="x"\r\n\r\n\r\n'.encode() * 400_000)


def _part_headers() -> Request:
    """A part of four million headers."""
    return Request(f"--{BOUNDARY}\r\n".encode() + b"a:b\r\n" * 4_000_000)


def _preamble() -> Request:
    """Thirty megabytes of line ends in front of the first boundary."""
    return Request(b"\r\n" * (15 << 20) + _form({}))


def _long_header() -> Request:
    """One header of thirty megabytes."""
    return Request(f"--{BOUNDARY}\r\n".encode() + b"a" * (30 << 20))


KINDS: Mapping[str, Callable[[], Request]] = {
    "260,000 lists in a header": _many_lists,
    "14,000 empty tensors": _empty_tensors,
    "13,000 tensors": _small_tensors,
    "nesting of 500,000": _nesting,
    "a length that lies": _lengths_that_lie,
    "shapes that lie": _shapes_that_lie,
    "60 MiB of NaN": _large_nan,
    "60 MiB, valid": _large_valid,
    "60 MiB of JSON": _large_json,
    "a manifest of 40,000 ops": _manifest,
    "16 MiB of line ends": _line_ends,
    "400,000 parts": _parts,
    "4,000,000 part headers": _part_headers,
    "30 MiB in front of the parts": _preamble,
    "a part header of 30 MiB": _long_header,
}
