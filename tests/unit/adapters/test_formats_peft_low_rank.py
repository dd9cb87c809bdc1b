"""The PEFT methods that lower to LowRank and prompts beside LoRA: what is shared, what pruning and task rows mean,
and every bad upload refused by name. Their numbers are compared with PEFT in test_formats_peft.py and tests/contract.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PolyConfig, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load, save
from torch import Tensor

from adapters.backbone_spec import ModuleSpec
from adapters.canonical import to_canonical
from adapters.formats import peft_config_linear as linear
from adapters.formats import peft_config_prompt as prompts
from adapters.formats import read_directory, read_upload
from adapters.formats.peft import READERS
from adapters.formats.peft_config import BDLORA
from adapters.formats.peft_keys import Placed
from adapters.formats.peft_modules import Layout, parallel, read_modules
from adapters.formats.peft_refused import REFUSED_METHODS
from adapters.formats.problems import Problems
from adapters.formats.schema import Rule
from adapters.normal_form import Delta, LowRank, VirtualTokens
from tests.cases import LOW_RANK_FAMILY_CASES, Case, case_id, quiet, randomise, tiny_backbone
from tests.unit.adapters.test_formats_peft import (
    BY_ID,
    CONFIG,
    TENSORS,
    changed,
    drop,
    read,
    refusal,
    saved,
    spec_for,
)

V0 = "base_model.model.model.layers.0.self_attn.v_proj"


# ---- config schemas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "rules"),
    [
        (peft.AdaLoraConfig, linear.ADALORA),
        (peft.BeftConfig, linear.BEFT),
        (peft.DeloraConfig, linear.DELORA),
        (peft.GraloraConfig, linear.GRALORA),
        (peft.LoHaConfig, linear.LOHA),
        (peft.MissConfig, linear.MISS),
        (peft.PolyConfig, linear.POLY),
        (peft.PveraConfig, linear.PVERA),
        (peft.RandLoraConfig, linear.RANDLORA),
        (peft.UniLoraConfig, linear.UNILORA),
        (peft.VBLoRAConfig, linear.VBLORA),
        (peft.VeraConfig, linear.VERA),
        (peft.CartridgeConfig, prompts.CARTRIDGE),
        (peft.CPTConfig, prompts.CPT),
        (peft.MultitaskPromptTuningConfig, prompts.MULTITASK_PROMPT_TUNING),
        (peft.PromptEncoderConfig, prompts.P_TUNING),
        (peft.tuners.lora.config.BdLoraConfig, BDLORA),
    ],
)
def test_rules_are_the_keys_that_this_peft_writes(config: type, rules: Mapping[str, Rule]) -> None:
    assert {item.name for item in fields(config)} == rules.keys() - {"merge_weights", "enable_lora"}


@pytest.mark.parametrize("method", sorted(REFUSED_METHODS))
def test_methods_without_a_reader_are_refused_with_the_reason(method: str) -> None:
    assert method not in READERS
    error = refusal(changed("llama-lora_qv", lambda raw: raw.update(peft_type=method)))
    assert error.param == "peft_type"
    assert error.problems == (
        f"adapter_config.json: peft_type: '{method}' is not served: {REFUSED_METHODS[method]}",
    )


def test_every_method_of_this_peft_is_read_or_refused_with_a_reason() -> None:
    known = {getattr(name, "value", name) for name in PEFT_TYPE_TO_CONFIG_MAPPING}
    without = known - READERS.keys() - REFUSED_METHODS.keys()
    assert without <= {
        *(
            "ADAPTION_PROMPT",
            "BOFT",
            "C3A",
            "HRA",
            "LN_TUNING",
            "LOKR",
            "OFT",
            "ROAD",
            "SHIRA",
            "TRAINABLE_TOKENS",
        )
    }


BAD_VALUES: tuple[tuple[str, str, object, str], ...] = (
    ("llama-adalora", "init_r", 0, "expected an integer from 1"),
    ("llama-adalora", "init_r", 5, "expected [5, 32]"),
    ("llama-adalora", "lora_alpha", -1, "a positive number"),
    ("llama-adalora", "alpha_pattern", {"q_proj": 2}, "does not read it"),
    ("llama-adalora", "use_dora", True, "no AdaLoRA with DoRA"),
    ("llama-adalora", "rank_pattern", {"q_proj": 2}, "lists of true and false"),
    ("llama-adalora", "rank_pattern", {"elsewhere.lora_E": [True] * 4}, "'elsewhere.lora_E'"),
    ("llama-adalora", "rank_pattern", {"model.layers.0.self_attn.q_proj.lora_E": [True] * 3}, "3 entries"),
    (
        "llama-adalora_pruned",
        "rank_pattern",
        {"model.layers.0.self_attn.q_proj.lora_E": [True] * 4},
        "[4, 32]",
    ),
    ("llama-bdlora", "use_bdlora", {"nblocks": 2}, "matches neither"),
    ("llama-bdlora", "use_bdlora", {"nblocks": 0, "match_strict": False}, "use_bdlora.nblocks"),
    ("llama-bdlora", "use_bdlora", {"blocks": 2, "match_strict": False}, "'use_bdlora.blocks'"),
    (
        "llama-bdlora",
        "use_bdlora",
        {"target_modules_bd_a": ["proj"], "nblocks": 3, "match_strict": False},
        "nblocks = 3",
    ),
    (
        "llama-bdlora",
        "use_bdlora",
        {"target_modules_bd_a": ["proj"], "target_modules_bd_b": ["q_"], "match_strict": False},
        "matches both",
    ),
    ("llama-delora", "r", 4, "expected [4, 32]"),
    ("llama-delora", "rank_pattern", {".*": 4}, "never run"),
    ("llama-gralora", "gralora_k", 3, "3 does not divide r = 4"),
    ("llama-gralora", "alpha", 0, "a positive number"),
    ("llama-gralora", "r", 4096, "2 blocks of 4096"),
    ("llama-gralora", "hybrid_r", 2, "no gralora_A_general.weight"),
    ("gpt2-gralora_hybrid", "hybrid_r", 0, "gralora_A_general.weight"),
    ("llama-loha", "r", 65, "makes a rank of 4225"),
    ("llama-loha", "r", 4, "expected [32, 4]"),
    ("llama-loha", "alpha", None, "a positive number"),
    ("llama-loha", "alpha_pattern", {"(a|b)": 4}, "never run"),
    ("llama-miss", "init_weights", "bat", "multiplies blocks of the base weight"),
    ("llama-miss", "init_weights", "mini", "expected [6, 1]"),
    ("llama-miss", "r", 33, "33 is more than the 32 inputs"),
    ("llama-miss_mini", "mini_r", 5, "5 does not divide the 32 outputs"),
    ("llama-poly", "n_tasks", 2, "2 tasks share this adapter"),
    ("llama-poly", "n_tasks", True, "expected 1"),
    ("llama-poly", "n_splits", 5, "5 does not divide"),
    ("llama-poly", "poly_type", "mhr", "'poly'"),
    ("llama-pvera", "sample_at_inference", True, "random numbers"),
    ("llama-pvera", "save_projection", False, "pvera_A and pvera_B are not in the file"),
    ("llama-pvera", "r", 4, "expected [8, 64]"),
    ("llama-randlora", "save_projection", False, "randlora_A and randlora_B are not in the file"),
    ("llama-randlora", "r", 4, "expected [4, 1, 32]"),
    ("llama-randlora", "randlora_alpha", 0, "a positive number"),
    ("gpt2-unilora", "save_indices", False, "unilora_indices and unilora_scales are not in the file"),
    ("gpt2-unilora", "theta_d_length", 61, "expected [61]"),
    ("gpt2-unilora", "bias", "vera_only", "'none', 'all' or 'unilora_only'"),
    ("llama-vblora", "topk", 13, "of num_vectors = 12"),
    ("llama-vblora", "vector_length", 7, "expected [12, 7]"),
    ("llama-vblora", "save_only_topk_weights", True, "vblora_logits_A_topk_indices"),
    ("llama-vera", "save_projection", False, "vera_A and vera_B are not in the file"),
    ("llama-vera", "r", 5, "expected [5, 64]"),
    ("llama-vera", "target_modules", ["q_proj"], "expected [6, 32]"),
    ("llama-vera", "layers_to_transform", [-1], "layer index"),
    ("llama-prefix_cartridge", "num_frozen_tokens", -1, "non-negative"),
    ("llama-prefix_cartridge", "num_virtual_tokens", 4, "expected [4, 96]"),
    ("llama-prompt_p_tuning", "token_dim", 64, "trained on another base model"),
    ("llama-prompt_p_tuning", "encoder_dropout", 1, "from 0 up to 1"),
    ("llama-prompt_cpt", "num_virtual_tokens", 5, "expected [5, 32]"),
    ("llama-prompt_cpt", "cpt_token_ids", ["a"], "non-negative integers"),
    ("llama-prompt_multitask", "num_tasks", 3, "3 tasks share this prompt"),
    ("llama-prompt_multitask", "num_ranks", 3, "expected [1, 4, 3]"),
)


@pytest.mark.parametrize(("identity", "key", "value", "named"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_config_values_that_do_not_fit_are_refused(
    identity: str, key: str, value: object, named: str
) -> None:
    error = refusal(changed(identity, lambda raw: raw.update({key: value})), BY_ID[identity].family)
    assert named in str(error)
    assert error.param in (key, "adapter") or error.param.startswith(f"{key}.")


@pytest.mark.parametrize("case", LOW_RANK_FAMILY_CASES, ids=case_id)
def test_unknown_keys_are_refused(case: Case) -> None:
    error = refusal(changed(case_id(case), lambda raw: raw.update(of_tomorrow=1)), case.family)
    assert error.param == "of_tomorrow"


@pytest.mark.parametrize(
    ("identity", "ignored"),
    [
        ("llama-adalora", {"r": 99, "tinit": 3, "use_rslora": True}),
        ("llama-delora", {"delora_lambda": 3.5, "lambda_pattern": {".*": 2}, "module_dropout": 0.5}),
        ("llama-loha", {"use_effective_conv2d": True, "rank_dropout": 0.5}),
        ("llama-randlora", {"sparse": True, "projection_prng_key": 9}),
        ("llama-vera", {"d_initial": 3.0, "projection_prng_key": 9, "fan_in_fan_out": True}),
        ("llama-vblora", {"init_logits_std": 7.0}),
    ],
)
def test_keys_that_only_concern_training_change_nothing(identity: str, ignored: dict[str, object]) -> None:
    files = changed(identity, lambda raw: raw.update(ignored))
    assert to_canonical(read_upload(files, spec_for("llama"))).digest == to_canonical(read(identity)).digest


# ---- tensors ------------------------------------------------------------------------------------------------------

TENSOR_CHANGES: Mapping[str, Callable[[dict[str, Tensor], str], object]] = {
    "drop": lambda stored, key: stored.pop(key),
    "rename": lambda stored, key: stored.update({f"{key}_": stored.pop(key)}),
    "grow": lambda stored, key: stored.update({key: torch.cat([stored[key], stored[key][:1]])}),
    "flatten": lambda stored, key: stored.update({key: stored[key].reshape(1, 1, 1, 1, -1).clone()}),
    "nan": lambda stored, key: stored[key].view(-1)[-1].fill_(math.nan),
    "float64": lambda stored, key: stored.update({key: stored[key].double()}),
    "another kind": lambda stored, key: stored.update(
        {key: stored[key].float() if _is_index(key) else stored[key].int()}
    ),
}


def _is_index(key: str) -> bool:
    return "indices" in key


def _kinds(identity: str) -> list[str]:
    """One key of every kind of tensor in the file, of the first layer where there are layers."""
    kinds: dict[str, str] = {}
    for key in sorted(load(saved(identity)[1][TENSORS])):
        kinds.setdefault(key.partition("_proj.")[2] or key.partition(".c_attn.")[2] or key, key)
    return [key for key in kinds.values() if ".1." not in key and ".2." not in key]


@pytest.mark.parametrize("what", TENSOR_CHANGES)
@pytest.mark.parametrize("case", LOW_RANK_FAMILY_CASES, ids=case_id)
def test_every_changed_tensor_is_named(case: Case, what: str) -> None:
    for key in _kinds(case_id(case)):
        copied = key.endswith((".randlora_A", ".randlora_B")) and ".model." in key
        if (what == "drop" and copied) or (what == "nan" and _is_index(key)):
            continue  # a copy that nothing reads; integers have no NaN
        files = changed(case_id(case), tensors=lambda stored, key=key: TENSOR_CHANGES[what](stored, key))
        error = refusal(files, case.family)
        paths = [path for path in spec_for(case.family).by_path if f".{path}." in key]
        named = max(paths, key=len) if what == "drop" and paths else key
        assert any(named in problem for problem in error.problems), (what, key, error.problems)


@pytest.mark.parametrize("case", LOW_RANK_FAMILY_CASES, ids=case_id)
def test_strays_are_refused(case: Case) -> None:
    stray = "base_model.model.lm_head.lora_A" if "prompt" not in case.name else "base_model.lora_A"

    def add(stored: dict[str, Tensor]) -> None:
        stored[stray] = torch.ones(4, 32)

    assert f"'{stray}'" in str(refusal(changed(case_id(case), tensors=add), case.family))


def test_randlora_copies_must_agree() -> None:
    def edit(stored: dict[str, Tensor]) -> None:
        stored[f"{V0}.randlora_B"][3, 1, 2] += 1

    error = refusal(changed("llama-randlora", tensors=edit))
    assert error.problems == (
        f"'{V0}.randlora_B': it differs from 'base_model.randlora_B', of which PEFT stores a copy under every module.",
    )
    without = changed(
        "llama-randlora", tensors=drop("proj.randlora_A", "proj.randlora_B")
    )  # older files have none
    assert (
        to_canonical(read_upload(without, spec_for("llama"))).digest
        == to_canonical(read("llama-randlora")).digest
    )


@pytest.mark.parametrize("identity", ["llama-loha", "llama-miss", "llama-poly", "llama-delora", "llama-beft"])
def test_methods_that_peft_has_for_linear_modules_only(identity: str) -> None:
    def retarget(raw: dict[str, Any]) -> None:
        raw["target_modules"] = ["c_attn"]

    error = refusal(changed(identity, retarget), "gpt2")
    assert "'transformer.h.0.attn.c_attn': PEFT has this method for Linear modules only" in str(error)


@pytest.mark.parametrize(
    ("identity", "end", "edit", "named"),
    [
        ("gpt2-unilora", "unilora_indices_A", lambda t: t.fill_(60), "outside 0 to 59"),
        ("gpt2-unilora", "unilora_indices_B", lambda t: t.fill_(-1), "outside 0 to 59"),
        ("gpt2-vblora_top_k", "vblora_logits_A_topk_indices", lambda t: t.fill_(12), "outside 0 to 11"),
        ("gpt2-vblora_top_k", "vblora_logits_B_topk_indices", lambda t: t.fill_(3), "the same vector twice"),
    ],
)
def test_indices_must_be_in_range(
    identity: str, end: str, edit: Callable[[Tensor], object], named: str
) -> None:
    def apply(stored: dict[str, Tensor]) -> None:
        edit(stored[f"base_model.model.transformer.h.0.attn.c_attn.{end}"])

    error = refusal(changed(identity, tensors=apply), "gpt2")
    assert f"c_attn.{end}" in str(error)
    assert named in str(error)


# ---- what is shared -----------------------------------------------------------------------------------------------


def low_ranks(delta: Delta) -> list[LowRank]:
    return [op for op in delta.ops if isinstance(op, LowRank)]


def distinct(tensors: list[Tensor]) -> int:
    return len({id(tensor) for tensor in tensors})


@pytest.mark.parametrize("identity", ["llama-vera", "llama-pvera", "llama-miss"])
def test_modules_of_one_width_share_a(identity: str) -> None:
    ops = low_ranks(read(identity))
    assert {distinct([op.A for op in ops]), len({op.A.shape[1] for op in ops})} == {2}
    assert distinct([op.B for op in ops]) == len(ops)


@pytest.mark.parametrize("identity", ["llama-randlora", "gpt2-randlora"])
def test_randlora_shares_the_wide_side(identity: str) -> None:
    delta = read(identity)
    own = [op.A if op.A.shape[1] <= op.B.shape[0] else op.B for op in low_ranks(delta)]
    wide = [op.B if op.A.shape[1] <= op.B.shape[0] else op.A for op in low_ranks(delta)]
    if identity.startswith("llama"):  # v_proj's input and down_proj's input are the wide sides there
        assert distinct(wide) == 3
    assert distinct(own) + distinct(wide) < 2 * len(wide)


def test_shared_tensors_are_stored_once() -> None:
    delta = read("llama-vera")
    stored = load(to_canonical(delta).tensors)
    assert sum(tensor.numel() for tensor in stored.values()) == delta.num_parameters
    assert delta.num_parameters == 6 * (32 + 64) + sum(op.B.shape[0] for op in low_ranks(delta)) * 6


def test_what_an_adapter_becomes_is_bounded() -> None:
    """Four modules of 4 x 32 + 32 x 4 floats each, room for three."""
    paths = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qo"]
    tensors = {f"base_model.model.{path}.seed": torch.ones(1) for path in paths}
    config = {"target_modules": paths}

    def lower(module: ModuleSpec, _: Mapping[str, Placed]) -> list[LowRank]:
        return parallel(module, torch.ones(4, module.shape.d_in), torch.ones(module.shape.d_out, 4))

    for max_bytes, found in ((4 * 1024, 4), (3 * 1024, 0)):
        problems = Problems()
        layout = replace(Layout.of("seed"), max_bytes=max_bytes)
        assert len(read_modules(layout, lower, config, tensors, spec_for("llama"), problems)) == found
        assert len(problems.texts) == (found == 0)
    assert "take more than 3072 bytes" in problems.texts[0]


# ---- pruning, tasks, forms ----------------------------------------------------------------------------------------


def test_adalora_pruned_by_its_own_allocator(tmp_path: Path) -> None:
    """Two real steps of PEFT's budget allocation; the file's pattern and tensors agree with the reader's."""
    config = BY_ID["llama-adalora"].config()
    config.target_r, config.total_step, config.tfinal = 2, 5, 1
    with quiet():
        adapted = get_peft_model(tiny_backbone("llama"), config)
        for step in range(6):
            adapted(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
            adapted.base_model.update_and_allocate(step)
        adapted.save_pretrained(str(tmp_path))
    pattern = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
    kept = {name.removesuffix(".lora_E"): sum(mask) for name, mask in pattern.items()}
    ops = {
        spec_for("llama").writer[op.write][0].path: op
        for op in low_ranks(read_directory(tmp_path, spec_for("llama")))
    }
    assert {path: len(op.A) for path, op in ops.items()} == {path: n for path, n in kept.items() if n}
    assert sum(kept.values()) < 9 * 4
    assert {op.scaling for op in ops.values()} == {6 / (4 + 1e-5)}


def test_a_module_pruned_to_nothing_has_no_op() -> None:
    paths = {spec_for("llama").writer[op.write][0].path for op in low_ranks(read("llama-adalora_pruned"))}
    assert len(paths) == 8
    assert {len(op.A) for op in low_ranks(read("llama-adalora_pruned"))} == {2, 3}


def test_poly_of_several_tasks_split_as_the_refusal_says() -> None:
    """One row of the logits is the task: what PEFT computes with that task id."""
    config = PolyConfig(
        task_type=TaskType.CAUSAL_LM, r=4, n_skills=3, n_splits=2, n_tasks=3, target_modules=["q_proj"]
    )
    case = Case("poly_tasks", "llama", lambda: config)
    adapted = case.build(tiny_backbone("llama"))
    stored = {key: tensor.contiguous() for key, tensor in peft.get_peft_model_state_dict(adapted).items()}
    for key in stored:
        if key.endswith("module_logits"):
            stored[key] = stored[key][2:3].clone()
    files = changed("llama-poly", lambda raw: raw.update(target_modules=["q_proj"]))
    delta = read_upload({CONFIG: files[CONFIG], TENSORS: save(stored)}, spec_for("llama"))
    module = adapted.base_model.model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = module(x, task_ids=torch.tensor([2])) - module.base_layer(x)
    (op,) = [op for op in low_ranks(delta) if op.write.layer == 0]
    torch.testing.assert_close(op.scaling * x @ op.A.T @ op.B.T, expected, rtol=1e-5, atol=1e-5)


def test_top_k_weights_give_what_the_logits_give(tmp_path: Path) -> None:
    case = BY_ID["gpt2-vblora_top_k"]
    whole: PeftConfig = case.config()
    whole.save_only_topk_weights = False
    Case(case.name, case.family, lambda: whole, seed=case.seed).save(tmp_path)
    from_logits = low_ranks(read_directory(tmp_path, spec_for("gpt2")))
    for op, other in zip(low_ranks(read("gpt2-vblora_top_k")), from_logits, strict=True):
        torch.testing.assert_close(op.A, other.A, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(op.B, other.B, rtol=1e-6, atol=1e-6)


def test_bdlora_blocks_stand_on_the_diagonal() -> None:
    ops = {op.write.name: op for op in low_ranks(read("llama-bdlora")) if op.write.layer == 0}
    assert bool((ops["o.out"].A[:2, 16:] == 0).all())
    assert bool((ops["o.out"].A[2:, :16] == 0).all())
    assert bool((ops["q.out"].B[:16, 2:] == 0).all())
    assert bool((ops["q.out"].B[16:, :2] == 0).all())
    assert bool((ops["up.out"].B != 0).all())
    assert ops["o.out"].A.shape == (4, 32)


@pytest.mark.parametrize("identity", ["llama-prompt_p_tuning", "gpt2-prompt_p_tuning", "llama-prompt_cpt"])
def test_prompt_encoders_are_already_evaluated(identity: str) -> None:
    adapted, _ = saved(identity)
    (op,) = read(identity).ops
    assert isinstance(op, VirtualTokens)
    with quiet(), torch.no_grad():
        encoder = adapted.prompt_encoder["default"]
        expected = encoder(torch.arange(len(op.embeddings))[None])[0]
    torch.testing.assert_close(op.embeddings, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(op.embeddings, encoder.embedding.weight, atol=1e-2)


def test_multitask_prompts_are_multiplied() -> None:
    adapted: PeftModel = saved("llama-prompt_multitask")[0]
    (op,) = read("llama-prompt_multitask").ops
    assert isinstance(op, VirtualTokens)
    with quiet(), torch.no_grad():
        expected = adapted.prompt_encoder["default"](torch.arange(4)[None], torch.tensor([0]))[0]
    torch.testing.assert_close(op.embeddings, expected)


@pytest.mark.parametrize("case", LOW_RANK_FAMILY_CASES, ids=case_id)
def test_half_precision_files_are_folded_in_float32(case: Case) -> None:
    def halve(stored: dict[str, Tensor]) -> None:
        stored.update({key: t.bfloat16() for key, t in stored.items() if t.is_floating_point()})

    def restore(stored: dict[str, Tensor]) -> None:
        halve(stored)
        stored.update({key: t.float() for key, t in stored.items() if t.is_floating_point()})

    half, whole = (
        read_upload(changed(case_id(case), tensors=edit), spec_for(case.family)) for edit in (halve, restore)
    )
    for (_, name, tensor), (_, _, other) in zip(half.tensors(), whole.tensors(), strict=True):
        assert torch.equal(tensor.float(), other), name


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_converted_initialisations_are_plain_lora(init: str, tmp_path: Path) -> None:
    """`path_initial_model_for_weight_conversion` writes a LoRA of twice the rank on the unchanged base."""
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=init, task_type=TaskType.CAUSAL_LM
    )
    with quiet():
        adapted = get_peft_model(tiny_backbone("llama"), config)
        config.init_lora_weights = True
        adapted.save_pretrained(str(tmp_path / "initial"))
        config.init_lora_weights = init
        randomise(adapted, seed=1)
        adapted.save_pretrained(
            str(tmp_path / "trained"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    delta = read_directory(tmp_path / "trained", spec_for("llama"))
    (op,) = [op for op in low_ranks(delta) if op.write.layer == 2]
    assert op.A.shape[0] == 6
    live = adapted.base_model.model.get_submodule("model.layers.2.self_attn.q_proj")
    base = tiny_backbone("llama").get_submodule("model.layers.2.self_attn.q_proj").weight
    with torch.no_grad():
        expected = live.get_base_layer().weight + live.get_delta_weight("default")
        torch.testing.assert_close(base + op.scaling * op.B @ op.A, expected, rtol=1e-5, atol=1e-5)
