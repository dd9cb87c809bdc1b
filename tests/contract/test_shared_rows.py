"""Modules that several calls share, against PEFT row by row: DeBERTa's relative embeddings, ALBERT's layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, OFTConfig, PrefixTuningConfig, TaskType
from torch import Tensor

from adapters.backbone_spec import SharedRows
from adapters.errors import BackboneRefused, InvalidDelta
from adapters.formats import read_directory
from adapters.normal_form import AttnPrefix, Delta, LowRank, Site
from adapters.positions import FirstTokens
from adapters.validate import check
from serving.engine.merging import HotMerge
from serving.engine.runner import Runner
from serving.model import padded_rows, shared_rows
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.context import ForwardContext
from serving.model.kv_cache import RowSpan
from serving.model.merge import merge, mergeable_modules
from serving.model.packed import Forward
from serving.model.padded import spread
from serving.model.programs import PlacedDelta
from tests.cases import Case, tiny_body
from tests.contract.exactness import EFFECT, LIMITS, outputs_of, rows_for, served, shuffled
from tests.contract.exactness import Method as Served
from tests.contract.forced import Row, run
from tests.families import CONFIGS, Encoder

TASK = TaskType.FEATURE_EXTRACTION
ROTATED = "oft"
CASES: dict[Encoder, dict[str, Any]] = {
    # tokens and relative embeddings pass the same projections
    "deberta_v3": {
        "lora": lambda: LoraConfig(task_type=TASK, r=4, target_modules=["query_proj", "key_proj", "dense"]),
        "other": lambda: LoraConfig(task_type=TASK, r=3, target_modules=["query_proj"], use_dora=True),
        "biases": lambda: LoraConfig(task_type=TASK, r=2, target_modules=["value_proj"], bias="all"),
        "ia3": lambda: IA3Config(task_type=TASK, target_modules=["key_proj"], feedforward_modules=[]),
        ROTATED: lambda: OFTConfig(task_type=TASK, target_modules=["query_proj"], oft_block_size=8),
        "norms": lambda: LNTuningConfig(task_type=TASK, target_modules=["encoder.LayerNorm"]),
        "values": lambda: LoraConfig(task_type=TASK, r=2, target_modules=["value_proj"]),
    },
    # relative embeddings have projections of their own
    "deberta_v2": {
        "all": lambda: LoraConfig(task_type=TASK, r=4, target_modules="all-linear"),
        "keys": lambda: LoraConfig(task_type=TASK, r=4, target_modules=["pos_key_proj"], bias="lora_only"),
        "queries": lambda: LoraConfig(task_type=TASK, r=4, target_modules=["pos_query_proj"], lora_alpha=32),
        "tokens": lambda: LoraConfig(task_type=TASK, r=4, target_modules=["query_proj", "key_proj"]),
    },
    "deberta_xlarge": {
        "norms": lambda: LNTuningConfig(task_type=TASK, target_modules=["LayerNorm"]),
        "narrow": lambda: LoraConfig(task_type=TASK, r=4, target_modules=["embed_proj", "dense"]),
    },
    "albert": {
        "all": lambda: LoraConfig(task_type=TASK, r=4, target_modules="all-linear"),
        "one": lambda: LoraConfig(
            task_type=TASK,
            r=4,
            target_modules=[f"1.albert_layers.0.{name}" for name in ("attention.query", "ffn_output")],
        ),
        "norms": lambda: LNTuningConfig(
            task_type=TASK, target_modules=["LayerNorm", "full_layer_layer_norm"]
        ),
    },
}


def backbone_of(family: Encoder) -> Backbone:
    return adopt_backbone(tiny_body(family), name="tiny", device="cpu", dtype="float32")


def saved(family: Encoder, name: str, directory: Path) -> Case:
    """An adapter of the body, written as a training script does."""
    sigma = 0.1 if name == ROTATED else 0.4
    case = Case(name, family, CASES[family][name], seed=len(name) + 3, sigma=sigma)
    case.save(directory, tiny_body(family))
    return case


def references(case: Case, rows: list[Row]) -> list[Tensor]:
    model = tiny_body(case.family)  # type: ignore[arg-type]
    adapted = case.build(model)
    return [outputs_of(adapted, model, case.family, row.given) for row in rows]


def worst(rows: list[Row], expected: list[Tensor]) -> float:
    """Largest error over the limit of re-associated operations."""
    scale = max(1.0, *(float(e.abs().max()) for e in expected))
    difference = max(
        float((torch.cat(r.logits) - e).abs().max()) for r, e in zip(rows, expected, strict=True)
    )
    return difference / scale / LIMITS["T2"]


def run_mixed(backbone: Backbone, deltas: Mapping[str, PlacedDelta | None]) -> dict[str, list[Row]]:
    """Rows of every delta in one batch, shuffled."""
    methods = [Served(name, "T2", lambda _dtype, _prompts: [], delta) for name, delta in deltas.items()]
    found = rows_for(methods, family="bert")
    run(Runner(backbone, num_slots=100, max_len=64), shuffled(found))
    return {mine[0].name: mine for mine in found}


@pytest.mark.parametrize("family", CASES)
def test_each_row_sees_what_its_delta_makes_of_shared_modules(family: Encoder, tmp_path: Path) -> None:
    backbone = backbone_of(family)
    cases = {name: saved(family, name, tmp_path / name) for name in CASES[family]}
    deltas = {name: served(tmp_path / name, backbone) for name in cases}
    rows = run_mixed(backbone, {"bare": None, **deltas})
    stock = tiny_body(family)
    bare = [outputs_of(stock, stock, family, row.given) for row in rows["bare"]]
    assert worst(rows["bare"], bare) <= 0.2
    for name, case in cases.items():
        expected = references(case, rows[name])
        changed = [
            outputs_of(stock, stock, family, row.given) - e
            for row, e in zip(rows[name], expected, strict=True)
        ]
        assert max(float(c.abs().max()) for c in changed) > EFFECT, name
        assert worst(rows[name], expected) <= 1, name


def test_merged_projections_project_the_relative_embeddings_too(tmp_path: Path) -> None:
    backbone = backbone_of("deberta_v3")
    case = saved("deberta_v3", "lora", tmp_path)
    delta = served(tmp_path, backbone)
    assert backbone.shared_modules & {*mergeable_modules(delta, backbone)}
    weights: Mapping[int, Forward] = merge(delta, backbone)
    runner = Runner(backbone, num_slots=10, max_len=64)
    runner.merging = cast(
        "HotMerge", SimpleNamespace(weights_for=lambda sole: weights if sole is delta else {})
    )
    (rows,) = rows_for([Served("lora", "T2", lambda _dtype, _prompts: [], delta)], family="bert")
    run(runner, rows)
    assert worst(rows, references(case, rows)) <= 1


def test_types_of_tokens_reach_padded_rows() -> None:
    backbone, stock = backbone_of("deberta_v2"), tiny_body("deberta_v2")
    rows, types = [[5, 9, 2, 40], [7, 8]], [[0, 0, 1, 1], [0, 1]]
    spans = [RowSpan(0, 4, 0, 0), RowSpan(4, 6, 1, 0)]
    plan = backbone.new_cache(2, 8).plan(spans)
    context = ForwardContext([None] * len(backbone.spec.modules), plan, hidden_rows=torch.arange(6))
    context.token_types = torch.tensor([*types[0], *types[1]])
    assert backbone.takes_token_types
    backbone.forward(torch.tensor([*rows[0], *rows[1]]), torch.tensor([0, 1, 2, 3, 0, 1]), context, None)
    with torch.no_grad():
        found = [
            stock(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([kinds])).last_hidden_state[0]
            for ids, kinds in zip(rows, types, strict=True)
        ]
    torch.testing.assert_close(context.hidden, torch.cat(found), atol=2e-5, rtol=0)


@pytest.mark.parametrize("fault", ["the base's table for all", "the first delta's for all"])
def test_a_shared_table_that_is_not_the_rows_own_shows(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbone_of("deberta_v3")
    cases = {name: saved("deberta_v3", name, tmp_path / name) for name in ("lora", "other")}
    right = shared_rows.shared_groups

    def broken(deltas: Any, *rest: Any) -> Any:
        groups = right(deltas, *rest)
        programs = (
            groups[0].programs if fault == "the first delta's for all" else [None] * len(groups[0].programs)
        )
        return [shared_rows.SharedGroup(g.first, g.stop, programs) for g in groups]

    monkeypatch.setattr("serving.engine.runner.shared_groups", broken)
    rows = run_mixed(backbone, {name: served(tmp_path / name, backbone) for name in cases})
    assert max(worst(rows[name], references(case, rows[name])) for name, case in cases.items()) > 10


def test_pads_that_are_not_masked_are_refused_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded_rows, "spread", lambda x, at, *shape: spread(x, at, *shape).clamp(min=1))
    with pytest.raises(BackboneRefused, match=r"padded rows: .* differs from the stock one"):
        backbone_of("deberta_xlarge")


def test_relative_embeddings_in_another_number_than_expected_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adapters.site_maps.shared_rows", lambda _: SharedRows(13, ("rel.post",)))
    with pytest.raises(BackboneRefused, match="of which there should be 13"):
        backbone_of("deberta_v3")


def test_albert_with_several_layers_in_a_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = type(CONFIGS["albert"])(**{**CONFIGS["albert"].to_diff_dict(), "inner_group_num": 2})
    monkeypatch.setitem(CONFIGS, "albert", changed)
    with pytest.raises(BackboneRefused, match="inner_group_num=2 is not served"):
        backbone_of("albert")


@pytest.mark.parametrize(
    "options",
    [
        {"pos_att_type": None},
        {"pos_att_type": ["c2p"], "share_att_key": False},
        {"relative_attention": False, "position_biased_input": True},
        {"norm_rel_ebd": "none", "position_buckets": -1, "max_relative_positions": 9, "type_vocab_size": 3},
    ],
)
def test_variants_of_deberta_are_served_with_deltas(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = type(CONFIGS["deberta_v3"])(**{**CONFIGS["deberta_v3"].to_diff_dict(), **options})
    monkeypatch.setitem(CONFIGS, "deberta_v3", changed)
    backbone = backbone_of("deberta_v3")
    cases = {name: saved("deberta_v3", name, tmp_path / name) for name in ("lora", "other")}
    rows = run_mixed(backbone, {"bare": None, **{name: served(tmp_path / name, backbone) for name in cases}})
    for name, case in cases.items():
        assert worst(rows[name], references(case, rows[name])) <= 1, name


def test_what_an_encoder_whose_own_code_attends_can_not_run_is_refused() -> None:
    backbone = backbone_of("deberta_v3")
    spec, keys = backbone.spec, torch.ones(2, 4, 8)
    prefix = Delta(
        method="PREFIX_TUNING",
        ops=tuple(AttnPrefix(layer=layer, key=keys, value=keys) for layer in range(3)),
        position_offset=2,
        task="embedding",
        backbone_digest=spec.digest,
    )
    assert any("takes no prefix" in text for text in check(prefix, spec))
    first = LowRank(
        read=Site("attn.r", 0),
        write=Site("q.out", 0),
        A=torch.ones(2, 32),
        B=torch.ones(32, 2),
        positions=FirstTokens(2),
    )
    positioned = Delta(method="LORA", ops=(first,), task="embedding", backbone_digest=spec.digest)
    assert any("relative embeddings pass here too" in text for text in check(positioned, spec))


@pytest.mark.parametrize("family", ["albert", "deberta_v3"])
def test_a_prefix_that_peft_would_ignore_is_refused(family: Encoder, tmp_path: Path) -> None:
    case = Case("prefix", family, lambda: PrefixTuningConfig(task_type=TASK, num_virtual_tokens=3))
    case.save(tmp_path, tiny_body(family))
    with pytest.raises(InvalidDelta, match="takes no past keys and values"):
        read_directory(tmp_path, backbone_of(family).spec)


def test_lora_on_the_convolution_is_refused(tmp_path: Path) -> None:
    case = Case(
        "conv", "deberta_xlarge", lambda: LoraConfig(task_type=TASK, r=2, target_modules=["conv.conv"])
    )
    case.save(tmp_path, tiny_body("deberta_xlarge"))
    with pytest.raises(InvalidDelta, match="A tensor without a site"):
        read_directory(tmp_path, backbone_of("deberta_xlarge").spec)
