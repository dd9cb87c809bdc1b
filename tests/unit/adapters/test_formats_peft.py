"""PEFT readers: each lowered op against PEFT's own modules in float64, and every bad upload refused by name."""

from __future__ import annotations

import copy
import inspect
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load, save
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.errors import InvalidDelta
from adapters.formats import read_directory, read_upload
from adapters.formats.peft_config import IA3, LORA, PREFIX_TUNING, PROMPT_TUNING
from adapters.formats.peft_targets import pattern_value
from adapters.formats.schema import Rule
from adapters.normal_form import (
    Affine,
    AttnPrefix,
    Delta,
    LinearMap,
    LowRank,
    Site,
    VirtualTokens,
    WeightDelta,
)
from adapters.positions import FromInvocation
from tests.cases import (
    DIGEST,
    LOW_RANK_FAMILY_CASES,
    PEFT_CASES,
    Case,
    Family,
    case_id,
    quiet,
    spec_of,
    tiny_backbone,
)
from tests.families import CONFIGS

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BY_ID = {case_id(case): case for case in PEFT_CASES}
LINEAR_CASES = [
    case for case in PEFT_CASES if not case.name.startswith(("pr", "trainable", "adaption", "saved", "alora"))
]


@lru_cache
def spec_for(family: Family) -> BackboneSpec:
    return spec_of(tiny_backbone(family), "tiny-base")


@lru_cache
def saved(identity: str) -> tuple[PeftModel, dict[str, bytes]]:
    """The adapted model of a case and the files its `save_pretrained` leaves."""
    with tempfile.TemporaryDirectory() as directory:
        adapted = BY_ID[identity].save(Path(directory))
        return adapted, {name: (Path(directory) / name).read_bytes() for name in (CONFIG, TENSORS)}


def read(identity: str) -> Delta:
    return read_upload(saved(identity)[1], spec_for(BY_ID[identity].family))


def changed(
    identity: str,
    config: Callable[[dict[str, Any]], object] = lambda _: None,
    tensors: Callable[[dict[str, Tensor]], object] = lambda _: None,
) -> dict[str, bytes]:
    """The files of a case after editing config and tensors in place."""
    files = saved(identity)[1]
    raw, stored = json.loads(files[CONFIG]), load(files[TENSORS])
    config(raw)
    tensors(stored)
    return {CONFIG: json.dumps(raw).encode(), TENSORS: save(stored)}


def refusal(files: dict[str, bytes], family: Family = "llama", **claims: str) -> InvalidDelta:
    with pytest.raises(InvalidDelta) as caught:
        read_upload(files, spec_for(family), **claims)
    return caught.value


# ---- exactness ----------------------------------------------------------------------------------------------------


