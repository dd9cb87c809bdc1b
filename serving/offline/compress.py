"""The smallest form that holds a change of a weight exactly: a scale, low rank, sparse, or the whole matrix.

Exact is to the precision of fp32, in which deltas are stored: what a form leaves out is at most EXACT of the change's
largest singular value (low rank) or entry (the others), or within the noise of the probe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from serving.offline.probe import AffineMap

EXACT = 2.0**-22  # two units in the last place of fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What is added to a module y = W x + b: one form of the weight's change at most, and a shift of the bias.

    Shapes: A [r, d_in] with B [d_out, r]; indices [2, nnz] int32 (row, column) with values [nnz]; dense
    [d_out, d_in]; out_scale [d_out], in_scale [d_in] (W x with its rows or columns scaled, b left alone); shift
    [d_out]. All fp32 but the indices.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    indices: Tensor | None = None
    values: Tensor | None = None
    dense: Tensor | None = None
    out_scale: Tensor | None = None
    in_scale: Tensor | None = None
    shift: Tensor | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that there are, by field."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def form(self) -> str:
        """How the change is held, in words."""
        words = {
            "A": "low rank",
            "values": "sparse",
            "dense": "dense",
            "out_scale": "scale",
            "in_scale": "scale",
        }
        words["shift"] = "bias"
        return " + ".join(word for name, word in words.items() if name in self.tensors()) or "none"

    def apply(self, base: AffineMap, x: Tensor) -> Tensor:
        """The changed module's output as the executor computes it, in the dtype of `x`."""
        given = {name: t.to(x.dtype) for name, t in self.tensors().items() if name != "indices"}
        weight, bias = base.weight.to(x.dtype), base.bias.to(x.dtype)
        y = (x * given.get("in_scale", 1.0)) @ weight.T
        y = y * given.get("out_scale", 1.0) + bias + given.get("shift", 0.0)
        if "A" in given:
            y = y + (x @ given["A"].T) @ given["B"].T
        if "dense" in given:
            y = y + x @ given["dense"].T
        if self.indices is not None:
            rows, columns = self.indices.long()
            y = y.index_add(-1, rows, x[..., columns] * given["values"])
        return y


def smallest(adapted: AffineMap, base: AffineMap) -> Change:
    """The form of `adapted` - `base` that takes the fewest bytes; nothing at all where they are equal."""
    weight, bias = adapted.weight - base.weight, adapted.bias - base.bias
    moved = float(bias.abs().max()) > max(4 * adapted.noise, EXACT * float(base.bias.abs().max()))
    shift = bias.float() if moved else None
    if not float(weight.abs().max()) > max(4 * adapted.noise, EXACT**2 * float(base.weight.abs().max())):
        return Change(shift=shift)
    found = [
        _out_scale(weight, base.weight),
        _in_scale(weight, base.weight),
        _low_rank(weight, adapted.noise),
        _sparse(weight, adapted.noise),
        Change(dense=weight.float().contiguous()),
    ]
    best = min((made for made in found if made is not None), key=lambda made: made.size_bytes)
    return Change(**{**best.tensors(), "shift": shift})


def _out_scale(change: Tensor, base: Tensor) -> Change | None:
    """Row i of the change is a multiple of row i of the base weight."""
    ratio = _ratio(change, base)
    return Change(out_scale=(1.0 + ratio).float()) if _equal(ratio[:, None] * base, change) else None


def _in_scale(change: Tensor, base: Tensor) -> Change | None:
    """Column j of the change is a multiple of column j of the base weight."""
    ratio = _ratio(change.T, base.T)
    return Change(in_scale=(1.0 + ratio).float()) if _equal(base * ratio, change) else None


def _ratio(change: Tensor, base: Tensor) -> Tensor:
    """The multiple of each row of `base` that comes nearest to the row of `change`."""
    return (change * base).sum(dim=1) / base.square().sum(dim=1).clamp(min=torch.finfo(base.dtype).tiny)


def _equal(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= EXACT * expected.abs().max())


def _low_rank(change: Tensor, noise: float) -> Change | None:
    """Factors, where their product is the change; None where its rank is too high for them to be smaller.

    The range is found from random columns, twice as many each time (Halko et al. "Finding structure with randomness",
    algorithm 4.2), since a whole decomposition of a wide matrix takes minutes.
    """
    d_out, d_in = change.shape
    most = d_out * d_in // (d_out + d_in)
    draw = torch.Generator().manual_seed(0)
    norm = float(torch.linalg.matrix_norm(change))
    columns = min(32, most)
    while columns > 0:
        basis = torch.linalg.qr(change @ torch.randn(d_in, columns, generator=draw, dtype=change.dtype)).Q
        rows = basis.T @ change
        left_out = float(torch.linalg.matrix_norm(change - basis @ rows))
        if left_out <= max(EXACT * norm, 2 * noise * change.numel() ** 0.5):
            return _factors(basis, rows, noise)
        columns = 0 if columns == most else min(2 * columns, most)
    return None


def _factors(basis: Tensor, rows: Tensor, noise: float) -> Change:
    """basis @ rows without the directions that are noise. Shapes: basis [d_out, k], rows [k, d_in]."""
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    # the largest singular value of independent noise in every entry
    floor = max(EXACT * float(sizes[0]), 2 * noise * (len(basis) ** 0.5 + rows.shape[1] ** 0.5))
    rank = max(1, int((sizes > floor).sum()))
    root = sizes[:rank].sqrt()
    B = basis @ (left[:, :rank] * root)
    return Change(A=(root[:, None] * right[:rank]).float().contiguous(), B=B.float().contiguous())


def _sparse(change: Tensor, noise: float) -> Change | None:
    """The entries that are not zero, where they and their places take less than the matrix."""
    found = change.abs() > max(EXACT * float(change.abs().max()), 4 * noise)
    if 3 * int(found.sum()) >= change.numel():
        return None
    indices = found.nonzero().T
    return Change(indices=indices.to(torch.int32).contiguous(), values=change[tuple(indices)].float())
