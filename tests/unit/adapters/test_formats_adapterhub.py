"""AdapterHub reader: the lowered ops, hooked into stock transformers modules, give the library's own golden logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.backbone_spec import BackboneSpec
from adapters.errors import InvalidDelta
from adapters.formats import read_directory, read_upload
from adapters.normal_form import Delta, LowRank, Site
from tests.cases import (
    DIGEST,
    ENCODER_GOLDEN_CASES,
    GOLDEN,
    GOLDEN_CASES,
    GOLDEN_NAME,
    SEQ2SEQ_GOLDEN_CASES,
    Family,
    GoldenCase,
    case_id,
    spec_of,
)

CONFIG, TENSORS = "adapter_config.json", "adapter.safetensors"

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
}

# Every other directory of the golden set: the key that the refusal must blame.
REFUSED = {
    ("gpt2", "par_bn_ln"): "ln_before",
    ("gpt2", "seq_bn_ln_after"): "ln_after",
    ("gpt2", "seq_bn_ln_before"): "ln_before",
    ("gpt2", "seq_bn_mh"): "mh_adapter",
    ("gpt2", "seq_bn_residual_after_add"): "original_ln_after",
    ("gpt2", "unipelt"): "use_gating",
    ("llama", "par_bn_drops_stream"): "original_ln_after",
    ("llama", "seq_bn_drops_stream"): "original_ln_after",
    ("llama", "seq_bn_inv_flex_head"): "head",
    ("llama", "seq_bn_ln_after"): "ln_after",
    ("llama", "seq_bn_ln_after_residual"): "ln_after",
    ("llama", "seq_bn_ln_before"): "ln_before",
    ("llama", "seq_bn_mh"): "mh_adapter",
    ("llama", "seq_bn_residual_after_add"): "original_ln_after",
    ("t5", "compacter"): "phm_rule",
    ("t5", "seq_bn"): "cross_adapter",
}


@lru_cache
def spec_for(family: Family) -> BackboneSpec:
    return spec_of(GoldenCase("seq_bn", family).backbone(), GOLDEN_NAME)


def hook(model: nn.Module, delta: Delta, spec: BackboneSpec) -> None:
    """Run LowRank ops in a stock model: branches at the output of the writing module, remote reads at their reader."""
    seen: dict[Site, Tensor] = {}
    for op in delta.ops:
        assert isinstance(op, LowRank)
        if not op.sequential:
            reader = next(module for module in spec.modules if module.read == op.read)
            model.get_submodule(reader.path).register_forward_pre_hook(
                lambda module, args, site=op.read: seen.__setitem__(site, args[0])
            )

        def add(module: nn.Module, args: object, output: Any, op: LowRank = op) -> Any:
            y = output[0] if isinstance(output, tuple) else output
            x = y if op.sequential else seen[op.read]
            a_bias, b_bias = (0 if bias is None else bias.to(x) for bias in (op.a_bias, op.b_bias))
            inner = ACTIVATIONS[op.activation](x @ op.A.to(x).T + a_bias)
            y = y + op.scaling * (inner @ op.B.to(x).T + b_bias)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        model.get_submodule(spec.writer[op.write][0].path).register_forward_hook(add)


def bottlenecks() -> list[GoldenCase]:
    """The golden adapters of LowRank ops alone; `tests/contract/test_mixed_batch.py` runs all of them."""
    plain = ("seq_bn", "double_seq_bn", "par_bn", "adapter_plus", "compacter")
    return [case for case in GOLDEN_CASES if case.name.startswith(plain)]


@pytest.mark.parametrize("case", bottlenecks(), ids=case_id)
def test_lowered_ops_give_the_librarys_logits(case: GoldenCase) -> None:
    spec = spec_for(case.family)
    delta = read_directory(case.directory, spec)
    for dtype, name in ((torch.float32, "logits"), (torch.float64, "logits_float64")):
        model = case.backbone().to(dtype)
        hook(model, delta, spec)
        for golden in case.golden():
            with torch.no_grad():
                got = model(golden["input_ids"][None], use_cache=False).logits[0]
            scale = max(1.0, golden[name].abs().max().item())
            # Llama's float64 run keeps single-precision norms, softmax and rotary tables; T2 scalings are folded in
            # single precision
            exact = name == "logits_float64" and case.family == "gpt2" and case.tolerance == "T1"
            tolerance = 1e-10 if exact else 2e-6
            assert (got - golden[name]).abs().max().item() <= tolerance * scale


def test_every_golden_adapter_is_either_served_or_refused() -> None:
    directories = {(path.parent.name, path.name) for path in GOLDEN.glob("*/*") if path.name != "backbone"}
    served = {
        (case.family, case.name) for case in (*GOLDEN_CASES, *ENCODER_GOLDEN_CASES, *SEQ2SEQ_GOLDEN_CASES)
    }
    assert directories == served | REFUSED.keys()


@pytest.mark.parametrize(("family", "name"), REFUSED, ids="-".join)
def test_what_does_not_lower_exactly_is_refused(family: Family, name: str) -> None:
    with pytest.raises(InvalidDelta) as caught:
        read_directory(GOLDEN / family / name, spec_for(family))
    assert REFUSED[family, name] in caught.value.problems[0]


def test_places_sites_and_method() -> None:
    def sites(family: Family, name: str) -> tuple[str, set[tuple[str, str]]]:
        delta = read_directory(GOLDEN / family / name, spec_for(family))
        assert (delta.position_offset, delta.backbone_digest) == (0, DIGEST)
        assert delta.lineage == {"format": "adapterhub"}
        return delta.method, {(op.read.name, op.write.name) for op in delta.ops if isinstance(op, LowRank)}

    assert sites("llama", "seq_bn") == ("seq_bn", {("layer.out", "layer.out")})
    assert sites("gpt2", "double_seq_bn") == ("double_seq_bn", {("o.out", "o.out"), ("down.out", "down.out")})
    assert sites("gpt2", "par_bn") == ("par_bn", {("ffn.r", "down.out")})
    assert sites("llama", "par_bn_mh") == ("par_bn", {("attn.r", "o.out"), ("ffn.r", "down.out")})


# ---- edited uploads -----------------------------------------------------------------------------------------------


def changed(
    name: str,
    config: Callable[[dict[str, Any]], object] = lambda _: None,
    tensors: Callable[[dict[str, Tensor]], object] = lambda _: None,
) -> dict[str, bytes]:
    directory = GOLDEN / "llama" / name
    raw, stored = json.loads((directory / CONFIG).read_bytes()), load((directory / TENSORS).read_bytes())
    config(raw)
    tensors(stored)
    return {CONFIG: json.dumps(raw).encode(), TENSORS: save(stored)}


def refusal(files: dict[str, bytes]) -> InvalidDelta:
    with pytest.raises(InvalidDelta) as caught:
        read_upload(files, spec_for("llama"))
    return caught.value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ln_before", True),
        ("use_gating", True),
        ("phm_layer", 1),
        ("inv_adapter", "glow"),
        ("residual_before_ln", "post_add"),
        ("original_ln_after", False),
        ("non_linearity", "prelu"),
        ("non_linearity", None),
        ("scaling", 4),
        ("scaling", "none"),
        ("reduction_factor", 0),
        ("reduction_factor", {"1": 2}),
        ("reduction_factor", {"default": -1}),
        ("leave_out", [0.5]),
        ("mh_adapter", 1),
        ("architecture", "prompt_tuning"),
        ("architecture", "mtl_lora"),
        ("architecture", "vera"),
        ("architecture", ["lora"]),
        ("a_new_key", 0),
    ],
)
def test_bottleneck_config_is_refused_by_key(key: str, value: object) -> None:
    error = refusal(changed("seq_bn", lambda raw: raw["config"].update({key: value})))
    assert f"config.{key}" in str(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("config", "pfeiffer"),
        ("config", None),
        ("version", "3.2.1"),
        ("version", None),
        ("version", "adapters.next"),
        ("name", "with.dots"),
        ("model_type", "gpt2"),
        ("hidden_size", 32),
        ("hidden_size", "24"),
        ("model_name", "another-base"),
        ("a_new_key", 0),
    ],
)
def test_top_level_config_is_refused_by_key(key: str, value: object) -> None:
    error = refusal(changed("seq_bn", lambda raw: raw.update({key: value})))
    assert key in str(error)
    assert error.param in (key, "adapter")


@pytest.mark.parametrize("key", ["config", "version", "name", "hidden_size"])
def test_top_level_keys_are_required(key: str) -> None:
    assert f"{key} is missing" in str(refusal(changed("seq_bn", lambda raw: raw.pop(key))))


def test_an_explicit_digest_stands_in_for_the_name() -> None:
    files = changed("seq_bn", lambda raw: raw.update(model_name="/somewhere/else"))
    assert len(read_upload(files, spec_for("llama"), backbone_digest=DIGEST).ops) == 3


def test_absent_keys_have_the_librarys_defaults() -> None:
    def strip(raw: dict[str, Any]) -> None:
        for key in raw["config"].keys() - {
            "mh_adapter",
            "output_adapter",
            "reduction_factor",
            "non_linearity",
        }:
            del raw["config"][key]

    op = read_upload(changed("seq_bn", strip), spec_for("llama")).ops[0]
    assert isinstance(op, LowRank)
    assert op.write.name == "down.out"  # original_ln_before is false where absent, so the adapter reads D


def test_files_of_a_bare_model_lack_the_first_part_of_the_path() -> None:
    def strip(stored: dict[str, Tensor]) -> None:
        for key in list(stored):
            stored[key.removeprefix("model.")] = stored.pop(key)

    assert len(read_upload(changed("seq_bn", tensors=strip), spec_for("llama")).ops) == 3


K0 = "model.layers.0.output_adapters.adapters.seq_bn."


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(K0 + "adapter_up.bias"), "no '" + K0 + "adapter_up.bias'"),
        (lambda t: t.update({K0 + "adapter_up.bias": torch.ones(23)}), "got shape [23], expected [24]"),
        (
            lambda t: t.update({K0 + "adapter_down.0.weight": torch.ones(5, 24)}),
            "got shape [5, 24], expected [6, 24]",
        ),
        (lambda t: t.update({K0 + "gate.weight": torch.ones(1, 24)}), K0 + "gate.weight"),
        (lambda t: t.update({K0 + "scaling": torch.ones(1)}), K0 + "scaling"),
        (lambda t: t[K0 + "adapter_up.weight"].view(-1)[0].fill_(math.nan), "1 non-finite value"),
        (
            lambda t: t.update(
                {"model.layers.3.output_adapters.adapters.seq_bn.adapter_up.bias": torch.ones(24)}
            ),
            "model.layers.3.",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.attention_adapters.adapters.seq_bn.adapter_up.bias": torch.ones(24)}
            ),
            "attention_adapters",
        ),
    ],
)
def test_tensors_must_match_the_config(edit: Callable[[dict[str, Tensor]], object], named: str) -> None:
    assert named in str(refusal(changed("seq_bn", tensors=edit)))


@pytest.mark.parametrize("name", ["par_bn_learned", "par_bn_channel"])
def test_a_stored_scaling_must_be_there_and_fit(name: str) -> None:
    key = f"model.layers.1.output_adapters.adapters.{name}.scaling"
    assert f"'{key}'" in str(refusal(changed(name, tensors=lambda stored: stored.pop(key))))
    wrong = changed(name, tensors=lambda stored: stored.update({key: torch.ones(2)}))
    assert f"'{key}': got shape [2]" in str(refusal(wrong))


def test_left_out_layers_may_have_no_tensors() -> None:
    error = refusal(changed("seq_bn", lambda raw: raw["config"].update(leave_out=[1])))
    assert len(error.problems) == 4
    assert all("model.layers.1." in problem for problem in error.problems)


@pytest.mark.parametrize(
    "name", ["model_head.safetensors", "head_config.json", "pytorch_adapter.bin", "adapter_interface.json"]
)
def test_files_beside_the_pair_are_refused_by_name(name: str, tmp_path: Path) -> None:
    files = changed("seq_bn") | {name: b"{}"}
    assert f"'{name}'" in str(refusal(files))
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    if name.endswith(".bin"):  # in a directory it is simply not opened beside the safetensors file
        assert read_directory(tmp_path, spec_for("llama")).ops
        (tmp_path / TENSORS).unlink()
    with pytest.raises(InvalidDelta, match=name):
        read_directory(tmp_path, spec_for("llama"))