def module_output(module: ModuleSpec, delta: Delta, base: torch.nn.Module, x: Tensor) -> Tensor:
    """The normal form's definition at one module, float64: input scale, base, parallel LowRanks, Affine, bias."""
    sites = {part.site for part in module.writes}
    low_ranks = [op for op in delta.ops if isinstance(op, LowRank) and op.write in sites]
    affines = [op for op in delta.ops if isinstance(op, Affine) and op.site in sites]
    assert all(op.read == module.read and op.activation == "identity" for op in low_ranks)
    inputs = [op.scale for op in affines if op.side == "input"]
    assert len(inputs) <= 1
    base_bias = base.bias.detach() if module.shape.has_bias else torch.zeros(module.shape.d_out).double()
    maps = {op.side: op for op in delta.ops if isinstance(op, LinearMap) and op.site in sites}
    mapped = x * inputs[0].double() if inputs else x
    mapped = mapped @ map_matrix(maps["input"], module.shape.d_in) if "input" in maps else mapped
    weights = [op for op in affines if op.weight is not None]
    if weights:
        base = copy.deepcopy(base)
        base.weight.data = weights[0].weight.double()  # type: ignore[union-attr]
    y = base(mapped) - base_bias
    for op in delta.ops:
        if isinstance(op, WeightDelta) and op.site in sites:
            y = y + op.scaling * mapped @ weight_matrix(op, module.shape.d_out, module.shape.d_in).T
    for part in module.writes:
        columns = slice(part.start, part.stop)
        value, bias = y[:, columns], base_bias[columns]
        if module.shape.kind != "norm":
            weight = (base.weight.T if module.shape.kind == "conv1d" else base.weight)[columns].clone()
        for op in low_ranks:
            if op.write == part.site:
                A, B = op.A.double(), op.B.double()
                value = value + op.scaling * (
                    x @ A.T @ B.T + (0 if op.b_bias is None else op.b_bias.double())
                )
                weight = weight + op.scaling * B @ A
        here = [op for op in affines if op.site == part.site and op.side == "output"]
        bias = next((op.bias.double() for op in here if op.bias is not None), bias)
        scale, covered = torch.ones(()), False
        for op in here:
            if op.scale is not None:
                scale, covered = op.scale.double(), op.covers_bias
                scale = scale / weight.norm(dim=1) if op.weight_normalized else scale
        y[:, columns] = scale * (value + bias) if covered else scale * value + bias
        for op in here:
            if op.shift is not None:
                y[:, columns] += op.shift.double()
    return y @ map_matrix(maps["output"], module.shape.d_out) if "output" in maps else y


