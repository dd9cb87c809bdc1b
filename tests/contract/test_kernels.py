"""The kernel contract against its formula in float64, over segment shapes, ranks, activations and dtypes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from adapters.activations import FUNCTIONS
from serving.kernels.ops import AffineSegment, AffineWeights, DeltaKernels, LowRankSegment, LowRankWeights
from tests.contract.executors import ROW_WISE

D_IN, D_OUT = 24, 40
SEGMENTS = {
    "identical": [(0, 32, 0)],
    "distinct": [(i, i + 1, i) for i in range(16)],
    "uniform": [(i * 4, i * 4 + 4, i) for i in range(8)],
    "zipf": [(0, 13, 0), (13, 20, 1), (20, 24, 2), (24, 27, 3), (27, 29, 4), (29, 30, 5), (30, 31, 6)],
    "skewed": [(0, 20, 0), (20, 21, 1), (21, 22, 2), (22, 30, 3)],
    "gaps": [(3, 5, 0), (9, 10, 1), (30, 32, 2)],
    "empty": [],
}


def low_rank(
    seed: int, *, d_in: int = D_IN, activation: str = "identity", bias: bool = False
) -> LowRankWeights:
    draw = torch.Generator().manual_seed(seed)
    rank, start = (1, 4, 8, 64)[seed % 4], (0, 8)[seed % 2]
    stop = start + 32 if start else D_OUT
    return LowRankWeights(
        A=torch.randn(rank, d_in, generator=draw),
        B=torch.randn(rank, stop - start, generator=draw),
        scaling=(0.5, 2.0, -1.0)[seed % 3],
        activation=activation,  # type: ignore[arg-type]
        a_bias=torch.randn(rank, generator=draw) if bias else None,
        b_bias=torch.randn(stop - start, generator=draw) if bias else None,
        start=start,
        stop=stop,
    )


def formula(y: Tensor, x: Tensor, segments: Sequence[LowRankSegment]) -> Tensor:
    out = y.double().clone()
    for start, stop, w in segments:
        hidden = x[start:stop].double() @ w.A.double().T
        hidden = hidden + (0 if w.a_bias is None else w.a_bias.double())
        hidden = FUNCTIONS[w.activation](hidden)
        delta = hidden @ w.B.double() + (0 if w.b_bias is None else w.b_bias.double())
        out[start:stop, w.start : w.stop] += w.scaling * delta
    return out


@pytest.mark.parametrize("kernels", ROW_WISE)
@pytest.mark.parametrize("shape", sorted(SEGMENTS))
@pytest.mark.parametrize("activation", sorted(FUNCTIONS))
@pytest.mark.parametrize("bias", [False, True])
def test_low_rank_equals_its_formula(kernels: DeltaKernels, shape: str, activation: str, bias: bool) -> None:
    torch.manual_seed(1)
    y, x = torch.randn(32, D_OUT), torch.randn(32, D_IN)
    segments = [
        LowRankSegment(a, b, low_rank(s, activation=activation, bias=bias)) for a, b, s in SEGMENTS[shape]
    ]
    expected, before = formula(y, x, segments), y.clone()
    kernels.add_low_rank(y, x, segments)
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-4)
    touched = torch.zeros(32, D_OUT, dtype=torch.bool)
    for a, b, w in segments:
        touched[a:b, w.start : w.stop] = True
    assert torch.equal(y[~touched], before[~touched])
    assert bool(segments) == bool((y != before).any())


@pytest.mark.parametrize("kernels", ROW_WISE)
def test_sequential_reads_before_it_writes(kernels: DeltaKernels) -> None:
    torch.manual_seed(2)
    y = torch.randn(6, D_OUT)
    weights = low_rank(2, d_in=D_OUT, activation="relu", bias=True)
    segments = [LowRankSegment(1, 4, weights)]
    expected = formula(y, y.clone(), segments)
    kernels.add_low_rank(y, y, segments)
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernels", ROW_WISE)
@pytest.mark.parametrize(("scaled", "shifted"), [(True, False), (False, True), (True, True)])
def test_affine_equals_its_formula(kernels: DeltaKernels, scaled: bool, shifted: bool) -> None:
    torch.manual_seed(3)
    y = torch.randn(10, D_OUT)
    scale, shift = torch.randn(12) if scaled else None, torch.randn(12) if shifted else None
    expected = y.clone()
    part = expected[2:7, 5:17]
    expected[2:7, 5:17] = part * (1 if scale is None else scale) + (0 if shift is None else shift)
    kernels.apply_affine(y, [AffineSegment(2, 7, AffineWeights(scale, shift, 5, 17))])
    assert torch.allclose(y, expected, atol=1e-6)
