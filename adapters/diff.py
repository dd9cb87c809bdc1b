"""Two canonical deltas compared: what their manifests say, and by how much their ops differ.

Ops are paired by kind and place, in order where several share one. A linear LowRank is compared by the change of the
weight that it makes, not by its factors: s·B·A has many pairs of factors. All else is compared tensor by tensor.

    ||s₁B₁A₁ - s₂B₂A₂||  =  ||R_B R_Aᵀ||,  R_B of qr([s₁B₁, -s₂B₂]),  R_A of qr([A₁; A₂]ᵀ)      (Frobenius, float64)

Tensors are read from the store when they are compared: at most the factors of one pair of LowRanks, or a piece of
anything else, are in memory at a time, beside files of up to WHOLE_BYTES.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.errors import StoreError
from adapters.normal_form import kv_site
from adapters.store import FILES, BlobStore
from adapters.tensor_files import DTYPES

WHOLE_BYTES = 64 << 20
"""Tensors of a delta of up to this size are read at once: many small reads from an object store take long."""

_PIECE_BYTES = 8 << 20
_MAX_HEADER_BYTES = 16 << 20
_PLACES = ("read", "write", "site", "side", "layer", "stack", "merge")  # what says where an op acts


class StoredDelta:
    """A canonical delta in a store, of which only what is asked for is read. Raises StoreError throughout."""

    def __init__(self, store: BlobStore, digest: str) -> None:
        self._store, self._digest = store, digest
        manifest, tensors = FILES
        sizes = store.sizes(digest)
        self.manifest: Mapping[str, Any] = json.loads(store.read_range(digest, manifest, 0, sizes[manifest]))
        self._whole: bytes | None = None
        if sizes[tensors] <= WHOLE_BYTES:
            self._whole = store.read_range(digest, tensors, 0, sizes[tensors])
        length = int.from_bytes(self._read(0, 8), "little")
        if length > min(_MAX_HEADER_BYTES, sizes[tensors]):
            raise StoreError(f"The blob sha256:{digest} is damaged: its tensors have no header.")
        self._header: Mapping[str, Any] = json.loads(self._read(8, 8 + length))
        self._data = 8 + length

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return tuple(self._header[name]["shape"])

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, in float64."""
        return torch.cat(list(self.pieces(name))).reshape(self.shape(name))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The elements of a stored tensor in order, in float64, a bounded number at a time."""
        entry = self._header[name]
        start, stop = (self._data + offset for offset in entry["data_offsets"])
        dtype = DTYPES[entry["dtype"]]
        if start == stop:
            yield torch.empty(0, dtype=torch.float64)
        # whole elements of every dtype: pieces of two tensors meet element by element only if both count elements
        step = _PIECE_BYTES // 8 * dtype.itemsize
        for at in range(start, stop, step):
            data = bytearray(self._read(at, min(at + step, stop)))
            yield torch.frombuffer(data, dtype=dtype).double()

    def _read(self, start: int, stop: int) -> bytes:
        if self._whole is not None:
            return self._whole[start:stop]
        return self._store.read_range(self._digest, FILES[1], start, stop)


def compare(first: StoredDelta, second: StoredDelta) -> dict[str, Any]:
    """`fields`: what the manifests say otherwise. `ops`: one entry a pair, or an op that the other one has not.

    An op's `norm` is that of what it adds (LowRank: of s·B·A), one per delta; `difference` the norm of the
    difference, null where shapes differ or one is missing. `distance`: root of the sum of their squares.
    """
    entries = [
        _compare_ops(place, first, mine, second, theirs)
        for place, mine, theirs in _paired(first.manifest["ops"], second.manifest["ops"])
    ]
    known = [entry["difference"] for entry in entries]
    return {
        "fields": _fields(first.manifest, second.manifest),
        "ops": entries,
        "distance": None if None in known else math.hypot(*known),
    }


def _fields(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    mine, theirs = _flat(first), _flat(second)
    return [
        {"field": key, "values": [mine.get(key), theirs.get(key)]}
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key)
    ]


def _flat(manifest: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in manifest.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": item for inner, item in value.items()}
        elif key != "ops":
            found[key] = value
    return found


_Ops = list[dict[str, Any]]


def _paired(first: _Ops, second: _Ops) -> Iterator[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
    mine, theirs = _by_place(first), _by_place(second)
    for place in [*mine, *(place for place in theirs if place not in mine)]:
        here, there = mine.get(place, []), theirs.get(place, [])
        for index in range(max(len(here), len(there))):
            yield (
                place,
                here[index] if index < len(here) else None,
                there[index] if index < len(there) else None,
            )


def _by_place(ops: _Ops) -> dict[str, _Ops]:
    found: dict[str, _Ops] = defaultdict(list)
    for op in ops:
        found[json.dumps([op["kind"], *(op.get(key) for key in _PLACES)])].append(op)
    return found


def _compare_ops(
    place: str,
    first: StoredDelta,
    mine: dict[str, Any] | None,
    second: StoredDelta,
    theirs: dict[str, Any] | None,
) -> dict[str, Any]:
    kind, *_ = json.loads(place)
    present = mine or theirs
    assert present is not None
    pair = [(delta, op) for delta, op in ((first, mine), (second, theirs)) if op is not None]
    norms = [_norm([(1.0, delta, op)]) for delta, op in pair]
    difference = None
    if mine is not None and theirs is not None and _same_shapes(first, mine, second, theirs):
        difference = 0.0 if mine == theirs else _norm([(1.0, first, mine), (-1.0, second, theirs)])
    return {
        "kind": kind,
        "site": _site(present),
        "sizes": [_sizes(first, mine), _sizes(second, theirs)],
        "norms": [*norms] if mine and theirs else [*norms, None] if mine else [None, *norms],
        "difference": difference,
        "settings": _fields(_settings(mine), _settings(theirs)) if mine and theirs else [],
    }


def _site(op: Mapping[str, Any]) -> str:
    if op["kind"] == "low_rank":
        return str(op["write"]) if op["read"] == op["write"] else f"{op['read']} -> {op['write']}"
    if "layer" in op:
        return str(kv_site(op.get("stack", ""), op["layer"]))
    return str(op.get("site", "embed"))


def _tensors(op: Mapping[str, Any]) -> dict[str, str]:
    """Field -> content name of an op's tensors."""
    return {
        key: value
        for key, value in op.items()
        if isinstance(value, str) and key not in ("kind", *_PLACES, "activation", "layout")
    }


