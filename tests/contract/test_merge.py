"""Merged weights: the same module output for every method that is affine, and a backbone that is never written to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.model.backbone import Backbone, adopt_backbone
from serving.model.context import ForwardContext
from serving.model.kv_cache import RowSpan
from serving.model.merge import merge, mergeable_modules, merged_bytes
from serving.model.packed import plain_weight
from serving.model.programs import DeltaSegment, PlacedDelta, compile_programs
from tests.cases import ENCODER_GOLDEN_CASES, GOLDEN_NAME, PEFT_CASES, Case, tiny_backbone
from tests.contract.exactness import served

UNMERGED = (
    "adaption_prompt",
    "alora",
    "ln_tuning",
    "prefix",
    "prompt",
    "trainable_tokens",
)  # and their variants
TOKENS = 20


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return adopt_backbone(tiny_backbone("llama"), name="tiny", device="cpu", dtype="float32")


def linear_weights(backbone: Backbone) -> dict[str, Tensor]:
    modules = [module.path for module in backbone.spec.modules if module.shape.kind == "linear"]
    return {path: plain_weight(backbone.model.get_submodule(path)).clone() for path in modules}


def outputs(backbone: Backbone, delta: PlacedDelta, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(with the delta's ops, bare) of one module."""
    programs = compile_programs(
        len(backbone.spec.modules),
        backbone.kernels,
        [DeltaSegment(0, TOKENS, delta)],
        [],
        backbone.logit_modules,
    )
    program = programs[index]
    assert program is not None
    context = ForwardContext(programs, backbone.new_cache(1, 1).plan([RowSpan(0, 1, 0, 0)]))
    base = backbone.model.get_submodule(backbone.spec.modules[index].path)
    return program.run(context, base, x.clone(), (), {}), base(x)


@pytest.mark.parametrize("case", [c for c in PEFT_CASES if c.family == "llama"], ids=lambda c: c.name)
def test_merged_modules_equal_their_ops(case: Case, backbone: Backbone, tmp_path: Path) -> None:
    case.save(tmp_path)
    delta, before = served(tmp_path, backbone), linear_weights(backbone)
    merged = merge(delta, backbone)
    assert sorted(merged) == sorted(mergeable_modules(delta, backbone))
    assert bool(merged) == (not case.name.startswith(UNMERGED) or case.name == "trainable_tokens_lora")
    assert (merged_bytes(delta, backbone) > 0) == bool(merged)
    torch.manual_seed(3)
    changed = 0.0
    for index, forward in merged.items():
        x = torch.randn(1, TOKENS, backbone.spec.modules[index].shape.d_in)
        exact, bare = outputs(backbone, delta, index, x)
        assert float((forward(x) - exact).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max()))
        changed = max(changed, float((exact - bare).abs().max()))
    assert not merged or changed > 0.05
    assert all(torch.equal(weight, before[path]) for path, weight in linear_weights(backbone).items())


def test_a_gated_lora_is_not_merged() -> None:
    """Its gate is a mean over a row, and differs from row to row."""
    cases = {case.name: case for case in ENCODER_GOLDEN_CASES if case.family == "roberta"}
    encoder = adopt_backbone(cases["lora_gated"].backbone(), name=GOLDEN_NAME, device="cpu", dtype="float32")
    assert mergeable_modules(served(cases["lora_everywhere"].directory, encoder), encoder)
    assert not mergeable_modules(served(cases["lora_gated"].directory, encoder), encoder)
