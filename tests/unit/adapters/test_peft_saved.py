"""`modules_to_save`: which modules a name saves, what a tied head keeps, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from adapters.errors import InvalidDelta
from adapters.formats import read_upload
from adapters.formats.peft import READERS
from adapters.normal_form import Affine, Delta, Head, LowRank, Rows
from tests.cases import PEFT_CASES, Case, Family, case_id, quiet, spec_of, tiny_backbone
from tests.method_table import METHODS

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
HEAD = "base_model.model.lm_head.weight"
WTE = "base_model.model.transformer.wte.weight"
CASES = {case_id(case): case for case in PEFT_CASES}


@lru_cache
def files(identity: str) -> tuple[str, bytes]:
    return saved(CASES[identity])


def saved(case: Case) -> tuple[str, bytes]:
    with TemporaryDirectory() as directory:
        case.save(Path(directory))
        names = ("adapter_config.json", "adapter_model.safetensors")
        config, tensors = ((Path(directory) / name).read_bytes() for name in names)
        return config.decode(), tensors


def read(family: Family, name: str, change: Change = lambda _c, _t: None) -> Delta:
    raw, stored = files(f"{family}-{name}")
    config, tensors = json.loads(raw), load(stored)
    change(config, tensors)
    upload = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}
    return read_upload(upload, spec_of(tiny_backbone(family)))


def sites(delta: Delta, kind: type) -> list[str]:
    return [str(op.site) for op in delta.ops if isinstance(op, kind)]


def test_a_saved_head_is_one_op_and_keeps_the_embedding() -> None:
    for family in ("llama", "gpt2"):
        delta = read(family, "saved_head")
        (op,) = (op for op in delta.ops if isinstance(op, Head))
        assert (str(op.site), op.bias) == ("logits", None)
        assert torch.equal(op.weight, load(files(f"{family}-saved_head")[1])[HEAD])
        assert not sites(delta, Rows)


def test_lora_is_not_on_a_module_that_is_saved() -> None:
    delta = read("llama", "saved_head")  # its target_modules name lm_head too
    assert {op.write.name for op in delta.ops if isinstance(op, LowRank)} == {"q.out"}


def test_a_saved_embedding_leaves_a_tied_head_alone() -> None:
    delta = read("gpt2", "saved_embedding")
    assert (sites(delta, Rows), sites(delta, Head), sites(delta, Affine)) == (["embed"], [], ["final"])
    (rows,) = (op for op in delta.ops if isinstance(op, Rows))
    assert rows.ids.tolist() == list(range(97))


def test_a_name_saves_every_module_that_ends_in_it() -> None:
    norms = [site for layer in range(3) for site in (f"{layer}.attn.x", f"{layer}.ffn.x")]
    delta = read("llama", "saved_all")
    with_weight = [str(op.site) for op in delta.ops if isinstance(op, Affine) and op.weight is not None]
    assert sorted(with_weight) == sorted([*norms, "final"])
    assert (sites(delta, Head), sites(delta, Rows)) == (["logits"], ["embed"])


def both(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["modules_to_save"].append("wte")
    tensors[WTE] = torch.ones(97, 32)


def test_tied_head_and_embedding_saved_together_are_two_modules() -> None:
    delta = read("gpt2", "saved_head", both)
    assert (sites(delta, Rows), sites(delta, Head)) == (["embed"], ["logits"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda _c, tensors: tensors.pop(HEAD), "modules_to_save: 'lm_head' has no weight"),
        (lambda config, _t: config.update(modules_to_save=None), f"'{HEAD}': modules_to_save does not name its module"),
        (lambda _c, tensors: tensors.update({HEAD: torch.ones(98, 32)}), "[98, 32], expected [97, 32]"),
        (lambda _c, tensors: tensors.update({HEAD: torch.ones(32, 97)}), "[32, 97], expected [97, 32]"),
        (lambda _c, tensors: tensors[HEAD].view(-1)[7].fill_(torch.nan), "1 non-finite value"),
        (lambda _c, tensors: tensors.update({HEAD[:-6] + "bias": torch.ones(97)}), "'base_model.model.lm_head.bias'"),
        (lambda config, _t: config["modules_to_save"].append("score"), "ends in 'score'"),
        (lambda config, _t: config["modules_to_save"].append("mlp.c_fc"), "h.1.mlp.c_fc' can't be replaced whole"),
        (lambda config, _t: config["modules_to_save"].append("wte"), "'transformer.wte' has no weight"),
        (lambda config, _t: config["modules_to_save"].append(""), "modules_to_save"),
        (lambda config, _t: config.update(modules_to_save="lm_head"), "modules_to_save: got a string"),
        (lambda config, _t: config.update(ensure_weight_tying=True), "ensure_weight_tying"),
        (
            lambda _c, tensors: tensors.update({"base_model.model.lm_head.modules_to_save.weight": torch.ones(97, 32)}),
            "without this part",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(change: Change, named: str) -> None:
    with pytest.raises(InvalidDelta) as caught:
        read("gpt2", "saved_head", change)
    assert named in str(caught.value)


def test_an_embedding_saved_beside_virtual_tokens_is_ambiguous() -> None:
    def embedding(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["modules_to_save"] = ["embed_tokens"]
        for key in [key for key in tensors if key != "prompt_embeddings"]:
            del tensors[key]
        tensors["base_model.model.embed_tokens.weight"] = torch.ones(97, 32)

    with pytest.raises(InvalidDelta, match="generated tokens with the saved one"):
        read("llama", "prompt_saved", embedding)


def test_a_saved_norm_is_not_trained_by_its_bias_too() -> None:
    def all_biases(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["bias"] = "all"
        tensors["base_model.model.transformer.ln_f.original_module.bias"] = torch.ones(32)

    with pytest.raises(InvalidDelta, match="Train it with bias='none'"):
        read("gpt2", "saved_embedding", all_biases)


def _savers() -> list[Case]:
    """Every method that has a reader and whose PEFT config has `modules_to_save`, on llama."""
    found = []
    for row in METHODS:
        config = row.case("llama").config()
        if config.peft_type.value in READERS and hasattr(config, "modules_to_save"):
            found.append(row.case("llama"))
    return found


@pytest.mark.parametrize("case", _savers(), ids=case_id)
def test_every_method_may_save_a_head(case: Case) -> None:
    def config() -> Any:
        made = case.config()
        made.modules_to_save = ["lm_head"]
        return made

    with quiet():
        raw, stored = saved(Case(case.name, case.family, config, forward=case.forward))
    upload = {"adapter_config.json": raw.encode(), "adapter_model.safetensors": stored}
    delta = read_upload(upload, spec_of(tiny_backbone("llama")))
    assert sites(delta, Head) == ["logits"]