def map_matrix(op: LinearMap, width: int) -> Tensor:
    """R of a LinearMap, as the normal form defines it."""
    total = torch.eye(width).double()
    if op.reflections is not None:
        for u in op.reflections.double():
            total = total @ (torch.eye(width) - 2 * u[:, None] * u)
        return total
    assert op.blocks is not None
    size = op.blocks.shape[-1]
    for stage, blocks in enumerate(op.blocks.double()):
        shuffle = torch.eye(width).double()
        if op.order is not None:
            shuffle = shuffle[:, op.order[stage].long()]
        total = total @ shuffle @ torch.block_diag(*blocks.expand(width // size, size, size)) @ shuffle.T
    return total


def weight_matrix(op: WeightDelta, d_out: int, d_in: int) -> Tensor:
    """ΔW, as the normal form defines it."""
    values = op.values.double()
    match op.layout:
        case "kron":
            assert op.left is not None
            return torch.kron(op.left.double(), values)
        case "sparse":
            assert op.indices is not None
            rows, columns = op.indices.long()
            return torch.zeros(d_out, d_in).double().index_put((rows, columns), values, accumulate=True)
        case "circulant":
            size = values.shape[2]
            i, j = torch.meshgrid(torch.arange(d_in), torch.arange(d_out), indexing="xy")
            return values[j // size, i // size, (i % size - j % size) % size]
        case _:
            return values


# What a reader evaluates (rotations, factors) or PEFT computes (a Fourier transform) in fp32, whatever the dtype.
SINGLE_PRECISION = ("oft", "boft", "road", "hra", "lokr", "c3a")


@pytest.mark.parametrize("case", LINEAR_CASES, ids=case_id)
def test_each_module_gives_what_peft_gives(case: Case) -> None:
    adapted = case.build(tiny_backbone(case.family)).double()
    base = tiny_backbone(case.family).double()
    spec, delta = spec_for(case.family), read(case_id(case))
    touched = 0
    for module in spec.modules:
        if module.shape.kind in ("embedding", "layer"):
            continue
        x = torch.randn(7, module.shape.d_in, generator=torch.Generator().manual_seed(3)).double()
        live = adapted.base_model.model.get_submodule(module.path)
        takes = inspect.signature(live.forward).parameters
        with quiet(), torch.no_grad():  # SHiRA's sparse tensors warn
            expected = live(x[None], **{key: case.forward[key] for key in case.forward if key in takes})[0]
            got = module_output(module, delta, base.get_submodule(module.path), x)
            touched += (expected - base.get_submodule(module.path)(x)).abs().max() > 1e-2
        limit = 1e-6 if case in LOW_RANK_FAMILY_CASES else 1e-11  # the former fold in float32
        limit = 1e-5 if case.name.startswith(SINGLE_PRECISION) else limit
        assert (got - expected).abs().max() <= limit * max(1, expected.abs().max()), module.path
    assert touched == len({spec.writer[_site(op)][0].path for op in delta.ops})


def _site(op: object) -> Site:
    assert isinstance(op, LowRank | Affine | LinearMap | WeightDelta)
    return op.write if isinstance(op, LowRank) else op.site


@pytest.mark.parametrize("identity", ["llama-prefix", "gpt2-prefix", "llama-prefix_projection"])
def test_prefix_is_the_cache_that_peft_builds(identity: str) -> None:
    adapted, _ = saved(identity)
    delta = read(identity)
    with quiet(), torch.no_grad():
        cache = adapted.get_prompt(batch_size=1)
    assert [type(op) for op in delta.ops] == [AttnPrefix] * 3
    for op, layer in zip(delta.ops, cache.layers, strict=True):
        assert isinstance(op, AttnPrefix)
        assert torch.equal(op.key, layer.keys[0].transpose(0, 1))
        assert torch.equal(op.value, layer.values[0].transpose(0, 1))
        assert not torch.equal(op.key, op.value)
    assert (delta.position_offset, delta.num_virtual_tokens) == (5, 5)


@pytest.mark.parametrize("identity", ["llama-prompt", "gpt2-prompt"])
def test_prompt_is_what_peft_inserts(identity: str) -> None:
    adapted, _ = saved(identity)
    delta = read(identity)
    (op,) = delta.ops
    assert isinstance(op, VirtualTokens)
    with quiet(), torch.no_grad():
        assert torch.equal(op.embeddings, adapted.get_prompt(batch_size=1)[0])
    assert delta.position_offset == 6


def test_fused_projections_share_one_a_and_split_b() -> None:
    delta = read("gpt2-lora_fused")
    q, k, v = (op for op in delta.ops if isinstance(op, LowRank) and op.write.layer == 1)
    assert [op.write.name for op in (q, k, v)] == ["q.out", "k.out", "v.out"]
    assert q.A is k.A
    assert k.A is v.A
    assert delta.num_parameters == 3 * (4 * 32 + 96 * 4)


def test_rank_and_alpha_come_from_the_patterns() -> None:
    ops = {op.write: op for op in read("llama-lora_patterns_rslora").ops if isinstance(op, LowRank)}
    got = {(site.name, site.layer): (op.A.shape[0], op.scaling) for site, op in ops.items()}
    assert got == {
        ("q.out", 0): (4, 3 / math.sqrt(4)),
        ("q.out", 1): (2, 3 / math.sqrt(2)),
        ("q.out", 2): (4, 3 / math.sqrt(4)),
        ("down.out", 0): (7, 9 / math.sqrt(7)),
        ("down.out", 1): (7, 6 / math.sqrt(7)),
        ("down.out", 2): (7, 6 / math.sqrt(7)),
    }


@pytest.mark.parametrize(
    ("pattern", "path", "matched"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj", True),
        ("proj", "model.layers.0.self_attn.q_proj", False),
        ("layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", False),
        ("layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj", True),
        ("attn.q_proj", "self_attn.q_proj", False),
        ("self.attn.q_proj", "self_attn.q_proj", True),  # a dot is any character, as in PEFT
        ("^model.q", "model.q", True),
        ("^q", "model.q", False),
        ("longer.than.the.path", "path", False),
    ],
)
def test_patterns_match_as_the_regular_expression_does(pattern: str, path: str, matched: bool) -> None:
    import re  # noqa: PLC0415  only this test may compile a pattern

    assert bool(re.match(rf"(.*\.)?({pattern})$", path)) is matched
    assert pattern_value({pattern: 1}, path, 0) == int(matched)


def test_first_pattern_in_file_order_wins() -> None:
    path = "model.layers.0.self_attn.q_proj"
    assert pattern_value({"q_proj": 1, "self_attn.q_proj": 2}, path, 0) == 1
    assert pattern_value({"self_attn.q_proj": 2, "q_proj": 1}, path, 0) == 2


@pytest.mark.parametrize("word", ["all-linear", "ALL-linear"])
def test_all_linear_is_every_linear_module_but_the_head(word: str) -> None:
    files = changed("llama-lora_all_linear", lambda raw: raw.update(target_modules=word))
    assert len(read_upload(files, spec_for("llama")).ops) == 21
    error = refusal(changed("llama-lora_qv", lambda raw: raw.update(target_modules=word)))
    assert len(error.problems) == 2 * 5 * 3  # A and B of k, o, gate, up, down in three layers
    assert "lm_head" not in str(error)


@pytest.mark.parametrize("case", PEFT_CASES, ids=case_id)
def test_directory_and_upload_agree(case: Case, tmp_path: Path) -> None:
    for name, data in saved(case_id(case))[1].items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "README.md").write_text("a model card")
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04 never opened")
    delta = read_directory(tmp_path, spec_for(case.family))
    assert delta.backbone_digest == DIGEST
    assert delta.method == json.loads(saved(case_id(case))[1][CONFIG])["peft_type"]
    assert [type(op) for op in delta.ops] == [type(op) for op in read(case_id(case)).ops]


@pytest.mark.parametrize(
    "config",
    [
        {"lora_dropout": 0.3},
        {"inference_mode": False},
        {"fan_in_fan_out": True},
        {"peft_version": "0.4.0"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"megatron_core": None},
        {"merge_weights": False, "enable_lora": None},
        {"layers_pattern": []},
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}},
        {"task_type": None},
        {"exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj", "v_proj", "proj", "attn.k_proj"]},  # ends count only after a dot
        {"lora_alpha": 6.0},
    ],
    ids="+".join,
)
def test_inert_keys_change_nothing(config: dict[str, Any]) -> None:
    delta = read_upload(changed("llama-lora_qv", lambda raw: raw.update(config)), spec_for("llama"))
    plain = read("llama-lora_qv")
    for op, other in zip(delta.ops, plain.ops, strict=True):
        assert isinstance(op, LowRank)
        assert isinstance(other, LowRank)
        assert (op.write, op.scaling, op.A.equal(other.A)) == (other.write, other.scaling, True)


