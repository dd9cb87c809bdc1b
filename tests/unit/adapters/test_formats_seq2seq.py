"""Readers on encoder-decoders: what PEFT's own `generate` does with its files, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from adapters.errors import InvalidDelta
from adapters.formats import read_directory
from adapters.normal_form import AttnPrefix, Rows, VirtualTokens
from adapters.validate import check
from tests.cases import Case, quiet, spec_of, tiny_backbone
from tests.contract.exactness import outputs_of
from tests.contract.forced import Given
from tests.families import Seq2Seq
from tests.method_table import METHODS


def case_of(family: Seq2Seq, method: str) -> Case:
    return next(row for row in METHODS if row.name == method).case(family)


def edited(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["bart", "mbart", "t5"])
def test_prefixes_are_the_keys_and_values_that_peft_gives_the_decoder(
    family: Seq2Seq, tmp_path: Path
) -> None:
    """Its stacks are 3 and 2, 3 and 4, 3 and 3 layers deep."""
    adapted = case_of(family, "prefix_tuning").save(tmp_path)
    delta = read_directory(tmp_path, spec_of(tiny_backbone(family)))
    cache = adapted.get_prompt(1).self_attention_cache
    assert [(op.stack, op.layer) for op in delta.ops if isinstance(op, AttnPrefix)] == [
        ("dec", layer) for layer in range(adapted.config.to_dict().get("decoder_layers", 3))
    ]
    for op in delta.ops:
        assert isinstance(op, AttnPrefix)
        for found, given in (
            (op.key, cache.layers[op.layer].keys),
            (op.value, cache.layers[op.layer].values),
        ):
            torch.testing.assert_close(found.transpose(0, 1), given[0], rtol=0, atol=0)
    assert delta.position_offset == 5


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "multitask_prompt_tuning"])
def test_prompts_stand_before_the_encoders_tokens_alone(method: str, tmp_path: Path) -> None:
    case = case_of("t5", method)
    adapted = case.save(tmp_path)
    delta = read_directory(tmp_path, spec_of(tiny_backbone("t5")))
    (op,) = delta.ops
    length = adapted.peft_config["default"].num_virtual_tokens
    assert isinstance(op, VirtualTokens)
    torch.testing.assert_close(op.embeddings, adapted.get_prompt(1, **case.forward)[0, :length].detach())
    assert delta.position_offset == 0


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning", "multitask_prompt_tuning"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_reference_of_the_fidelity_matrix_is_what_peft_generates_with(
    family: Seq2Seq, method: str
) -> None:
    case = case_of(family, method)
    model = tiny_backbone(family)
    adapted = case.build(model)
    tokens, source = [model.config.decoder_start_token_id, 30, 41, 11], (5, 90, 23)

    def force(seen: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(
            1, torch.tensor(tokens)[[seen.shape[1] % 4]], 0
        )

    with quiet():
        found = adapted.generate(
            input_ids=torch.tensor([source]),
            attention_mask=torch.ones(1, 3, dtype=torch.long),
            max_new_tokens=4,
            logits_processor=LogitsProcessorList([force]),
            return_dict_in_generate=True,
            output_logits=True,
            **case.forward,
        )
    expected = outputs_of(adapted, model.base_model, family, Given(tokens, source), **case.forward)
    torch.testing.assert_close(torch.cat(found.logits), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_the_shared_table_act_in_both_stacks_and_in_a_tied_head(tmp_path: Path) -> None:
    case_of("bart", "trainable_tokens").save(tmp_path)
    delta = read_directory(tmp_path, spec_of(tiny_backbone("bart")))
    assert [str(op.site) for op in delta.ops if isinstance(op, Rows)] == ["enc.embed", "dec.embed", "logits"]


@pytest.mark.parametrize(
    ("family", "method", "change", "named"),
    [
        ("bart", "prefix_tuning", {"num_transformer_submodules": 1}, "num_transformer_submodules: got 1"),
        ("bart", "prefix_tuning", {"task_type": None}, "without it PEFT leaves the prompt out"),
        ("t5", "lora", {"task_type": "CAUSAL_LM"}, "served for SEQ_2_SEQ_LM"),
        ("t5", "lora", {"task_type": "SEQ_CLS"}, "served for SEQ_2_SEQ_LM"),
        ("marian", "prompt_tuning", {}, "scales the embeddings"),
        ("mbart", "prefix_tuning", {"num_layers": 3}, "fails on the others"),
        ("t5", "alora", {}, "which of its two rows"),
    ],
)
def test_what_cannot_be_served_as_peft_does_is_refused(
    family: Seq2Seq, method: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    case_of(family, method).save(tmp_path)
    edited(tmp_path, lambda config: config.update(change))
    with pytest.raises(InvalidDelta) as caught:
        read_directory(tmp_path, spec_of(tiny_backbone(family)))
    assert any(named in problem for problem in caught.value.problems), caught.value.problems


def test_t5_positions_its_decoder_behind_a_prefix_or_as_without_it(tmp_path: Path) -> None:
    case_of("t5", "prefix_tuning").save(tmp_path)
    spec = spec_of(tiny_backbone("t5"))
    delta = read_directory(tmp_path, spec)
    assert check(delta, spec) == []
    assert check(replace(delta, position_offset=0), spec) == []  # AdapterHub's
    (problem,) = check(replace(delta, position_offset=3), spec)
    assert "position_offset: 3, expected 0 or 5" in problem
