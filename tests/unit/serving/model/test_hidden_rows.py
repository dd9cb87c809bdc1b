"""The final hidden states that a forward hands over beside the logits."""

from __future__ import annotations

import pytest
import torch

from serving.model.backbone import adopt_backbone
from serving.model.context import ForwardContext
from serving.model.kv_cache import RowSpan
from tests.cases import tiny_backbone
from tests.families import Family


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bloom"])
def test_wanted_rows_are_the_models_last_hidden_states(family: Family) -> None:
    rows = [[5, 9, 2, 40, 7], [3, 11], [8]]
    stock = tiny_backbone(family)
    with torch.no_grad():
        expected = [stock.base_model(torch.tensor([row])).last_hidden_state[0] for row in rows]
    backbone = adopt_backbone(tiny_backbone(family), name="tiny", device="cpu", dtype="float32")
    cache = backbone.new_cache(3, 8)
    spans = [RowSpan(0, 5, 0, 0), RowSpan(5, 7, 1, 0), RowSpan(7, 8, 2, 0)]
    context = ForwardContext([None] * len(backbone.spec.modules), cache.plan(spans))
    context.hidden_rows = torch.tensor([4, 7, 6, 0])
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    logits = backbone.forward(
        torch.tensor([token for row in rows for token in row]), positions, context, torch.tensor([6])
    )
    assert logits.shape[0] == 1
    assert context.hidden is not None
    wanted = torch.stack([expected[0][4], expected[2][0], expected[1][1], expected[0][0]])
    torch.testing.assert_close(context.hidden, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
