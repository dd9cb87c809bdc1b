"""AdapterHub's methods beside bottlenecks: where their ops go, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from adapters.backbone_spec import BackboneSpec
from adapters.canonical import from_canonical, to_canonical
from adapters.errors import InvalidDelta
from adapters.formats import read_directory, read_upload
from adapters.normal_form import Affine, AttnPrefix, Delta, LowRank
from adapters.positions import FirstTokens, LastTokens
from tests.cases import GOLDEN, GOLDEN_NAME, GoldenCase, spec_of
from tests.families import Family

CONFIG, TENSORS = "adapter_config.json", "adapter.safetensors"

Config = dict[str, Any]
Tensors = dict[str, Tensor]


@lru_cache
def spec_for(family: Family) -> BackboneSpec:
    return spec_of(GoldenCase("seq_bn", family).backbone(), GOLDEN_NAME)


def read(family: Family, name: str) -> Delta:
    return read_directory(GOLDEN / family / name, spec_for(family))


def changed(
    family: Family,
    name: str,
    config: Callable[[Config], object] = lambda _: None,
    tensors: Callable[[Tensors], object] = lambda _: None,
) -> dict[str, bytes]:
    """The golden adapter after edits of its nested config and its tensors."""
    directory = GOLDEN / family / name
    raw, stored = json.loads((directory / CONFIG).read_bytes()), load((directory / TENSORS).read_bytes())
    config(raw)
    tensors(stored)
    return {CONFIG: json.dumps(raw).encode(), TENSORS: save(stored)}


def refusal(family: Family, files: dict[str, bytes]) -> InvalidDelta:
    with pytest.raises(InvalidDelta) as caught:
        read_upload(files, spec_for(family))
    return caught.value


def low_ranks(delta: Delta) -> set[tuple[str, str]]:
    return {(op.read.name, op.write.name) for op in delta.ops if isinstance(op, LowRank)}


@pytest.mark.parametrize(
    ("family", "name", "method", "places"),
    [
        ("llama", "lora", "lora", {("attn.x", "q.out"), ("attn.x", "v.out")}),
        ("gpt2", "lora", "lora", {("attn.x", "q.out"), ("attn.x", "v.out")}),
        ("gpt2", "lora_key", "lora", {("attn.x", "k.out")}),
        ("gpt2", "vera_ffn", "vera", {("ffn.x", "up.out")}),
        ("llama", "dvora", "dvora", {("attn.x", "v.out")}),
        (
            "llama",
            "union",
            "lora+seq_bn",
            {("attn.x", "q.out"), ("attn.x", "v.out"), ("layer.out", "layer.out")},
        ),
        ("gpt2", "mam", "mam", {("ffn.r", "down.out")}),
        ("llama", "noreft", "noreft", {("layer.out", "layer.out")}),
        ("gpt2", "direft_tied", "direft", {("layer.out", "layer.out")}),
    ],
)
def test_low_ranks_are_where_the_library_has_them(
    family: Family, name: str, method: str, places: set[tuple[str, str]]
) -> None:
    delta = read(family, name)
    assert (delta.method, low_ranks(delta), delta.position_offset) == (method, places, 0)


def test_llama_has_the_sides_of_the_feed_forward_block_exchanged() -> None:
    def scaled(family: Family) -> set[str]:
        return {op.site.name for op in read(family, "ia3").ops if isinstance(op, Affine)}

    assert scaled("gpt2") == {"k.out", "v.out", "up.out"}
    assert scaled("llama") == {"k.out", "v.out", "down.out"}


def test_dora_normalises_without_its_scaling_and_covers_the_bias() -> None:
    delta = read("llama", "dora")
    affines = [op for op in delta.ops if isinstance(op, Affine)]
    assert len(affines) == 12
    assert all(op.weight_normalized and op.covers_bias and op.norm_scaling == 1.0 for op in affines)
    assert {op.scaling for op in delta.ops if isinstance(op, LowRank)} == {1.5}


def test_fused_ia3_scales_by_alpha_what_has_no_vector() -> None:
    affines = {op.site.name: op for op in read("gpt2", "ia3_everywhere").ops if isinstance(op, Affine)}
    scale = affines["k.out"].scale
    assert scale is not None
    assert torch.equal(scale, torch.full((24,), 2.0))


def test_prefixes_start_at_position_0_in_every_layer() -> None:
    delta = read("llama", "mam")
    prefixes = [op for op in delta.ops if isinstance(op, AttnPrefix)]
    assert [op.layer for op in prefixes] == [0, 1, 2]
    assert (delta.num_virtual_tokens, delta.position_offset) == (3, 0)


def test_reft_acts_on_first_and_last_tokens() -> None:
    assert read("llama", "loreft").positions == {FirstTokens(2), LastTokens(1)}
    tied = read("gpt2", "direft_tied")
    assert tied.positions == {FirstTokens(2), LastTokens(2)}
    first, last = (op for op in tied.ops[:2] if isinstance(op, LowRank))
    assert first.A is last.A


def test_reft_acts_after_a_bottleneck_of_the_same_union() -> None:
    """As the library does, whatever the order of the configs."""
    reft, bottleneck = (
        json.loads((GOLDEN / "llama" / name / CONFIG).read_bytes()) for name in ("loreft", "seq_bn")
    )
    union = reft | {
        "name": "u",
        "config": {"architecture": "union", "configs": [reft["config"], bottleneck["config"]]},
    }
    stored = {
        key.replace(f".{name}.", ".u."): tensor
        for name in ("loreft", "seq_bn")
        for key, tensor in load((GOLDEN / "llama" / name / TENSORS).read_bytes()).items()
    }
    delta = read_upload({CONFIG: json.dumps(union).encode(), TENSORS: save(stored)}, spec_for("llama"))
    in_layer = [op for op in delta.ops if isinstance(op, LowRank) and op.write.layer == 1]
    assert [op.positions for op in in_layer] == [None, FirstTokens(2), LastTokens(1)]


def test_the_orthogonal_projection_is_the_one_of_torch() -> None:
    stored = load((GOLDEN / "llama" / "loreft" / TENSORS).read_bytes())
    stem = "model.layers.1.reft_layer.refts.loreft.units.0."
    linear = nn.utils.parametrizations.orthogonal(nn.Linear(24, 3, bias=False))
    linear.load_state_dict(
        {
            key.removeprefix(f"{stem}projection."): t
            for key, t in stored.items()
            if key.startswith(f"{stem}projection.")
        }
    )
    op = next(op for op in read("llama", "loreft").ops if isinstance(op, LowRank) and op.write.layer == 1)
    weight = linear.weight
    assert isinstance(weight, Tensor)
    assert torch.allclose(op.B.t(), weight, atol=1e-6)
    assert torch.allclose(op.A, stored[f"{stem}learned_source.weight"] - weight, atol=1e-6)


def test_positions_survive_the_canonical_form() -> None:
    delta = read("llama", "loreft")
    pair = to_canonical(delta)
    assert from_canonical(pair.manifest, pair.tensors).positions == delta.positions


def test_releases_before_1_1_ran_lora_unscaled() -> None:
    """The library corrects such a file when it loads it; unions it leaves alone."""
    old = changed("llama", "lora", lambda raw: raw.update(version="adapters.1.0.1"))
    assert {op.scaling for op in read_upload(old, spec_for("llama")).ops if isinstance(op, LowRank)} == {1.0}
    union = changed("llama", "union", lambda raw: raw.update(version="adapters.1.0.1"))
    assert read_upload(union, spec_for("llama")).ops[0].scaling == 4.0  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["lora", "prefix_tuning", "loreft", "seq_bn_inv", "compacterpp_shared_w"])
def test_files_of_a_bare_model_lack_the_first_part_of_the_path(name: str) -> None:
    def strip(stored: Tensors) -> None:
        for key in list(stored):
            stored[key.removeprefix("model.")] = stored.pop(key)

    files = changed("llama", name, tensors=strip)
    assert (
        to_canonical(read_upload(files, spec_for("llama"))).digest == to_canonical(read("llama", name)).digest
    )


def test_an_invertible_adapter_is_undone_only_in_the_librarys_own_classes() -> None:
    files = {
        name: (GOLDEN / "llama" / "seq_bn_inv_flex_head" / name).read_bytes() for name in (CONFIG, TENSORS)
    }
    undone = read_upload(files, spec_for("llama"))
    assert [op.write.name for op in undone.ops if isinstance(op, LowRank)][-4:] == [
        "embed",
        "embed",
        "final",
        "final",
    ]
    assert [op.scaling for op in undone.ops if isinstance(op, LowRank)][-4:] == [1.0, 1.0, -1.0, -1.0]
    plain = read("gpt2", "seq_bn_inv")
    assert {op.write.name for op in plain.ops if isinstance(op, LowRank)} == {"layer.out", "embed.post"}


def test_copies_of_a_prefix_may_be_absent() -> None:
    def only(part: str) -> Callable[[Tensors], object]:
        return lambda stored: [stored.pop(key) for key in list(stored) if part not in key]

    digest = to_canonical(read("gpt2", "prefix_tuning")).digest
    for part in ("transformer.prefix_tuning.", "h.2.attn."):
        files = changed("gpt2", "prefix_tuning", tensors=only(part))
        assert to_canonical(read_upload(files, spec_for("gpt2"))).digest == digest


def test_copies_of_a_prefix_must_agree() -> None:
    key = "transformer.h.1.attn.prefix_tuning.pool.prefix_tunings.prefix_tuning.self_prefix.wte.weight"
    error = refusal(
        "gpt2", changed("gpt2", "prefix_tuning", tensors=lambda stored: stored[key][0, 0].add_(1))
    )
    assert f"'{key}': it differs from" in str(error)


# ---- edited configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "key", "value", "said"),
    [
        ("llama", "lora", "use_gating", True, "depends on later tokens"),
        ("llama", "lora", "composition_mode", "multiply", "add or scale"),
        ("llama", "lora", "composition_mode", "scale", "only with r = 1"),
        ("llama", "lora", "alpha", 0, "a positive number"),
        ("llama", "lora", "r", 3, "expected [3, 24]"),
        ("llama", "lora", "attn_matrices", "q", "a list of strings"),
        ("llama", "lora", "attn_matrices", ["q", "k", "v"], "k_proj.loras.lora.lora_A"),
        ("llama", "lora", "attn_matrices", ["q"], "v_proj.loras.lora.lora_A"),
        ("llama", "lora", "selfattn_lora", False, "would change nothing"),
        ("llama", "lora", "output_lora", True, "mlp.up_proj.loras.lora.lora_A"),
        ("llama", "lora", "vera_d", 1, "takes an integer for null"),
        ("llama", "lora", "leave_out", [0], "model.layers.0.self_attn.q_proj.loras"),
        ("llama", "lora", "a_new_key", 0, "config.a_new_key"),
        ("gpt2", "lora", "use_dora", True, "the library has no dora on modules that hold q, k and v"),
        ("gpt2", "vera_ffn", "use_dora", True, "the library has no DoRA on Conv1D"),
        ("llama", "vera", "attn_matrices", ["q", "v"], "share lora_A and lora_B, but differ in size"),
        ("llama", "ia3", "use_dora", True, "without DoRA and VeRA"),
        ("llama", "prefix_tuning", "use_gating", True, "depends on later tokens"),
        ("llama", "prefix_tuning", "leave_out", [1], "in all layers or in none"),
        ("llama", "prefix_tuning", "flat", True, "self_prefix.control_trans"),
        ("llama", "prefix_tuning", "prefix_length", 4, "got shape [5, 24], expected [4, 24]"),
        ("llama", "prefix_tuning", "non_linearity", "prelu", "config.non_linearity"),
        ("llama", "noreft", "subtract_projection", None, "NoReFT (true) or DiReFT (false)"),
        ("llama", "noreft", "non_linearity", "relu", "two branches read the same value"),
        ("llama", "noreft", "layers", [0, 1, 2], "model.layers.1.reft_layer"),
        ("llama", "noreft", "layers", "some", "'all' or a list"),
        ("llama", "noreft", "output_reft", False, "the adapter has no place"),
        ("llama", "noreft", "r", 24, "expected less than the backbone's width, 24"),
        ("llama", "compacterpp", "phm_dim", 5, "does not divide"),
        ("llama", "compacterpp", "phm_bias", False, "adapter_down.0.b"),
        ("llama", "compacterpp_shared_w", "factorized_phm_W", False, "only with factorized_phm_W"),
        ("llama", "seq_bn_inv", "inv_adapter_reduction_factor", 0, "a positive number"),
        ("llama", "mam", "configs", [], "a list of 1 to 16 objects"),
        ("llama", "mam", "configs", [{"architecture": "fusion"}], "config.configs[0].architecture"),
    ],
)
def test_configs_are_refused_by_key(family: Family, name: str, key: str, value: object, said: str) -> None:
    error = refusal(family, changed(family, name, lambda raw: raw["config"].update({key: value})))
    assert said in str(error)


def test_reft_without_positions_changes_nothing() -> None:
    def none(raw: Config) -> None:
        raw["config"].update(prefix_positions=0, suffix_positions=0)

    assert "change nothing" in str(refusal("llama", changed("llama", "noreft", none)))


def test_a_reft_file_as_the_library_saves_it_does_not_say_what_it_is() -> None:
    error = refusal("llama", changed("llama", "noreft", lambda raw: raw["config"].pop("subtract_projection")))
    assert error.param == "subtract_projection"


def test_parts_of_a_union_may_not_act_at_one_place() -> None:
    def twice(raw: Config) -> None:
        raw["config"]["configs"].append(raw["config"]["configs"][1])

    assert "two parts of the union act here" in str(refusal("llama", changed("llama", "union", twice)))


def test_gated_parts_of_unipelt_are_named() -> None:
    with pytest.raises(InvalidDelta) as caught:
        read("gpt2", "unipelt")
    assert len(caught.value.problems) == 3
    assert all(f"config.configs[{i}].use_gating" in text for i, text in enumerate(caught.value.problems))


# ---- edited tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "end"),
    [
        ("llama", "dora", "layers.1.mlp.up_proj.loras.dora.m.weight"),
        ("gpt2", "lora", "h.2.attn.c_attn.loras.lora.lora_B"),
        ("gpt2", "ia3", "h.0.mlp.c_fc.loras.ia3.lora_B"),
        ("llama", "vera", "model.shared_parameters.vera.lora_A"),
        ("llama", "vera", "layers.0.self_attn.q_proj.loras.vera.vera_D"),
        ("llama", "loreft", "layers.2.reft_layer.refts.loreft.units.1.learned_source.bias"),
        ("llama", "compacterpp", "model.shared_parameters.compacterpp.phm_rule"),
        ("gpt2", "seq_bn_inv", "transformer.invertible_adapters.seq_bn_inv.G.2.bias"),
    ],
)
def test_every_tensor_must_be_there_fit_and_be_finite(family: Family, name: str, end: str) -> None:
    (key,) = [key for key in load((GOLDEN / family / name / TENSORS).read_bytes()) if key.endswith(end)]

    def longer(stored: Tensors) -> None:
        stored[key] = torch.cat([stored[key], stored[key][:1]])

    for edit, said in (
        (lambda stored: stored.pop(key), f"the file has no '{key}'"),
        (longer, f"'{key}': got shape"),
        (lambda stored: stored[key].view(-1)[0].fill_(math.nan), f"'{key}' has 1 non-finite value"),
        (lambda stored: stored.update({f"{key}x": stored[key].clone()}), f"without a site: '{key}x'"),
    ):
        assert said in str(refusal(family, changed(family, name, tensors=edit)))