def test_absent_keys_have_pefts_defaults() -> None:
    def strip(raw: dict[str, Any]) -> None:
        for key in raw.keys() - {"peft_type", "target_modules", "r"}:
            del raw[key]

    op = read_upload(changed("llama-lora_qv", strip), spec_for("llama")).ops[0]
    assert isinstance(op, LowRank)
    assert op.scaling == 8 / 4  # PEFT's lora_alpha is 8


@pytest.mark.parametrize(
    ("config", "rules"),
    [
        (LoraConfig, LORA),
        (IA3Config, IA3),
        (PrefixTuningConfig, PREFIX_TUNING),
        (PromptTuningConfig, PROMPT_TUNING),
    ],
)
def test_every_key_that_this_peft_writes_has_a_rule(config: type, rules: Mapping[str, Rule]) -> None:
    assert {item.name for item in fields(config)} <= rules.keys()


# ---- which backbone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tiny-base", "/home/me/models/tiny-base", "org/tiny-base/", "C:\\models\\tiny-base"]
)
def test_base_model_by_name(name: str) -> None:
    files = changed("llama-lora_qv", lambda raw: raw.update(base_model_name_or_path=name))
    assert read_upload(files, spec_for("llama")).lineage == {"format": "peft"}


def test_unstated_base_is_noted() -> None:
    assert read("llama-lora_qv").lineage == {"format": "peft", "base": "unstated"}


def test_another_base_is_refused_with_names_and_remedy() -> None:
    files = changed("llama-lora_qv", lambda raw: raw.update(base_model_name_or_path="org/other-secret"))
    error = refusal(files)
    assert error.param == "base_model_name_or_path"
    assert "'tiny-base'" in str(error)
    assert "backbone_digest" in str(error)
    assert "other-secret" not in str(error)
    assert read_upload(files, spec_for("llama"), backbone_digest=DIGEST).lineage == {"format": "peft"}


