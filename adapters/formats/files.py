"""Safe reading of an upload's files: every cap is checked before the safetensors library or JSON values are used.

Formats: JSON (RFC 8259, UTF-8) and safetensors 0.x (8-byte little-endian header length, JSON header, data).
The library accepts, and so this module refuses: headers above 1 MiB (600k empty tensors stall every thread for
10 s), duplicate keys, control characters in names, tensors of rank 1000.

A server has `bounded` look at long headers first, in a child process. What then reaches the parsers here is at most
20,000 plain entries; a 64 MiB file of NaN takes 230 MiB for a moment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from adapters.errors import PayloadTooLarge
from adapters.formats.problems import Problems, kind_of, quoted
from adapters.tasks import Task

MAX_CONFIG_BYTES = 64 * 1024
MAX_HEADER_BYTES = 1024 * 1024
MAX_TENSORS = 20_000
MAX_TENSOR_RANK = 4
MAX_TENSOR_NAME = 512
MAX_JSON_DEPTH = 16
_PLAUSIBLE_HEADER_BYTES = (
    100_000_000  # the format's own limit; a larger length is some other file's first bytes
)

SERVED_DTYPES = frozenset({"F32", "F16", "BF16"})
# Tensors that hold positions, not values: only these may be integers.
INDEX_DTYPES = frozenset({"U8", "I16", "I32", "I64"})
INDEX_ENDINGS = ("_topk_indices", ".unilora_indices_A", ".unilora_indices_B")

CONVERT = "Convert offline with `deltamux convert`, or save_pretrained(safe_serialization=True)."

# First bytes of what people rename to .safetensors. Looked at only where the length field is impossible: a valid
# file may start with any of these bytes.
FOREIGN_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it (a pickle inside)"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x03", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself (run `git lfs pull`)"),
)


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload: both files as they came, and parsed. `task`: what the uploader says it was trained for."""

    config_bytes: bytes
    tensor_bytes: bytes
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    task: Task | None = None


class _Refused(ValueError):
    """Raised inside the JSON parser, where only exceptions get out; the text is ours."""


def read_json(
    name: str, data: bytes, problems: Problems, *, max_bytes: int = MAX_CONFIG_BYTES
) -> dict[str, Any] | None:
    """The object in a JSON file; None where it can't be read, with the reason added to `problems`.

    Refused beside bad JSON: duplicate keys, NaN and Infinity (also as 1e999), nesting deeper than
    MAX_JSON_DEPTH, lone surrogates, another encoding than UTF-8.
    Raises PayloadTooLarge above `max_bytes`.
    """
    if len(data) > max_bytes:
        raise PayloadTooLarge(f"{quoted(name)}: {len(data)} bytes, at most {max_bytes} are read.", param=name)
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
        _audit(value)
    except _Refused as error:
        problems.add(f"{quoted(name)}: {error}")
    except UnicodeDecodeError:
        problems.add(f"{quoted(name)}: not UTF-8.")
    except RecursionError:
        problems.add(f"{quoted(name)}: nested deeper than {MAX_JSON_DEPTH} levels.")
    except json.JSONDecodeError as error:
        problems.add(f"{quoted(name)}: not valid JSON at line {error.lineno}, column {error.colno}.")
    except ValueError:  # an integer of thousands of digits
        problems.add(f"{quoted(name)}: a number is too long.")
    else:
        if isinstance(value, dict):
            return value
        problems.add(f"{quoted(name)}: got {kind_of(value)}, expected an object.")
    return None