def _settings(op: Mapping[str, Any]) -> dict[str, Any]:
    names = _tensors(op)
    return {key: value for key, value in op.items() if key not in names}


def _sizes(delta: StoredDelta, op: Mapping[str, Any] | None) -> dict[str, int | list[int]] | None:
    """The rank of a LowRank, the number of tokens of prompts, shapes of anything else; None for no op."""
    if op is None:
        return None
    names = _tensors(op)
    if op["kind"] == "low_rank":
        return {"rank": delta.shape(names["A"])[0]}
    if tokens := names.get("embeddings") or names.get("key"):
        return {"tokens": delta.shape(tokens)[0]}
    return {field: list(delta.shape(name)) for field, name in names.items()}


def _is_linear(op: Mapping[str, Any]) -> bool:
    return (
        op["kind"] == "low_rank"
        and op["activation"] == "identity"
        and not {"a_bias", "b_bias", "positions"} & op.keys()
    )


def _same_shapes(
    first: StoredDelta, mine: Mapping[str, Any], second: StoredDelta, theirs: Mapping[str, Any]
) -> bool:
    here = {field: first.shape(name) for field, name in _tensors(mine).items()}
    there = {field: second.shape(name) for field, name in _tensors(theirs).items()}
    if _is_linear(mine) and _is_linear(theirs):  # ranks may differ
        return (here["A"][1], here["B"][0]) == (there["A"][1], there["B"][0])
    return here == there and _is_linear(mine) == _is_linear(theirs)


def _norm(terms: list[tuple[float, StoredDelta, Mapping[str, Any]]]) -> float:
    """The norm of the sum of one or two ops, each times its sign."""
    if all(_is_linear(op) for _, _, op in terms):
        factors = [
            (
                sign * op["scaling"] * delta.tensor(op["B"]),
                delta.tensor(op["A"]),
            )
            for sign, delta, op in terms
        ]
        left = torch.linalg.qr(torch.cat([B for B, _ in factors], dim=1), mode="r").R
        right = torch.linalg.qr(torch.cat([A for _, A in factors]).T, mode="r").R
        return float(torch.linalg.matrix_norm(left @ right.T))
    total = 0.0
    for field in _tensors(terms[0][2]):
        streams = [(sign * _scale(op, field), delta.pieces(op[field])) for sign, delta, op in terms]
        for pieces in zip(*(stream for _, stream in streams), strict=True):
            summed = sum(sign * piece for (sign, _), piece in zip(streams, pieces, strict=True))
            total += float(torch.as_tensor(summed).square().sum())
    return math.sqrt(total)


def _scale(op: Mapping[str, Any], field: str) -> float:
    """What a tensor is multiplied with when it is used, so that rescaled tensors compare as equal."""
    return float(op["scaling"]) if op["kind"] == "weight_delta" and field == "values" else 1.0