def test_explicit_digest_decides_alone() -> None:
    files = changed("llama-lora_qv", lambda raw: raw.update(base_model_name_or_path="tiny-base"))
    error = refusal(files, backbone_digest="0" * 64)
    assert error.param == "backbone_digest"
    assert DIGEST in str(error)


def test_revision_needs_the_digest() -> None:
    files = changed(
        "llama-lora_qv", lambda raw: raw.update(base_model_name_or_path="tiny-base", revision="v2")
    )
    assert refusal(files).param == "revision"
    read_upload(files, spec_for("llama"), backbone_digest=DIGEST)


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", -4),
        ("r", 4.0),
        ("r", True),
        ("r", "4"),
        ("r", 10**6),
        ("lora_alpha", 0),
        ("lora_alpha", -1.5),
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("lora_alpha", 10**400),
        ("use_rslora", 1),
        ("use_dora", "yes"),
        ("bias", "some"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": None}),
        ("target_modules", 7),
        ("target_modules", ["q_proj", 7]),
        ("exclude_modules", ".*k_proj"),
        ("layers_to_transform", [0, -1]),
        ("layers_pattern", "blocks"),
        ("use_qalora", True),
        ("use_qalora", 0),
        ("use_bdlora", {"nblocks": 2}),
        ("alora_invocation_tokens", []),
        ("alora_invocation_tokens", [1, -2]),
        ("alora_invocation_tokens", "1"),
        ("loftq_config", {"loftq_bits": 4}),
        ("kasa_config", {}),
        ("corda_config", {"cache_file": "x"}),
        ("arrow_config", {"top_k": 1}),
        ("monteclora_config", {}),
        ("velora_config", {}),
        ("lora_ga_config", {}),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["experts"]),
        ("trainable_token_indices", [3]),
        ("ensure_weight_tying", True),
        ("megatron_config", {}),
        ("task_type", "SEQ_2_SEQ_LM"),
        ("lora_dropout", 1.5),
        ("base_model_name_or_path", 7),
        ("a_key_of_tomorrow", None),
    ],
)
def test_config_values_that_could_change_numbers_are_refused(key: str, value: object) -> None:
    error = refusal(changed("llama-lora_qv", lambda raw: raw.update({key: value})))
    assert error.param == key
    assert any(key in problem for problem in error.problems)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_initialisations_that_change_the_base_are_refused_with_the_remedy(init: str) -> None:
    error = refusal(changed("llama-lora_qv", lambda raw: raw.update(init_lora_weights=init)))
    assert error.param == "init_lora_weights"
    assert "changes the base model" in str(error)
    assert "path_initial_model_for_weight_conversion" in str(error)


@pytest.mark.parametrize(
    "pattern", ["(a+)+!", ".*q_proj", "q_proj|v_proj", "[qv]_proj", "q_proj$", "a^b", "^", "q\nproj"]
)
def test_patterns_that_are_regular_expressions_are_refused(pattern: str) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        error = refusal(changed("llama-lora_qv", lambda raw, key=key: raw.update({key: {pattern: 4}})))
        assert error.param == key
        assert "never run" in str(error)
        assert "\n" not in str(error)


def test_hostile_target_regex_is_not_run() -> None:
    files = changed("llama-lora_qv", lambda raw: raw.update(target_modules="(([a-z_0-9.])+)+!"))
    assert len(read_upload(files, spec_for("llama")).ops) == 6  # the tensors decide: complete in every layer


