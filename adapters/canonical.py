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
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
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

FORMAT = "deltamux/1"
_PIECE = 1 << 20


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


def digest_of(manifest: bytes, tensors: bytes) -> str:
    """sha256 over both files, each tagged and length-prefixed, so that no two pairs share a byte stream."""
    total = hashlib.sha256()
    for tag, data in ((b"manifest", manifest), (b"tensors", tensors)):
        total.update(tag + len(data).to_bytes(8, "big"))
        total.update(data)
    return total.hexdigest()


def digest_of_files(manifest: Path, tensors: Path) -> str:
    """`digest_of` of two files, which are read piece by piece."""
    total = hashlib.sha256()
    for tag, path in ((b"manifest", manifest), (b"tensors", tensors)):
        total.update(tag + path.stat().st_size.to_bytes(8, "big"))
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                total.update(piece)
    return total.hexdigest()


def to_canonical(delta: Delta) -> Canonical:
    """Serialise `delta`; equal deltas give equal bytes."""
    stored: dict[str, Tensor] = {}
    ops = [_op_to_json(op, stored) for op in delta.ops]
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
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    tensors = save({name: stored[name] for name in sorted(stored)})
    return Canonical(text, tensors, digest_of(text, tensors))


def from_canonical(manifest: bytes, tensors: bytes) -> Delta:
    """Read what `to_canonical` wrote. Raises InvalidDelta naming the key that is wrong."""
    try:
        raw = json.loads(manifest)
        stored = load(tensors)
    except (ValueError, RecursionError) as error:
        raise InvalidDelta([f"The canonical pair can't be parsed: {type(error).__name__}."]) from error
    except Exception as error:  # safetensors raises its own class, which it does not export as ValueError
        raise InvalidDelta(["The canonical safetensors file can't be parsed."]) from error
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


def _op_to_json(op: Op, stored: dict[str, Tensor]) -> dict[str, Any]:
    item: dict[str, Any] = {"kind": op.kind.value}
    for spec in fields(op):
        value = getattr(op, spec.name)
        if isinstance(value, Tensor):
            name = _content_name(value)
            stored[name] = _apart(value)
            item[spec.name] = name
        elif isinstance(value, Site):
            item[spec.name] = str(value)
        elif isinstance(value, FromInvocation):
            item[spec.name] = {"from_invocation": list(value.tokens)}
        elif isinstance(value, FirstTokens | LastTokens):
            item[spec.name] = {_COUNTED[type(value)]: value.count}
        elif value is not None:
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
    data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    head = f"{tensor.dtype}|{tuple(tensor.shape)}|".encode()
    return hashlib.sha256(head + data.numpy().tobytes()).hexdigest()[:32]


def _string_map(raw: object) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(
        isinstance(k, str) and isinstance(v, str) for k, v in raw.items()
    ):
        raise ValueError("a map of strings to strings expected")
    return dict(raw)
