"""Trainable tokens: what is refused, and which sites a tied and an untied backbone get."""

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
from adapters.normal_form import Delta, Rows
from tests.cases import PEFT_CASES, Family, case_id, spec_of, tiny_backbone

EMBED, HEAD = (f"base_model.model.{path}.trainable_tokens_delta" for path in ("transformer.wte", "lm_head"))


@lru_cache
def files(family: Family, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    case = next(case for case in PEFT_CASES if case_id(case) == f"{family}-{name}")
    with TemporaryDirectory() as directory:
        case.save(Path(directory))
        config = json.loads((Path(directory) / "adapter_config.json").read_text())
        return config, load((Path(directory) / "adapter_model.safetensors").read_bytes())


def read(
    family: Family,
    change: Callable[[dict[str, Any], dict[str, Tensor]], object] = lambda _c, _t: None,
    name: str = "trainable_tokens",
) -> Delta:
    config, tensors = files(family, name)
    config, tensors = dict(config), {key: tensor.clone() for key, tensor in tensors.items()}
    change(config, tensors)
    upload = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}
    return read_upload(upload, spec_of(tiny_backbone(family)))


def test_a_tied_head_gets_the_rows_too() -> None:
    tied, untied = read("gpt2"), read("llama")
    assert [str(op.site) for op in tied.ops if isinstance(op, Rows)] == ["embed", "logits"]
    assert [str(op.site) for op in untied.ops if isinstance(op, Rows)] == ["embed"]
    assert read("gpt2", lambda _c, tensors: tensors.pop(HEAD)).num_parameters == tied.num_parameters


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda _c, tensors: tensors[HEAD].add_(1), "tied"),
        (lambda _c, tensors: tensors.update({EMBED: torch.ones(2, 32)}), "expected [38, 32]"),
        (lambda config, _t: config.update(token_indices=[3]), "expected [1, 32]"),
        (lambda config, _t: config.update(token_indices=[*range(37), 97]), "expected 0 to 96"),
        (lambda config, _t: config.update(token_indices=[*range(37), 0]), "replaced once"),
        (lambda config, _t: config.update(token_indices=[]), "a list of token ids"),
        (lambda config, _t: config.pop("token_indices"), "token_indices is missing"),
        (lambda config, _t: config.update(target_modules=["c_attn"]), "only embeddings"),
    ],
)
def test_what_is_refused(change: Callable[[dict[str, Any], dict[str, Tensor]], object], named: str) -> None:
    with pytest.raises(InvalidDelta) as caught:
        read("gpt2", change)
    assert named in str(caught.value)


def test_beside_lora_the_config_names_the_embedding() -> None:
    def rename(config: dict[str, Any], _t: object) -> None:
        config["trainable_token_indices"] = {"wpe": list(range(2, 30))}

    def shorten(config: dict[str, Any], _t: object) -> None:
        config["trainable_token_indices"] = [2, 3]

    def forget(config: dict[str, Any], _t: object) -> None:
        config["trainable_token_indices"] = None

    assert [
        str(op.site) for op in read("gpt2", name="trainable_tokens_lora").ops if isinstance(op, Rows)
    ] == [
        "embed",
        "logits",
    ]
    for change, named in (
        (rename, "'wpe' is not the token embedding"),
        (shorten, "expected [2, 32]"),
        (forget, "the config names no such token rows"),
    ):
        with pytest.raises(InvalidDelta) as caught:
            read("gpt2", change, name="trainable_tokens_lora")
        assert named in str(caught.value)