def test_a_replicated_layer_stack_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_for("llama")
    monkeypatch.setattr(CONFIGS["llama"], "num_hidden_layers", 3)  # PEFT writes the stack's 4 there
    stacked = LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]], task_type="CAUSAL_LM")
    Case("stacked", "llama", lambda: stacked).save(tmp_path)
    with pytest.raises(InvalidDelta) as caught:
        read_directory(tmp_path, spec)
    assert caught.value.param == "layer_replication"
    assert "runs layers of the backbone several times" in caught.value.problems[0]
    assert "layers.3.self_attn.q_proj" in str(
        caught.value
    )  # layers of that stack, which the backbone has not


def test_other_methods_are_refused_with_the_list() -> None:
    error = refusal(changed("llama-lora_qv", lambda raw: raw.update(peft_type="MY_METHOD")))
    assert error.param == "peft_type"
    assert "'MY_METHOD'" in str(error)
    assert "LORA, IA3, PREFIX_TUNING, PROMPT_TUNING" in str(error)
    assert refusal(changed("llama-lora_qv", lambda raw: raw.pop("peft_type"))).param == "peft_type"


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def drop(*ends: str) -> Callable[[dict[str, Tensor]], None]:
    def edit(stored: dict[str, Tensor]) -> None:
        for key in [key for key in stored if key.endswith(ends)]:
            del stored[key]

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (drop("layers.0.self_attn.q_proj.lora_A.weight"), ("layers.0.self_attn.q_proj", "no lora_A.weight")),
        (
            drop("layers.1.self_attn.v_proj.lora_A.weight", "layers.1.self_attn.v_proj.lora_B.weight"),
            ("layers.1.self_attn.v_proj", "no lora_A.weight", "no lora_B.weight"),
        ),
        (lambda t: t.update({f"{Q0}.lora_B.bias": torch.ones(32)}), (f"{Q0}.lora_B.bias", "without a site")),
        (lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(32)}), ("lora_magnitude_vector",)),
        (lambda t: t.update({f"{Q0}.base_layer.bias": torch.ones(32)}), (f"{Q0}.base_layer.bias",)),
        (
            lambda t: t.update({f"{Q0}.base_layer.weight": torch.ones(32, 32)}),
            (f"{Q0}.base_layer.weight", "save_embedding_layers=False"),
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 97)}),
            ("embed_tokens.lora_embedding_A", "not executed yet"),
        ),
        (
            lambda t: t.update(
                {
                    "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": torch.ones(4, 32),
                    "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight": torch.ones(16, 4),
                }
            ),
            ("k_proj.lora_A.weight", "k_proj.lora_B.weight", "config does not adapt it"),
        ),
        (lambda t: t.update({f"{Q0}.lora_A.default.weight": torch.ones(4, 32)}), ("lora_A.default.weight",)),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}
            ),
            ("layers.9.self_attn.q_proj",),
        ),
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(5, 32)}),
            (f"{Q0}.lora_A.weight", "[5, 32]", "[4, 32]"),
        ),
        (lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(32, 3)}), (f"{Q0}.lora_B.weight", "[32, 3]")),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4)}), (f"{Q0}.lora_A.weight", "[4]")),
        (
            lambda t: t[f"{Q0}.lora_A.weight"].view(-1)[3].fill_(math.nan),
            (f"{Q0}.lora_A.weight", "1 non-finite"),
        ),
        (lambda t: t[f"{Q0}.lora_B.weight"].fill_(math.inf), (f"{Q0}.lora_B.weight", "128 non-finite")),
        (
            lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32, dtype=torch.float64)}),
            (f"{Q0}.lora_A.weight", "'F64'", "Cast it"),
        ),
        (lambda t: t.clear(), ("layers.2.self_attn.v_proj", "no lora_B.weight")),
    ],
)
def test_tensors_must_match_the_config(
    edit: Callable[[dict[str, Tensor]], object], named: tuple[str, ...]
) -> None:
    error = refusal(changed("llama-lora_qv", tensors=edit))
    for fragment in named:
        assert fragment in str(error)


def test_a_regex_target_must_adapt_every_layer_alike() -> None:
    error = refusal(
        changed(
            "llama-lora_regex",
            tensors=drop("1.self_attn.o_proj.lora_A.weight", "1.self_attn.o_proj.lora_B.weight"),
        )
    )
    assert len(error.problems) == 2
    assert "'model.layers.1.self_attn.o_proj' has no lora_A.weight" in str(error)


