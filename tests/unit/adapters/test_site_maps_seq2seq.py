"""Site maps of encoder-decoders against the modules that transformers makes of their configs."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    MarianConfig,
    MBartConfig,
    MT5Config,
    PegasusConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from adapters.backbone_spec import BackboneSpec
from adapters.canonical import from_canonical, to_canonical
from adapters.errors import BackboneRefused
from adapters.normal_form import AttnPrefix, Delta, LowRank, Site
from adapters.site_maps import COMMON_NAMES, build_spec
from adapters.validate import check
from serving.model.backbone import _shape_of

BART: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 20, "max_position_embeddings": 32,
    "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip

CONFIGS: dict[str, PreTrainedConfig] = {
    "bart": BartConfig(**BART),
    "mbart": MBartConfig(**BART),
    "marian": MarianConfig(**BART),
    "pegasus": PegasusConfig(**BART),
    "t5": T5Config(**T5),
    "t5-gated": T5Config(**T5, feed_forward_proj="gated-gelu"),
    "mt5": MT5Config(**T5, feed_forward_proj="gated-gelu"),
}


def spec_of(model: PreTrainedModel, **changes: object) -> BackboneSpec:
    config = model.config.to_dict() | {
        name: getattr(model.config, name) for name in COMMON_NAMES if hasattr(model.config, name)
    }
    return build_spec(
        config | changes, lambda path: _shape_of(model, path), name="tiny", digest="0" * 64, names=("tiny",)
    )


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(
        copy.deepcopy(CONFIGS[request.param]), attn_implementation="eager"
    ).eval()


def test_every_linear_embedding_and_norm_that_runs_is_a_site(model: PreTrainedModel) -> None:
    ran = set()
    for path, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, path=path: ran.add(path))
    model(input_ids=torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[2, 8]]))
    weighted = {path for path in ran if hasattr(model.get_submodule(path), "weight")}
    positions = {path for path in weighted if path.endswith(("embed_positions", "relative_attention_bias"))}
    mapped = {m.path for m in spec_of(model).modules if list(model.get_submodule(m.path).children()) == []}
    assert weighted - positions == mapped


def test_sites_name_the_values_that_pass(model: PreTrainedModel) -> None:
    """Modules that read one site are given one value, and what a module writes is what its readers are given."""
    torch.manual_seed(1)
    given: dict[Site, torch.Tensor] = {}
    spec = spec_of(model)
    for module in spec.modules:
        live = model.get_submodule(module.path)

        def look(_live: nn.Module, args: Any, out: Any, module: Any = module) -> None:
            out = out[0] if isinstance(out, tuple) else out
            sites = [(part.site, out) for part in module.writes]
            if module.read is not None and module.read != Site("dec.final"):
                sites.append((module.read, args[0]))
            for site, value in sites:
                torch.testing.assert_close(value, given.setdefault(site, value), rtol=0, atol=0)

        live.register_forward_hook(look)
    model(input_ids=torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[2, 8]]), use_cache=False)
    assert {site.stack for site in given} == {"enc", "dec", "dec.cross", ""}
    for stack, layers in (("enc", 3), ("dec", 2)):
        for layer in range(1, layers):
            before, after = (
                given[Site(f"{stack}.layer.out", layer - 1)],
                given[Site(f"{stack}.attn.r", layer)],
            )
            torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_spec_counts_both_stacks(model: PreTrainedModel) -> None:
    spec = spec_of(model)
    assert (spec.kind, spec.num_encoder_layers, spec.num_layers, spec.num_heads) == (
        "encoder-decoder",
        3,
        2,
        4,
    )
    assert spec.head_dim == (8 if spec.model_type in ("t5", "mt5") else 4)
    assert {site.layer for site in spec.writer if site.stack == "enc"} == {-1, 0, 1, 2}
    assert {site.layer for site in spec.writer if site.stack.startswith("dec")} == {-1, 0, 1}
    assert BackboneSpec.from_json(spec.to_json()) == spec


def test_stacks_of_different_heads_and_tables_of_different_tokens_are_refused() -> None:
    with torch.device("meta"):
        bart = AutoModelForSeq2SeqLM.from_config(BartConfig(**BART))
        marian = AutoModelForSeq2SeqLM.from_config(MarianConfig(**BART))
    with pytest.raises(BackboneRefused, match="2 and 4 attention heads"):
        spec_of(bart, decoder_attention_heads=2)
    with pytest.raises(BackboneRefused, match="share_encoder_decoder_embeddings"):
        spec_of(marian, share_encoder_decoder_embeddings=False)


def prefix(stack: Any, layer: int, length: int = 2) -> AttnPrefix:
    return AttnPrefix(stack=stack, layer=layer, key=torch.rand(length, 4, 4), value=torch.rand(length, 4, 4))


def delta(*ops: Any) -> Delta:
    return Delta(method="TEST", ops=ops, backbone_digest="0" * 64)


@pytest.fixture(scope="module")
def bart() -> BackboneSpec:
    with torch.device("meta"):
        return spec_of(AutoModelForSeq2SeqLM.from_config(BartConfig(**BART)))


def low_rank(read: Site, write: Site, d_in: int = 16, d_out: int = 16) -> LowRank:
    return LowRank(read=read, write=write, A=torch.rand(2, d_in), B=torch.rand(d_out, 2))


def test_deltas_are_checked_within_their_stack(bart: BackboneSpec) -> None:
    fine = (
        low_rank(Site("enc.attn.r", 2), Site("enc.q.out", 2)),
        low_rank(Site("enc.final"), Site("dec.cross.k.out", 1)),
        low_rank(Site("dec.attn.r", 0), Site("dec.cross.q.out", 0)),
        low_rank(Site("dec.cross.r", 0), Site("dec.down.out", 0)),
    )
    assert check(delta(*fine), bart) == []
    wrong = {
        low_rank(Site("enc.attn.r", 1), Site("dec.q.out", 1)): "not upstream",
        low_rank(Site("dec.cross.r", 1), Site("dec.cross.k.out", 1)): "not upstream",
        low_rank(
            Site("dec.attn.r", 2), Site("dec.q.out", 2)
        ): "layer 2 is out of range: the backbone has 2 layers",
        low_rank(
            Site("enc.attn.r", 3), Site("enc.q.out", 3)
        ): "layer 3 is out of range: the backbone has 3 layers",
        low_rank(Site("attn.r", 0), Site("q.out", 0)): "unknown site",
    }
    for op, problem in wrong.items():
        assert any(problem in found for found in check(delta(op), bart)), (op.read, op.write)


def test_prefixes_are_checked_stack_by_stack(bart: BackboneSpec) -> None:
    every = [prefix("enc", i) for i in range(3)] + [
        prefix(s, i) for s in ("dec", "dec.cross") for i in range(2)
    ]
    assert check(delta(*every), bart) == []
    assert check(delta(*every[3:5]), bart) == []
    (problem,) = check(delta(*every[:2]), bart)
    assert "missing in layers 2.enc.kv" in problem
    assert any("2 AttnPrefix ops" in p for p in check(delta(*every, prefix("dec", 0)), bart))
    assert any("stack: expected one of 'enc'" in p for p in check(delta(prefix("", 0)), bart))
    decoder = replace(bart, kind="decoder")
    assert any("stack: expected one of ''" in p for p in check(delta(prefix("dec", 0)), decoder))


def test_the_stack_is_kept_in_the_canonical_pair_and_changes_no_older_digest(bart: BackboneSpec) -> None:
    written = to_canonical(delta(prefix("dec.cross", 0), prefix("enc", 1)))
    read = from_canonical(written.manifest, written.tensors)
    assert [op.stack for op in read.ops if isinstance(op, AttnPrefix)] == ["dec.cross", "enc"]
    assert b'"stack"' not in to_canonical(delta(prefix("", 0))).manifest
