"""The canonical delta: one safetensors file, one JSON manifest, one digest over both.

Tensors are named by the sha256 of their content, so equal tensors are stored once and the bytes do not depend on
op order or on names in the upload. The manifest lists the ops with tensor names in place of tensors.
Format: manifest `{"format": "deltamux/1", "method", "task", "backbone_digest", "position_offset", "labels",
"lineage", "typology", "ops": [{"kind", ...}], "head"}`, keys sorted, UTF-8, no whitespace; `head` only where there is
one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from adapters.errors import InvalidDelta
from adapters.normal_form import (
    EXECUTED_OPS,
    Affine,
    AttnPrefix,
    Delta,
    Head,
    LinearMap,
    LowRank,
    Op,
    OpKind,
    Rows,
    Site,
    VirtualTokens,
    WeightDelta,
)
from adapters.positions import FirstTokens, FromInvocation, LastTokens, Positions
from adapters.tasks import HeadSpec
from adapters.tensor_files import bytes_of, file_head, pieces, views_of_file

FORMAT = "deltamux/1"


@dataclass(frozen=True, slots=True)
class Canonical:
    """A delta as it is stored. `digest` is lower-case hex."""

    manifest: bytes
    tensors: bytes
    digest: str

    @property
    def size_bytes(self) -> int:
        """Bytes of both files."""
        return len(self.manifest) + len(self.tensors)


@dataclass(frozen=True, slots=True)
class StagedCanonical:
    """A delta as it is stored, its tensors in a file of `num_tensor_bytes`."""

    manifest: bytes
    tensors: Path
    num_tensor_bytes: int
    digest: str

    @property
    def size_bytes(self) -> int:
        """Bytes of both files."""
        return len(self.manifest) + self.num_tensor_bytes


def digest_of(manifest: bytes, tensors: bytes | bytearray) -> str:
    """sha256 over both files, each tagged and length-prefixed, so that no two pairs share a byte stream."""
    total = _digest_of_head(manifest, len(tensors))
    total.update(tensors)
    return total.hexdigest()


def digest_of_files(manifest: Path, tensors: Path) -> str:
    """`digest_of` of two files; the tensors are read piece by piece."""
    total = _digest_of_head(manifest.read_bytes(), tensors.stat().st_size)
    with tensors.open("rb") as file:
        return hashlib.file_digest(file, lambda: total).hexdigest()


def _digest_of_head(manifest: bytes, num_tensor_bytes: int) -> hashlib._Hash:
    """The digest's state once everything but the tensors' bytes is in it."""
    total = hashlib.sha256(b"manifest" + len(manifest).to_bytes(8, "big"))
    total.update(manifest)
    total.update(b"tensors" + num_tensor_bytes.to_bytes(8, "big"))
    return total


def to_canonical(delta: Delta) -> Canonical:
    """Serialise `delta`; equal deltas give equal bytes."""
    stored: dict[str, Tensor] = {}
    text = _manifest(delta, stored, _nothing)
    tensors = save({name: _apart(stored[name]) for name in sorted(stored)})
    return Canonical(text, tensors, digest_of(text, tensors))


def stage_canonical(delta: Delta, path: Path, *, between: Callable[[], None]) -> StagedCanonical:
    """Serialise `delta` as `to_canonical` does, its tensors into a new file at `path`, in bounded memory.

    `between` is called whenever a tensor has been read. The file is not synced. Raises OSError.
    """
    stored: dict[str, Tensor] = {}
    text = _manifest(delta, stored, between)
    head, order = file_head(stored)
    size = len(head) + sum(tensor.nbytes for tensor in stored.values())
    total = _digest_of_head(text, size)
    with path.open("xb") as file:
        total.update(head)
        file.write(head)
        for name in order:
            for piece in pieces(stored[name]):
                data = bytes_of(piece)
                total.update(data)
                file.write(data)
            between()
    return StagedCanonical(text, path, size, total.hexdigest())


def _nothing() -> None:
    """What is to be done between two tensors in memory."""


def _manifest(delta: Delta, stored: dict[str, Tensor], between: Callable[[], None]) -> bytes:
    """The manifest; the tensors that it names are put into `stored`."""
    ops = [_op_to_json(op, stored, between) for op in delta.ops]
    manifest = {
        "format": FORMAT,
        "method": delta.method,
        "task": delta.task,
        "backbone_digest": delta.backbone_digest,
        "position_offset": delta.position_offset,
        "labels": dict(delta.labels),
        "lineage": dict(delta.lineage),
        "typology": typology(delta) | {"num_parameters": sum(tensor.numel() for tensor in stored.values())},
        "ops": ops,
    } | ({} if delta.head is None else {"head": _head_to_json(delta.head)})
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def from_canonical(manifest: bytes, tensors: bytes | bytearray) -> Delta:
    """Read what `to_canonical` wrote. A bytearray is not copied: the delta's tensors are views of it.

    Raises InvalidDelta naming the key that is wrong.
    """
    try:
        stored = views_of_file(tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidDelta(["The canonical safetensors file can't be parsed."]) from error
    return delta_of(manifest, stored)


def delta_of(manifest: bytes, stored: Mapping[str, Tensor]) -> Delta:
    """The delta of a manifest whose tensors are `stored`. Raises InvalidDelta naming the key that is wrong."""
    try:
        raw = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise InvalidDelta([f"The canonical pair can't be parsed: {type(error).__name__}."]) from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        got = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise InvalidDelta([f"manifest.format: got {got!r}, expected {FORMAT!r}."])
    try:
        delta = Delta(
            method=str(raw["method"]),
            task=str(raw["task"]),
            backbone_digest=str(raw["backbone_digest"]),
            position_offset=int(raw["position_offset"]),
            head=_head_from_json(raw.get("head")),
            labels=_string_map(raw["labels"]),
            lineage=_string_map(raw["lineage"]),
            ops=tuple(_op_from_json(item, stored) for item in raw["ops"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidDelta([f"manifest: {type(error).__name__} at {error}."]) from error
    if unused := set(stored) - {
        name for item in raw["ops"] for name in item.values() if isinstance(name, str)
    }:
        raise InvalidDelta([f"Tensor {name} is not used by any op." for name in sorted(unused)])
    return delta


def typology(delta: Delta) -> dict[str, Any]:
    """Fields of the PEFT-Ref typology that follow from the ops (Sabry and Belz, "PEFT-Ref")."""
    forms: set[str] = set()
    for op in delta.ops:
        match op:
            case LowRank():
                forms.add("sequential" if op.sequential else "parallel")
            case Affine():
                forms.add("scaling" if op.scale is not None else "addition")
            case LinearMap():
                forms.add("transformation")
            case WeightDelta():
                forms.add("parallel")
            case Rows() | Head():
                forms.add("replacement")
            case AttnPrefix() | VirtualTokens():
                forms.add("prefix")
    sites = {op.write.name for op in delta.ops if isinstance(op, LowRank)}
    sites |= {
        op.site.name for op in delta.ops if isinstance(op, Affine | LinearMap | WeightDelta | Rows | Head)
    }
    return {
        "insertion_form": sorted(forms),
        "workspace": sorted(sites),
        "op_kinds": sorted({op.kind.value for op in delta.ops}),
    }


def _apart(tensor: Tensor) -> Tensor:
    """`tensor` in storage of its own: safetensors refuses two that overlap, as slices of one shared base do."""
    whole = tensor.detach().contiguous().cpu()
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def _op_to_json(op: Op, stored: dict[str, Tensor], between: Callable[[], None]) -> dict[str, Any]:
    item: dict[str, Any] = {"kind": op.kind.value}
    for spec in fields(op):
        value = getattr(op, spec.name)
        if isinstance(value, Tensor):
            name = _content_name(value)
            stored[name] = value
            item[spec.name] = name
            between()
        elif isinstance(value, Site):
            item[spec.name] = str(value)
        elif isinstance(value, FromInvocation):
            item[spec.name] = {"from_invocation": list(value.tokens)}
        elif isinstance(value, FirstTokens | LastTokens):
            item[spec.name] = {_COUNTED[type(value)]: value.count}
        elif value is not None and value != "":  # fields added later are empty: they change no digest
            item[spec.name] = value
    return item


def _op_from_json(item: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Op:
    kind = OpKind(item["kind"])
    if kind not in EXECUTED_OPS:
        executed = ", ".join(sorted(EXECUTED_OPS))
        raise ValueError(
            f"op kind {kind.value!r}, which this server does not execute (it executes {executed})"
        )
    cls = EXECUTED_OPS[kind]
    values: dict[str, Any] = {}
    for spec in fields(cls):
        if spec.name not in item:
            continue
        value, declared = item[spec.name], str(spec.type)
        if "Tensor" in declared:
            values[spec.name] = stored[value]
        elif declared == "Site":
            values[spec.name] = Site.parse(value)
        elif "Positions" in declared:
            values[spec.name] = _positions_from_json(spec.name, value)
        else:
            values[spec.name] = value
    if unknown := set(item) - {spec.name for spec in fields(cls)} - {"kind"}:
        raise ValueError(f"unknown keys {sorted(unknown)} in a {kind.value} op")
    return cls(**values)


_COUNTED: Mapping[type[FirstTokens | LastTokens], str] = {
    FirstTokens: "first_tokens",
    LastTokens: "last_tokens",
}


def _positions_from_json(field: str, item: Mapping[str, Any]) -> Positions:
    ((name, value),) = item.items()
    if (
        name == "from_invocation"
        and isinstance(value, list)
        and all(isinstance(token, int) for token in value)
    ):
        return FromInvocation(tuple(value))
    for cls, counted in _COUNTED.items():
        if name == counted and type(value) is int:
            return cls(value)
    raise ValueError(f"{field}, expected a from_invocation list, or a number of first_tokens or last_tokens")


def _head_to_json(head: HeadSpec) -> dict[str, Any]:
    """What differs from the defaults, so that a field that is added later changes no digest."""
    given = {spec.name: (getattr(head, spec.name), spec.default) for spec in fields(HeadSpec)}
    found = {name: value for name, (value, default) in given.items() if value != default}
    return found | ({"labels": list(head.labels)} if head.labels else {})


def _head_from_json(raw: object) -> HeadSpec | None:
    if raw is None:
        return None
    known = {spec.name for spec in fields(HeadSpec)}
    if not isinstance(raw, dict) or not set(raw) <= known or not isinstance(raw.get("labels", []), list):
        raise ValueError(f"head, expected an object with {', '.join(sorted(known))}")
    return HeadSpec(**raw | {"labels": tuple(raw.get("labels", []))})


def _content_name(tensor: Tensor) -> str:
    total = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    for piece in pieces(tensor):
        total.update(bytes_of(piece))
    return total.hexdigest()[:32]


def _string_map(raw: object) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in raw.items()
    ):
        raise ValueError("a map of strings to strings expected")
    return dict(raw)