def test_layers_to_transform_bounds_what_is_expected() -> None:
    error = refusal(changed("llama-lora_some_layers", lambda raw: raw.update(layers_to_transform=[0, 1])))
    assert "'model.layers.1.self_attn.o_proj' has no lora_A.weight" in str(error)
    assert "model.layers.2.self_attn.o_proj.lora_A.weight" in str(error)
    files = changed(
        "llama-lora_some_layers", lambda raw: raw.update(layers_to_transform=1), lambda stored: stored.clear()
    )
    assert "'model.layers.1.self_attn.o_proj' has no lora_A.weight" in str(refusal(files))


def test_targets_given_by_whole_path_ignore_layers_to_transform() -> None:
    def one_path(raw: dict[str, Any]) -> None:
        raw["target_modules"] = ["model.layers.0.self_attn.o_proj", "model.layers.2.self_attn.o_proj"]
        raw["layers_to_transform"] = [1]

    assert len(read_upload(changed("llama-lora_some_layers", one_path), spec_for("llama")).ops) == 2


def test_embedding_targets_are_refused() -> None:
    error = refusal(changed("llama-lora_qv", lambda raw: raw["target_modules"].append("embed_tokens")))
    assert error.param == "target_modules"
    assert "'model.embed_tokens' is an embedding" in str(error)


@pytest.mark.parametrize("end", ["lora_magnitude_vector", "ln_1.bias", "c_attn.base_layer.bias", "ln_f.bias"])
def test_dora_and_biases_are_complete(end: str) -> None:
    error = refusal(changed("gpt2-dora_bias_all", tensors=drop(end)), "gpt2")
    assert end.rsplit(".", maxsplit=1)[-1].removeprefix("lora_") in str(error)
    assert "A site without a tensor" in str(error)


def test_alora_acts_from_its_invocation_on() -> None:
    ops = read("llama-alora").ops
    assert len(ops) == 6
    assert {op.positions for op in ops if isinstance(op, LowRank)} == {FromInvocation((91, 7))}
    biased = read("gpt2-alora_bias")
    assert biased.positions == {FromInvocation((91,))}
    assert {type(op) for op in biased.ops} == {LowRank, Affine}


def test_alora_tokens_must_be_in_the_vocabulary() -> None:
    files = changed("llama-alora", lambda raw: raw.update(alora_invocation_tokens=[5, 97]))
    assert "invocation tokens must be ids from 0 to 96" in str(refusal(files))


def test_alora_with_dora_does_not_exist_in_peft() -> None:
    error = refusal(changed("llama-dora", lambda raw: raw.update(alora_invocation_tokens=[5])))
    assert error.param == "alora_invocation_tokens"


def test_dora_with_lora_bias_does_not_exist_in_peft() -> None:
    error = refusal(changed("llama-dora", lambda raw: raw.update(lora_bias=True)))
    assert error.param == "lora_bias"


def test_bias_tensors_need_a_bias_setting() -> None:
    error = refusal(changed("gpt2-lora_bias_all", lambda raw: raw.update(bias="none")), "gpt2")
    assert "transformer.h.0.ln_1.bias" in str(error)
    assert "transformer.h.0.attn.c_attn.base_layer.bias" in str(error)


def test_one_place_named_twice() -> None:
    def add(stored: dict[str, Tensor]) -> None:
        stored["base_model.model.transformer.h.0.attn.c_attn.bias"] = torch.ones(96)

    assert "Two tensors for one place" in str(refusal(changed("gpt2-lora_bias_all", tensors=add), "gpt2"))


