"""Kernels of WeightDelta, LinearMap, Rows and prompts against their formulas, placed as the server places them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from adapters.normal_form import Activation, LinearMap, Rows, Site, WeightDelta
from serving.kernels.ops import (
    DeltaKernels,
    LinearMapSegment,
    LowRankSegment,
    LowRankWeights,
    PromptSegment,
    PromptWeights,
    RowsSegment,
    Surroundings,
    WeightDeltaSegment,
)
from serving.kernels.reference import ReferenceKernels
from serving.model.place_matrices import place_blocks, place_reflections, place_rows, place_weight_delta
from tests.contract.executors import ROW_WISE

EXECUTORS: Sequence[DeltaKernels] = (ReferenceKernels(),)
SITE = Site("q.out", 0)
D_IN, D_OUT, START = 24, 40, 8  # columns 8 to 40 are written
COLUMNS = D_OUT - START


def to_device(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.to(dtype)


def random(*shape: int) -> Tensor:
    return torch.randn(shape)


def layouts() -> dict[str, tuple[WeightDelta, Tensor]]:
    """Each layout with its dense matrix, made from the definition in the normal form."""
    torch.manual_seed(5)
    dense, left, right, kernel = random(COLUMNS, D_IN), random(4, 6), random(8, 4), random(4, 3, 8)
    indices = torch.stack([torch.randint(0, COLUMNS, (50,)), torch.randint(0, D_IN, (50,))]).int()
    indices[:, 1] = indices[:, 0]  # a repeated place
    values, scattered = random(50), torch.zeros(COLUMNS, D_IN)
    for (row, column), value in zip(indices.t().tolist(), values, strict=True):
        scattered[row, column] += value
    circulant = torch.zeros(COLUMNS, D_IN)
    for row in range(COLUMNS):
        for column in range(D_IN):
            circulant[row, column] = kernel[row // 8, column // 8, (column % 8 - row % 8) % 8]
    made = {"dense": (dense, {}, dense), "sparse": (values, {"indices": indices}, scattered),
            "kron": (right, {"left": left}, torch.kron(left, right)), "circulant": (kernel, {}, circulant)}  # fmt: skip
    return {
        name: (WeightDelta(site=SITE, layout=name, values=stored, scaling=1.5, **extra), 1.5 * matrix)  # type: ignore[arg-type]
        for name, (stored, extra, matrix) in made.items()
    }


@pytest.mark.parametrize("kernels", EXECUTORS, ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("layout", ["dense", "sparse", "kron", "circulant"])
def test_weight_delta_equals_its_matrix(kernels: DeltaKernels, layout: str) -> None:
    op, matrix = layouts()[layout]
    y, x = random(9, D_OUT), random(9, D_IN)
    before, expected = y.clone(), y.double()
    segments = []
    for start, stop in ((1, 2), (4, 8)):
        weights = place_weight_delta(op, START, D_OUT, D_IN, to_device)
        segments.append(WeightDeltaSegment(start, stop, weights))
        expected[start:stop, START:] += x[start:stop].double() @ matrix.double().T
    kernels.add_weight_delta(y, x, segments)
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=2e-5)
    for rows in (slice(0, 1), slice(2, 4), slice(8, 9)):
        assert torch.equal(y[rows], before[rows])


@pytest.mark.parametrize("kernels", ROW_WISE)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("stages", "count"), [(1, 4), (3, 4), (2, 1)])
def test_linear_map_equals_its_matrices(
    kernels: DeltaKernels, ordered: bool, stages: int, count: int
) -> None:
    torch.manual_seed(6)
    blocks = random(stages, count, 8, 8) / 3
    order = torch.stack([torch.randperm(COLUMNS) for _ in range(stages)]).int() if ordered else None
    op = LinearMap(site=SITE, side="output", blocks=blocks, order=order)
    y = random(9, D_OUT)
    expected = y.double()
    for stage in range(stages):
        matrix = torch.block_diag(*blocks[stage].double().expand(4, 8, 8))
        if order is not None:
            shuffle = torch.eye(COLUMNS, dtype=torch.float64)[:, order[stage].long()]  # z = y @ shuffle
            matrix = shuffle @ matrix @ shuffle.T
        expected[2:7, START:] = expected[2:7, START:] @ matrix
    kernels.apply_linear_map(y, [LinearMapSegment(2, 7, place_blocks(op, START, D_OUT, to_device))])
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", ROW_WISE)
def test_reflections_run_in_turn(kernels: DeltaKernels) -> None:
    torch.manual_seed(7)
    rows = torch.nn.functional.normalize(random(5, D_IN), dim=1)
    x = random(9, D_IN)
    expected = x.double()
    for u in rows.double():
        expected[3:6] -= 2 * (expected[3:6] @ u)[:, None] * u
    kernels.add_low_rank(x, x, [LowRankSegment(3, 6, place_reflections(rows, to_device))])
    assert torch.allclose(x.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", EXECUTORS, ids=lambda k: type(k).__name__)
def test_rows_replace_embeddings_and_logits(kernels: DeltaKernels) -> None:
    torch.manual_seed(9)
    ids, rows = [11, 3, 7], random(3, D_IN)
    weights = place_rows(
        Rows(site=Site("embed"), ids=torch.tensor(ids).int(), rows=rows), nn.Identity(), to_device
    )
    tokens = torch.tensor([3, 3, 12, 0, 11, 7])
    y = random(6, D_IN)
    expected = y.clone()
    for at in (1, 4):  # of tokens 1 to 4; the first and the last belong to others
        expected[at] = rows[ids.index(int(tokens[at]))]
    kernels.replace_embeddings(y, tokens, [RowsSegment(1, 5, weights)])
    assert torch.equal(y, expected)

    x, logits = random(6, D_IN), random(6, 13)
    expected = logits.clone()
    expected[1:5, ids] = x[1:5] @ rows.T
    kernels.replace_logits(logits, x, [RowsSegment(1, 5, weights)])
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("kernels", EXECUTORS, ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("parts", [("in",), ("out",), ("gate",), ("in", "out", "gate")], ids="-".join)
def test_a_low_rank_with_norms_and_a_gate_equals_its_formula(
    kernels: DeltaKernels, parts: Sequence[str]
) -> None:
    torch.manual_seed(11)
    y, x = random(6, D_OUT), random(6, D_IN)
    pairs = {"in": (random(D_IN), random(D_IN)), "out": (random(COLUMNS), random(COLUMNS)),
             "gate": (random(D_IN), random(1))}  # fmt: skip
    in_norm, out_norm, gate = (pairs[name] if name in parts else None for name in ("in", "out", "gate"))
    weights = LowRankWeights(
        A=random(3, D_IN), B=random(3, COLUMNS), scaling=1.5, activation="relu", a_bias=random(3),
        b_bias=random(COLUMNS), start=START, stop=D_OUT, around=Surroundings(in_norm, out_norm, 1e-5, gate),
    )  # fmt: skip

    def normed(rows: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        if norm is None:
            return rows
        spread = (rows - rows.mean(-1, keepdim=True)) / (
            rows.var(-1, keepdim=True, correction=0) + 1e-5
        ).sqrt()
        return spread * norm[0].double() + norm[1].double()

    read, expected = x[1:4].double(), y.double()
    assert weights.a_bias is not None
    assert weights.b_bias is not None
    hidden = (normed(read, in_norm) @ weights.A.double().T + weights.a_bias.double()).clamp(min=0)
    added = 1.5 * (hidden @ weights.B.double() + weights.b_bias.double())
    if gate is not None:
        added = added * torch.sigmoid(read @ gate[0].double() + gate[1].double()).mean()
    expected[1:4, START:] += normed(added, out_norm)
    kernels.add_low_rank(y, x, [LowRankSegment(1, 4, weights)])
    assert torch.allclose(y.double(), expected, atol=1e-4)


@pytest.mark.parametrize("kernels", EXECUTORS, ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_prompt_attention_equals_its_formula(kernels: DeltaKernels, activation: Activation | None) -> None:
    torch.manual_seed(10)
    heads, kv_heads, width = 6, 2, 4
    y, query = random(5, heads * width), random(heads, 5, width)
    weights = PromptWeights(random(kv_heads, 3, width), random(kv_heads, 3, width), activation)
    expected = y.double()
    for head in range(heads):
        key, value = (x[head // 3].double() for x in (weights.key, weights.value))
        scores = 0.5 * query[head, 2:4].double() @ key.T
        mixed = {
            None: torch.softmax(scores, dim=-1),
            "relu": scores.clamp(min=0),
            "silu": scores * torch.sigmoid(scores),
        }[activation] @ value
        expected[2:4, head * width : (head + 1) * width] += mixed
    kernels.add_prompt_attention(y, query, 0.5, [PromptSegment(2, 4, weights)])
    assert torch.allclose(y.double(), expected, atol=1e-5)
