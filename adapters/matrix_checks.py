"""Checking the ops that map, add to or replace a module's weight: LinearMap, WeightDelta, Rows, Head."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from adapters.normal_form import SCORES, Head, Layout, LinearMap, Rows, WeightDelta
from adapters.op_checks import LINEAR_KINDS, OpChecker, width_of

INDEX_DTYPES = (torch.int32, torch.int64)
MAX_STAGES = 32
LAYOUTS: tuple[str, ...] = get_args(Layout)
UNIT_TOLERANCE = 1e-3


def linear_map(checker: OpChecker, op: LinearMap) -> None:
    """Check one LinearMap."""
    target = checker.target(op.site, LINEAR_KINDS)
    if op.side not in ("input", "output"):
        checker.add("side: expected 'input' or 'output'.")
    if (op.blocks is None) == (op.reflections is None):
        checker.add("expected either blocks or reflections.")
    width = width_of(target) if op.side == "output" or target is None else target[0].shape.d_in
    if op.blocks is not None:
        _blocks(checker, op.blocks, op.order, width)
    elif op.order is not None:
        checker.add("order: only blocks have an order of columns.")
    if op.reflections is not None:
        if op.side != "input":
            checker.add("reflections: run only on the input side.")
        rank = _size(op.reflections, 0)
        if rank < 1 or (width is not None and rank > width):
            checker.add(f"reflections: {rank} rows, expected 1 to {width}.")
        if checker.tensor("reflections", op.reflections, (rank, width)):
            norms = torch.linalg.vector_norm(op.reflections.float(), dim=1)
            if bool(((norms - 1).abs() > UNIT_TOLERANCE).any()):
                checker.add("reflections: expected rows of norm 1.")


def _blocks(checker: OpChecker, blocks: Tensor, order: Tensor | None, width: int | None) -> None:
    stages, count, size = (_size(blocks, dim) for dim in range(3))
    if not 1 <= stages <= MAX_STAGES:
        checker.add(f"blocks: {stages} stages, expected 1 to {MAX_STAGES}.")
    checker.tensor("blocks", blocks, (stages, count, size, size))
    if width is not None and (size < 1 or width % size or count not in (1, width // size)):
        checker.add(f"blocks: {count} of size {size} do not cut {width} columns into runs.")
    if order is None or not _indices(checker, "order", order, (stages, width)):
        return
    straight = torch.arange(order.shape[1], device=order.device)
    if not bool((order.long().sort(dim=1).values == straight).all()):
        checker.add("order: each row must name every column once.")


def weight_delta(checker: OpChecker, op: WeightDelta) -> None:
    """Check one WeightDelta."""
    target = checker.target(op.site, LINEAR_KINDS)
    checker.scaling(op.scaling)
    if op.layout not in LAYOUTS:
        checker.add(f"layout: expected one of {', '.join(LAYOUTS)}.")
    for name, layout in (("indices", "sparse"), ("left", "kron")):
        if (getattr(op, name) is not None) != (op.layout == layout):
            checker.add(f"{name}: belongs to the layout {layout}, and only there.")
    d_out, d_in = width_of(target), None if target is None else target[0].shape.d_in
    if op.layout == "dense":
        checker.tensor("values", op.values, (d_out, d_in))
    elif op.layout == "sparse":
        _sparse(checker, op, d_out, d_in)
    elif op.layout == "kron":
        _kron(checker, op, d_out, d_in)
    elif op.layout == "circulant":
        size = _size(op.values, 2)
        fits = size > 0 and not any(width % size for width in (d_out, d_in) if width is not None)
        if not fits:
            checker.add(f"values: blocks of {size} do not cut {d_out} by {d_in}.")
        else:
            expected = tuple(None if width is None else width // size for width in (d_out, d_in))
            checker.tensor("values", op.values, (*expected, size))


def _sparse(checker: OpChecker, op: WeightDelta, d_out: int | None, d_in: int | None) -> None:
    count = _size(op.values, 0)
    checker.tensor("values", op.values, (count,))
    if op.indices is None or not _indices(checker, "indices", op.indices, (2, count)):
        return
    for row, width in zip(op.indices, (d_out, d_in), strict=True):
        if width is not None and row.numel() and not (int(row.min()) >= 0 and int(row.max()) < width):
            checker.add(f"indices: expected 0 to {width - 1} where the weight has {width}.")


def _kron(checker: OpChecker, op: WeightDelta, d_out: int | None, d_in: int | None) -> None:
    shapes = [
        tuple(t.shape) if isinstance(t, Tensor) and t.dim() == 2 else (0, 0) for t in (op.left, op.values)
    ]
    (a, c), (b, d) = shapes
    checker.tensor("left", op.left, (None, None))
    checker.tensor("values", op.values, (None, None))
    if (d_out is not None and a * b != d_out) or (d_in is not None and c * d != d_in):
        checker.add(f"left [{a}, {c}] and values [{b}, {d}] do not make [{d_out}, {d_in}].")


ROWS_KINDS = {"embed": ("embedding",), "logits": LINEAR_KINDS}


def rows(checker: OpChecker, op: Rows) -> None:
    """Check one Rows."""
    if op.site.local not in ROWS_KINDS:
        checker.add("rows are replaced only at embed and logits.")
        return
    checker.target(op.site, ROWS_KINDS[op.site.local])
    count = _size(op.rows, 0)
    if count < 1:
        checker.add("rows: expected at least one.")
    checker.tensor("rows", op.rows, (count, checker.spec.modules[0].shape.d_out))
    if not _indices(checker, "ids", op.ids, (count,)) or count < 1:
        return
    if not (int(op.ids.min()) >= 0 and int(op.ids.max()) < checker.spec.vocab_size):
        checker.add(f"ids: expected 0 to {checker.spec.vocab_size - 1}.")
    if len(set(op.ids.tolist())) != count:
        checker.add("ids: each token can be replaced once.")


def head(checker: OpChecker, op: Head) -> None:
    """Check one Head at `logits`; the stages of a task head are checked together (`head_checks`)."""
    if op.site == SCORES:
        return
    if op.site.name != "logits":
        checker.add("a head is executed only at logits and scores.")
        return
    target = checker.target(op.site, LINEAR_KINDS)
    width = width_of(target)
    checker.tensor("weight", op.weight, (width, None if target is None else target[0].shape.d_in))
    if op.bias is not None:
        checker.tensor("bias", op.bias, (width,))
    for name in ("activation", "norm_weight", "norm_bias", "norm_eps", "class_means", "precision"):
        if getattr(op, name) is not None:
            checker.add(f"{name}: belongs to a stage of a task head, at scores.")


def _indices(checker: OpChecker, name: str, tensor: object, expected: tuple[int | None, ...]) -> bool:
    """Check the type and shape of integers; True where their values can be looked at."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in INDEX_DTYPES:
        checker.add(f"{name}: expected an int32 tensor.")
        return False
    return checker.shape(name, tensor, expected)


def _size(tensor: object, dim: int) -> int:
    return tensor.shape[dim] if isinstance(tensor, Tensor) and tensor.dim() > dim else 0
