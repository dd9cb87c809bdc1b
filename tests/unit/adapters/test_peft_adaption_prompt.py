"""Adaption prompts: which layers get one, and what is refused."""

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

from adapters.canonical import from_canonical, to_canonical
from adapters.errors import InvalidDelta
from adapters.formats import read_upload
from adapters.normal_form import AttnPrefix, Delta
from tests.cases import PEFT_CASES, Family, spec_of, tiny_backbone

STEM = "base_model.model.model.layers.2.self_attn.adaption_"


@lru_cache
def files() -> tuple[dict[str, Any], dict[str, Tensor]]:
    case = next(case for case in PEFT_CASES if case.name == "adaption_prompt")
    with TemporaryDirectory() as directory:
        case.save(Path(directory))
        config = json.loads((Path(directory) / "adapter_config.json").read_text())
        return config, load((Path(directory) / "adapter_model.safetensors").read_bytes())


def read(
    change: Callable[[dict[str, Any], dict[str, Tensor]], object] = lambda _c, _t: None,
    family: Family = "llama",
) -> Delta:
    config, tensors = files()
    config, tensors = dict(config), {key: tensor.clone() for key, tensor in tensors.items()}
    change(config, tensors)
    upload = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}
    return read_upload(upload, spec_of(tiny_backbone(family)))


def test_the_last_layers_get_a_prompt_and_no_virtual_tokens() -> None:
    delta = read()
    assert [op.layer for op in delta.ops if isinstance(op, AttnPrefix)] == [1, 2]
    assert (delta.num_virtual_tokens, delta.position_offset) == (0, 0)
    pair = to_canonical(delta)
    again = from_canonical(pair.manifest, pair.tensors)
    assert [(op.merge, op.projected) for op in again.ops if isinstance(op, AttnPrefix)] == [
        ("separate", False)
    ] * 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config, _t: config.update(adapter_layers=3), "layers.0.self_attn.adaption_prompt"),
        (lambda config, _t: config.update(adapter_layers=4), "has 3 layers"),
        (lambda config, _t: config.update(adapter_layers=1), "layers.1.self_attn.adaption_gate"),
        (lambda config, _t: config.update(adapter_len=4), "expected [1, 4, 32]"),
        (lambda config, _t: config.update(target_modules="mlp"), "self_attn"),
        (lambda config, _t: config.pop("adapter_len"), "adapter_len is missing"),
        (lambda _c, tensors: tensors.pop(f"{STEM}gate"), f"no '{STEM}gate'"),
        (lambda _c, tensors: tensors.update({f"{STEM}gate": torch.ones(2)}), "expected [1]"),
        (lambda _c, tensors: tensors.update(stray=torch.ones(2)), "'stray'"),
    ],
)
def test_what_is_refused(change: Callable[[dict[str, Any], dict[str, Tensor]], object], named: str) -> None:
    with pytest.raises(InvalidDelta) as caught:
        read(change)
    assert named in str(caught.value)


def test_gpt2_is_refused() -> None:
    with pytest.raises(InvalidDelta) as caught:
        read(family="gpt2")
    assert "llama" in str(caught.value)
