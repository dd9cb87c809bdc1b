"""Ops that no PEFT case puts where they can be put: slices of fused modules, ops together, a norm weight of 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.normal_form import Affine, Delta, Head, LinearMap, LowRank, Op, Site, WeightDelta
from adapters.validate import check
from serving.engine.runner import Runner
from serving.model.backbone import adopt_backbone
from serving.model.placement import place
from tests.cases import Family, tiny_backbone
from tests.contract.forced import Row, errors, run

TOKENS = [5, 17, 3, 88, 41, 9, 60, 2, 33]


def served(ops: tuple[Op, ...], model: PreTrainedModel) -> Row:
    """One request with a delta of `ops`, beside one without."""
    backbone = adopt_backbone(model, name="tiny", device="cpu", dtype="float32")
    delta = Delta(method="test", ops=ops, backbone_digest=backbone.spec.digest)
    assert check(delta, backbone.spec) == []
    row = Row("delta", TOKENS, 5, place(delta, "d" * 64, backbone))
    bare = Row("bare", TOKENS, 5, None)
    run(Runner(backbone, num_slots=2, max_len=16), [row, bare])
    assert float((torch.cat(row.logits) - torch.cat(bare.logits)).abs().max()) > 0.05
    return row


def same(row: Row, model: PreTrainedModel) -> None:
    with torch.no_grad():
        assert max(errors(row, model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0])) < 1e-4


def rotation(width: int) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width)).Q


def fused_slice(model: PreTrainedModel) -> tuple[Op, ...]:
    """k and v of the fused projection: a dense and a sparse ΔW on k, a rotation of v with its bias."""
    attention = model.transformer.h[1].attn.c_attn
    dense, turn = 0.3 * torch.randn(32, 32), rotation(32)
    indices = torch.tensor([[0, 7, 7], [3, 3, 31]], dtype=torch.int32)
    values = torch.tensor([0.9, -1.1, 0.7])
    with torch.no_grad():
        attention.weight[:, 32:64] += dense.T
        for row, column, value in zip(*indices.tolist(), values, strict=True):
            attention.weight[column, 32 + row] += value
        attention.weight[:, 64:] = attention.weight[:, 64:] @ turn
        attention.bias[64:] = attention.bias[64:] @ turn
    k, v = Site("k.out", 1), Site("v.out", 1)
    return (
        WeightDelta(site=k, layout="dense", values=dense),
        WeightDelta(site=k, layout="sparse", values=values, indices=indices),
        LinearMap(site=v, side="output", blocks=turn[None, None]),
    )


def everything_at_one_site(model: PreTrainedModel) -> tuple[Op, ...]:
    """y = ((W + ΔW) R s x + B A x) ⊙ m + bias, then turned: the order that the normal form states."""
    projection = model.transformer.h[0].mlp.c_proj
    scale, turn, dense = 1 + 0.3 * torch.randn(128), rotation(128), 0.2 * torch.randn(32, 128)
    A, B, m, after = torch.randn(3, 128), 0.2 * torch.randn(32, 3), 1 + 0.3 * torch.randn(32), rotation(32)
    with torch.no_grad():
        mapped = scale[:, None] * (turn @ (projection.weight + dense.T))
        projection.weight.copy_((mapped + A.T @ B.T) * m @ after)
        projection.bias.copy_(projection.bias @ after)
    down = Site("down.out", 0)
    return (
        LowRank(read=Site("ffn.a", 0), write=down, A=A, B=B),
        LinearMap(site=down, side="output", blocks=after[None, None]),
        Affine(site=down, scale=m, covers_bias=False),
        WeightDelta(site=down, layout="dense", values=dense),
        LinearMap(site=down, blocks=turn[None, None]),
        Affine(site=down, side="input", scale=scale),
    )


def dead_norm_columns(model: PreTrainedModel) -> tuple[Op, ...]:
    """A norm with weights of 0, which no factor could bring back, scaled and shifted besides."""
    norm = model.transformer.h[2].ln_2
    weight, bias, scale, shift = (
        1 + torch.randn(32),
        torch.randn(32),
        1 + 0.2 * torch.randn(32),
        torch.randn(32),
    )
    with torch.no_grad():
        norm.weight.copy_(weight * scale)
        norm.bias.copy_(bias * scale + shift)
    site = Site("ffn.x", 2)
    return (Affine(site=site, weight=weight, bias=bias), Affine(site=site, scale=scale, shift=shift))


def adapted_head(model: PreTrainedModel) -> tuple[Op, ...]:
    """Another head with a bias, which the base has not, a LowRank on top; the tied embedding stays."""
    weight, bias = 0.3 * torch.randn(97, 32), torch.randn(97)
    A, B = torch.randn(3, 32), 0.2 * torch.randn(97, 3)
    model.lm_head = torch.nn.Linear(32, 97)
    model.lm_head.weight.data, model.lm_head.bias.data = weight + 0.5 * B @ A, bias
    site = Site("logits")
    return (
        Head(site=site, weight=weight, bias=bias),
        LowRank(read=Site("final"), write=site, A=A, B=B, scaling=0.5),
    )


@pytest.mark.parametrize("edit", [fused_slice, everything_at_one_site, dead_norm_columns, adapted_head])
def test_ops_equal_edited_weights(edit: Callable[[PreTrainedModel], tuple[Op, ...]]) -> None:
    torch.manual_seed(8)
    family: Family = "gpt2"
    base, edited = tiny_backbone(family), tiny_backbone(family)
    for model in (base, edited):
        model.transformer.h[2].ln_2.weight.data[:20] = 0.0
    same(served(edit(edited), base), edited)
