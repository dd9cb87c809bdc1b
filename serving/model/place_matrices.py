"""Placing LinearMaps, WeightDeltas, Rows and replaced modules: from the normal form to what the kernels take."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.normal_form import Head, LinearMap, Rows, WeightDelta
from serving.kernels.ops import (
    CirculantWeights,
    DenseWeights,
    KronWeights,
    LinearMapWeights,
    LowRankWeights,
    Replacement,
    RowsWeights,
    SparseWeights,
    WeightDeltaWeights,
)


class Copy(Protocol):
    """Copies a tensor to the device and counts its bytes."""

    def __call__(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor: ...


def place_weight_delta(
    op: WeightDelta, start: int, stop: int, d_in: int, to_device: Copy
) -> WeightDeltaWeights:
    """ΔW [stop - start, d_in] over columns [start, stop), its scaling folded in."""
    values = op.values if op.scaling == 1.0 else op.scaling * op.values.float()
    match op.layout:
        case "dense":
            return DenseWeights(to_device(values), start, stop)
        case "kron":
            assert op.left is not None
            left = op.left if op.scaling == 1.0 else op.scaling * op.left.float()
            return KronWeights(to_device(left), to_device(op.values), start, stop)
        case "circulant":
            spectrum = torch.fft.rfft(values.float()).conj().resolve_conj()
            return CirculantWeights(to_device(spectrum, torch.complex64), op.values.shape[2], start, stop)
        case "sparse":
            assert op.indices is not None
            indices = to_device(op.indices, torch.int64)
            shape = (stop - start, d_in)
            # to coalesce what is in order already would copy indices that several modules share
            places = op.indices[0].long() * d_in + op.indices[1]
            matrix = torch.sparse_coo_tensor(
                indices,
                to_device(values),
                shape,
                check_invariants=False,
                is_coalesced=bool((places.diff() > 0).all()),
            )
            return SparseWeights(matrix.coalesce(), start, stop)


def place_blocks(op: LinearMap, start: int, stop: int, to_device: Copy) -> LinearMapWeights:
    """The stages of a LinearMap over columns [start, stop); a shared block stays one block in memory."""
    assert op.blocks is not None
    stages, _, size, _ = op.blocks.shape
    blocks = to_device(op.blocks).expand(stages, (stop - start) // size, size, size)
    order = None if op.order is None else to_device(op.order, torch.int64)
    return LinearMapWeights(blocks, order, start, stop)


def place_reflections(reflections: Tensor, to_device: Copy) -> LowRankWeights:
    """A product of reflections as a LowRank in place: x H_1 ... H_r = x - (x Uᵀ) T U with T upper triangular.

    Source: Schreiber and Van Loan, "A storage-efficient WY representation"; computed in fp64.
    """
    rows = reflections.double()
    rank, width = rows.shape
    factor = torch.zeros(rank, rank, dtype=torch.float64)
    for index in range(rank):
        factor[:index, index] = -2 * factor[:index, :index] @ (rows[:index] @ rows[index])
        factor[index, index] = 2
    return LowRankWeights(
        A=to_device(rows),
        B=to_device(-(factor @ rows)),
        scaling=1.0,
        activation="identity",
        a_bias=None,
        b_bias=None,
        start=0,
        stop=width,
    )


def place_rows(op: Rows, base: nn.Module, to_device: Copy) -> RowsWeights:
    """Replaced rows of `base`, in the order of their ids, as it puts them out: Gemma's embedding scales its rows.

    A head's bias stays.
    """
    ids, order = op.ids.long().sort()
    rows = op.rows[order].float() * float(getattr(base, "embed_scale", 1.0))
    bias = getattr(base, "bias", None)
    kept = None if bias is None else to_device(bias[ids.to(bias.device)])
    return RowsWeights(to_device(ids, torch.int64), to_device(rows), kept)


def place_replaced_norm(base: nn.Module, weight: Tensor, bias: Tensor | None, to_device: Copy) -> Replacement:
    """The norm `base` with the delta's parameters, in fp32; a parameter that the delta leaves alone is copied."""
    norm = copy.deepcopy(base)
    del norm.forward  # the site hook: this norm runs bare
    norm.weight = nn.Parameter(to_device(weight), requires_grad=False)
    if bias is not None:
        norm.bias = nn.Parameter(to_device(bias), requires_grad=False)
    elif isinstance(old := getattr(base, "bias", None), Tensor):
        norm.bias = nn.Parameter(to_device(old), requires_grad=False)

    def run(x: Tensor) -> Tensor:
        out: Tensor = norm(x.to(torch.float32))
        return out

    return run


def place_head(op: Head, to_device: Copy) -> Replacement:
    """The head with the delta's own parameters, in fp32."""
    assert op.weight is not None
    weight = to_device(op.weight)
    bias = None if op.bias is None else to_device(op.bias)
    return lambda x: F.linear(x.to(torch.float32), weight, bias)
