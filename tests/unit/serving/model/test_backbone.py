"""Loading a backbone: what is refused and why, and how far its positions reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, TaskType
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTBigCodeConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from adapters.errors import BackboneRefused, InvalidDelta
from adapters.formats import read_directory
from serving.model import parity
from serving.model.backbone import Backbone, adopt_backbone, load_backbone
from tests.cases import Case, quiet, spec_of, tiny_backbone
from tests.contract.bottleneck import Bottleneck, refused_placements
from tests.families import CONFIGS, FAMILIES, PADDED, Family

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
POST_LN = OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, do_layer_norm_before=False)
NARROW = OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=16)
NO_FINAL_NORM = OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, _remove_final_layer_norm=True)


def adopt(model: Any) -> Backbone:
    return adopt_backbone(model, name="tiny", device="cpu", dtype="float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_from_a_directory(family: Family, tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    tiny_backbone(family).save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path), name="tiny", device="cpu", dtype="float32")
    assert backbone.spec.digest == adopt(tiny_backbone(family)).spec.digest
    assert backbone.parity_error < 2e-6
    assert backbone.layout.name == ("padded" if family in PADDED else "flattened")
    assert backbone.spec.sees_queries == (family not in PADDED)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(**SMALL, slow_but_exact=True), "slow_but_exact=True .*pass their modules by"),
        (FalconConfig(**SMALL, alibi=True, eos_token_id=2), "alibi=True .*adds the biases twice"),
        (GPTBigCodeConfig(**GPT), "No site map for model_type 'gpt_bigcode'"),
        (POST_LN, "do_layer_norm_before=False"),
        (NARROW, "token embeddings of width 16"),
        (NO_FINAL_NORM, "no module 'model.decoder.final_layer_norm'"),
    ],
    ids=["module passed by", "alibi twice", "no map", "post-ln", "narrow embeddings", "no final norm"],
)
def test_what_a_site_map_does_not_cover_is_refused(config: PreTrainedConfig, reason: str) -> None:
    with quiet():
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(BackboneRefused, match=reason):
        adopt(model)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3_text"])
def test_a_layer_that_asks_for_another_window_is_refused(family: Family) -> None:
    model = tiny_backbone(family)
    layer = model.config.layer_types.index("sliding_attention")
    model.model.layers[layer].self_attn.sliding_window = None
    with pytest.raises(BackboneRefused, match=f"Layer {layer} .*asks for the window None"):
        adopt(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_and_windows(family: Family) -> None:
    """The probe's longest row crosses every tiny window, so that a window executed wrong would show there."""
    config = CONFIGS[family]
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    assert window is None or 2 * window < max(parity.LENGTHS)


def test_positions_end_where_a_longer_row_would_change_its_neighbours() -> None:
    longrope = spec_of(tiny_backbone("phi3"))
    assert longrope.max_positions == 64 < CONFIGS["phi3"].max_position_embeddings
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**SMALL, intermediate_size=64, max_position_embeddings=48, rope_parameters=rope)
    )
    assert spec_of(model).max_positions == 48


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_deltas_on_experts_are_refused_with_the_reason(family: Family, tmp_path: Path) -> None:
    config = LoraConfig(target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    Case("experts", family, lambda: config).save(tmp_path)
    with pytest.raises(InvalidDelta, match="each expert sees only some tokens") as caught:
        read_directory(tmp_path, spec_of(tiny_backbone(family)))
    assert "target_parameters" in str(caught.value)
    assert "the router of a mixture" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "placement"), [(family, place) for family in FAMILIES for place in refused_placements(family)]
)
def test_bottlenecks_without_an_exact_place_are_refused(
    family: Family, placement: Any, tmp_path: Path
) -> None:
    model = tiny_backbone(family)
    Bottleneck(placement, "relu", 4).save(tmp_path / "adapter", family, model)
    reason = "ffn.r is not a site|no module of the backbone writes"
    if family.startswith("gemma"):
        reason = "before or after that norm"
    with pytest.raises(InvalidDelta, match=reason):
        read_directory(tmp_path / "adapter", spec_of(model))