@pytest.mark.parametrize(
    ("config", "tensor", "named"),
    [
        ({"feedforward_modules": []}, None, "expected [32, 1]"),
        ({"feedforward_modules": ["down_proj", "v_proj"]}, None, "expected [1, 32]"),
        ({}, ("down_proj.ia3_l", torch.ones(64, 1)), "expected [1, 64]"),
        ({}, ("v_proj.ia3_l", torch.ones(16)), "expected [16, 1]"),
        ({"fan_in_fan_out": None}, None, "fan_in_fan_out"),
        ({"target_modules": ["k_proj", "down_proj"]}, None, "v_proj.ia3_l"),
    ],
)
def test_ia3_shapes_and_feedforward_modules_agree(
    config: dict[str, Any], tensor: tuple[str, Tensor] | None, named: str
) -> None:
    def edit(stored: dict[str, Tensor]) -> None:
        if tensor is not None:
            stored.update({key: tensor[1].clone() for key in stored if key.endswith(tensor[0])})

    assert named in str(refusal(changed("llama-ia3", lambda raw: raw.update(config), edit)))


@pytest.mark.parametrize("feedforward", [None, r".*down_proj"])
def test_ia3_without_a_list_goes_by_shape(feedforward: str | None) -> None:
    files = changed("llama-ia3", lambda raw: raw.update(feedforward_modules=feedforward))
    sides = {
        op.site.name: op.side for op in read_upload(files, spec_for("llama")).ops if isinstance(op, Affine)
    }
    assert sides == {"k.out": "output", "v.out": "output", "down.out": "input"}


@pytest.mark.parametrize(
    ("identity", "config", "named"),
    [
        ("llama-prefix", {"num_virtual_tokens": 4}, "expected [4, 96]"),
        ("llama-prefix", {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ("llama-prefix", {"num_layers": 2}, "num_layers"),
        ("llama-prefix", {"num_attention_heads": 4}, "num_attention_heads"),
        ("llama-prefix", {"token_dim": 32}, "token_dim"),
        ("llama-prefix", {"num_transformer_submodules": 2}, "num_transformer_submodules"),
        ("llama-prompt", {"token_dim": 64}, "token_dim"),
        ("llama-prompt", {"num_virtual_tokens": 7}, "expected [7, 32]"),
        ("llama-prompt", {"encoder_hidden_size": 3}, "encoder_hidden_size"),
    ],
)
def test_prompt_sizes_must_fit(identity: str, config: dict[str, Any], named: str) -> None:
    error = refusal(changed(identity, lambda raw: raw.update(config)))
    assert named in str(error)
    assert error.param in {*config, "adapter"}


def test_prompts_store_one_tensor_only() -> None:
    def add(stored: dict[str, Tensor]) -> None:
        stored["base_model.score.weight"] = torch.ones(2, 32)

    assert "'base_model.score.weight'" in str(refusal(changed("llama-prompt", tensors=add)))
    assert "'prompt_embeddings'" in str(
        refusal(changed("llama-prefix", tensors=lambda stored: stored.clear()))
    )


def test_a_prefix_longer_than_the_positions() -> None:
    def lengthen(stored: dict[str, Tensor]) -> None:
        stored["prompt_embeddings"] = torch.ones(256, 32)

    error = refusal(changed("llama-prompt", lambda raw: raw.update(num_virtual_tokens=256), lengthen))
    assert "256 virtual tokens, expected 1 to 255" in str(error)


def test_all_problems_come_at_once() -> None:
    def edit(stored: dict[str, Tensor]) -> None:
        stored[f"{Q0}.lora_A.weight"][0, 0] = math.nan
        stored["stray"] = torch.ones(1)

    error = refusal(changed("llama-lora_qv", lambda raw: raw.update(use_qalora=True, unknown=1), edit))
    for fragment in ("use_qalora", "'unknown'", f"{Q0}.lora_A.weight", "'stray'"):
        assert any(fragment in problem for problem in error.problems), fragment
    assert len(error.problems) == 4


def test_an_adapterhub_config_is_pointed_out() -> None:
    files = saved("llama-lora_qv")[1] | {CONFIG: b'{"config": {}, "version": "adapters.1.3.0"}'}
    assert "adapter.safetensors" in str(refusal(files))
