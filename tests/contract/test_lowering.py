"""Every form of a change at a fused, transposed projection: the engine gives what the changed model gives."""

from __future__ import annotations

import pytest
import torch

from adapters.canonical import to_canonical
from adapters.errors import InvalidDelta
from adapters.validate import check
from serving.engine.runner import Runner
from serving.model.backbone import adopt_backbone
from serving.model.placement import place
from serving.offline.compress import Change, smallest
from serving.offline.lowering import to_delta
from serving.offline.probe import AffineMap
from tests.cases import tiny_backbone
from tests.contract.exactness import EFFECT, LIMITS
from tests.contract.forced import Row, errors, run

PATH = "transformer.h.1.attn.c_attn"  # writes q, k and v
DRAW = torch.Generator().manual_seed(3)
D_OUT, D_IN = 96, 32


def draw(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def sparse(weight: torch.Tensor) -> torch.Tensor:
    """Entries in rows of q and of v, none in k's."""
    rows, columns = torch.tensor([1, 7, 7, 70, 95]), torch.tensor([0, 3, 31, 2, 31])
    return weight.index_put((rows, columns), 4 * draw(5), accumulate=True)


CHANGED = {
    "low rank": lambda weight: weight + draw(D_OUT, 3) @ draw(3, D_IN),
    "sparse": sparse,
    "dense": lambda weight: weight + draw(D_OUT, D_IN),
    "scale of rows": lambda weight: weight * (1 + draw(D_OUT, 1)),
    "scale of columns": lambda weight: weight * (1 + draw(D_IN)),
    "none": lambda weight: weight,
}
FIELDS = {
    "low rank": {"A", "B"},
    "sparse": {"indices", "values"},
    "dense": {"dense"},
    "scale of rows": {"out_scale"},
    "scale of columns": {"in_scale"},
    "none": set(),
}


@pytest.mark.parametrize(
    ("form", "moved"),
    [(form, moved) for form in CHANGED for moved in (False, True) if form != "none" or moved],
)
def test_every_form_equals_the_changed_model(form: str, moved: bool) -> None:
    model = tiny_backbone("gpt2")
    target = model.get_submodule(PATH)
    base = AffineMap(target.weight.detach().T.double(), target.bias.detach().double())
    changed = AffineMap(CHANGED[form](base.weight), base.bias + (draw(D_OUT) if moved else 0.0))
    change = smallest(changed, base)
    assert set(change.tensors()) == FIELDS[form] | ({"shift"} if moved else set())

    tokens = list(range(5, 25))
    with torch.no_grad():
        bare = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        target.weight.copy_(changed.weight.T)
        target.bias.copy_(changed.bias)
        expected = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    assert float((expected - bare).abs().max()) > EFFECT

    backbone = adopt_backbone(tiny_backbone("gpt2"), name="tiny", device="cpu", dtype="float32")
    delta = to_delta({PATH: change}, backbone.spec, method="MADE_HERE", lineage={})
    assert check(delta, backbone.spec) == []
    row = Row(form, tokens, 9, place(delta, to_canonical(delta).digest, backbone))
    run(Runner(backbone, num_slots=1, max_len=32), [row])
    assert max(errors(row, expected)) <= LIMITS["T2"] * max(1.0, float(expected.abs().max()))


def test_a_module_that_is_no_site_is_refused() -> None:
    backbone = adopt_backbone(tiny_backbone("mixtral"), name="tiny", device="cpu", dtype="float32")
    change = Change(shift=torch.ones(4))
    with pytest.raises(InvalidDelta, match="no such site"):
        to_delta({"model.layers.0.mlp.gate": change}, backbone.spec, method="MADE_HERE", lineage={})