def read_safetensors(name: str, data: bytes, problems: Problems) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file by name; None where it can't be read, with the reasons in `problems`.

    A tensor whose dtype or values are refused is returned as zeros: later checks still see its name and shape.
    Raises PayloadTooLarge where the header is over MAX_HEADER_BYTES or lists more than MAX_TENSORS tensors.
    """
    header = _read_header(name, data, problems)
    if header is None:
        return None
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise PayloadTooLarge(
            f"{quoted(name)}: {len(header)} tensors, at most {MAX_TENSORS} are read.", param=name
        )
    refused = _check_entries(name, header, problems)
    if refused is None:
        return None
    try:
        tensors = load(data)
    except Exception:  # the library exports no base class of its errors; its text must not reach users
        problems.add(f"{quoted(name)}: not a valid safetensors file (offsets, shapes and data do not agree).")
        return None
    return {key: _checked(name, key, tensor, key in refused, problems) for key, tensor in tensors.items()}


def _checked(name: str, key: str, tensor: Tensor, refused: bool, problems: Problems) -> Tensor:
    if refused:
        return torch.zeros(tensor.shape)
    if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
        problems.add(f"{quoted(name)}: tensor {quoted(key)} has {bad} non-finite value{'s' * (bad > 1)}.")
        return torch.zeros_like(tensor)
    return tensor


def _read_header(name: str, data: bytes, problems: Problems) -> dict[str, Any] | None:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        for magic, what in FOREIGN_MAGIC:
            if data.startswith(magic):
                problems.add(f"{quoted(name)}: not safetensors but {what}. {CONVERT}")
                return None
        if len(data) >= 8 and MAX_HEADER_BYTES < length <= _PLAUSIBLE_HEADER_BYTES:
            raise PayloadTooLarge(
                f"{quoted(name)}: a header of {length} bytes, at most {MAX_HEADER_BYTES} are read.",
                param=name,
            )
        problems.add(f"{quoted(name)}: truncated, or not a safetensors file ({len(data)} bytes).")
        return None
    return read_json(f"{name} header", data[8 : 8 + length], problems, max_bytes=MAX_HEADER_BYTES)


def _check_entries(name: str, header: Mapping[str, Any], problems: Problems) -> set[str] | None:
    """The tensors of a dtype that is not served; None where an entry is so wrong that the file can't be loaded."""
    refused: set[str] = set()
    readable = True
    for key, entry in header.items():
        where = f"{quoted(name)}: tensor {quoted(key)}"
        if not key or len(key) > MAX_TENSOR_NAME or not (key.isascii() and key.isprintable()):
            problems.add(f"{where}: the name must be 1 to {MAX_TENSOR_NAME} printable ASCII characters.")
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(dtype, str) or not isinstance(shape, list):
            problems.add(f"{where}: its header entry has no dtype or no shape.")
            readable = False
            continue
        if len(shape) > MAX_TENSOR_RANK:
            problems.add(f"{where}: {len(shape)} dimensions, at most {MAX_TENSOR_RANK} are read.")
            readable = False
        served = SERVED_DTYPES | _index_dtypes(key)
        if dtype not in served:
            known = quoted(dtype) if dtype in _KNOWN_DTYPES else "an unknown dtype"
            problems.add(
                f"{where}: {known} is not served; expected {', '.join(sorted(served))}. "
                "Cast it (`tensor.float()`) and save again."
            )
            readable &= dtype in _KNOWN_DTYPES
            refused.add(key)
    return refused if readable else None


def _index_dtypes(key: str) -> frozenset[str]:
    """The integer dtypes that a tensor of this name may have; validation checks what they point at.

    Beside the methods' own names: places in a sparse matrix (SHiRA) and the content names of canonical files.
    """
    if key.endswith(INDEX_ENDINGS):
        return INDEX_DTYPES
    is_content_name = len(key) == 32 and all(char in "0123456789abcdef" for char in key)
    return frozenset({"I32"}) if key.endswith("_indices") or is_content_name else frozenset()


_KNOWN_DTYPES = frozenset({"F64", "I64", "I32", "I16", "I8", "U8", "BOOL"})


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Refused(f"the key {quoted(key)} appears twice.")
        found[key] = value
    return found


def _no_constant(constant: str) -> float:
    raise _Refused(f"{constant} is not a JSON number.")


def _audit(root: object) -> None:
    """Bound what the parser lets through. Raises _Refused."""
    pending: list[tuple[object, int]] = [(root, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > MAX_JSON_DEPTH:
            raise _Refused(f"nested deeper than {MAX_JSON_DEPTH} levels.")
        match value:
            case dict():
                pending += [(item, depth + 1) for item in value.values()]
                pending += [(key, depth) for key in value]
            case list():
                pending += [(item, depth + 1) for item in value]
            case float() if not math.isfinite(value):
                raise _Refused("a number is not finite.")
            case str() if not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError:
                    raise _Refused(f"the text {quoted(value[:20])} is not valid Unicode.") from None
