"""Deltas on masked language model heads: LoRA on the transform and whole saved heads, in one batch, against PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from adapters.canonical import from_canonical, to_canonical
from adapters.formats import read_directory
from adapters.normal_form import SCORES, Delta, Head, Site
from adapters.tasks import HeadSpec, Task
from adapters.validate import check
from serving.core import BASE, PoolingParams, Request
from serving.model.backbone import adopt_backbone
from tests.cases import quiet, randomise, tiny_backbone
from tests.families import Encoder
from tests.method_table import TARGETS
from tests.unit.serving.engine.engine_support import Bench

LIMIT = 2e-5
TRANSFORM: dict[Encoder, str] = {
    "bert": "transform.dense",
    "roberta": "lm_head.dense",
    "electra": "generator_predictions.dense",
    "distilbert": "vocab_transform",
    "modernbert": "head.dense",
    "albert": "predictions.dense",
    "deberta_v2": "transform.dense",
    "deberta_xlarge": "transform.dense",
}
"""Of the families whose masked language model head is served: not DeBERTa v3's own one, which multiplies by itself."""
WHOLE: dict[Encoder, list[str]] = {
    "bert": ["cls"],
    "roberta": ["lm_head"],
    "electra": ["generator_predictions", "generator_lm_head"],
    "distilbert": ["vocab_transform", "vocab_layer_norm", "vocab_projector"],
    "modernbert": ["head", "decoder"],
    "albert": ["predictions"],
    "deberta_v2": ["cls"],
    "deberta_xlarge": ["cls"],
}
PROMPTS = ((5, 8, 3, 7, 40, 61, 9), (4,), (12, 96, 33, 2))


def configs(family: Encoder) -> dict[str, PeftConfig]:
    attention = list(TARGETS[family].linears)
    found: dict[str, PeftConfig] = {
        "lora on the transform": LoraConfig(r=3, target_modules=[*attention, TRANSFORM[family]]),
        "lora on the transform alone": LoraConfig(r=3, target_modules=[TRANSFORM[family]]),
        "the whole head": LoraConfig(r=3, target_modules=attention, modules_to_save=WHOLE[family]),
        "the transform saved": LoraConfig(
            r=3, target_modules=attention, modules_to_save=[TRANSFORM[family]], bias="lora_only"
        ),
    }
    if family == "bert":  # virtual tokens stand before the masks
        rest = {"task_type": "FEATURE_EXTRACTION", **TARGETS[family].prompt}
        found["prefix"] = PrefixTuningConfig(num_virtual_tokens=4, **rest)
        found["prompt"] = PromptTuningConfig(num_virtual_tokens=3, **rest)
    return found


@torch.no_grad()
def log_probabilities(model: torch.nn.Module) -> list[Tensor]:
    """Of every token at every place of every prompt, [T, V] each."""
    found = [model(input_ids=torch.tensor([p])).logits[0].log_softmax(dim=-1) for p in PROMPTS]
    return [rows[-len(prompt) :] for rows, prompt in zip(found, PROMPTS, strict=True)]


@pytest.mark.parametrize("family", TRANSFORM)
def test_masks_are_scored_through_changed_heads_as_by_peft(family: Encoder, tmp_path: Path) -> None:
    backbone = adopt_backbone(tiny_backbone(family), name="tiny", device="cpu", dtype="float32")
    deltas: dict[str, Delta] = {}
    expected = {"bare": log_probabilities(tiny_backbone(family))}
    for seed, (name, config) in enumerate(configs(family).items()):
        directory = tmp_path / str(seed)
        with quiet():
            adapted = get_peft_model(tiny_backbone(family), config)
            randomise(adapted, seed, 0.3)
            adapted.save_pretrained(str(directory))
            tuned = PeftModel.from_pretrained(tiny_backbone(family), str(directory)).eval()
        expected[name] = log_probabilities(tuned)
        pair = to_canonical(read_directory(directory, backbone.spec))
        deltas[name] = from_canonical(pair.manifest, pair.tensors)
        moved = [(a - b).abs().max() for a, b in zip(expected[name], expected["bare"], strict=True)]
        assert min(moved) > 0.05, name
    bench = Bench(backbone, deltas)
    jobs = [
        (name, index, at)
        for index, prompt in enumerate(PROMPTS)
        for name in expected
        for at in {0, len(prompt) - 1}
    ]
    for name, index, at in jobs:
        bench.engine.submit(
            Request(
                request_id=f"{name}/{index}/{at}",
                prompt_token_ids=PROMPTS[index],
                adapter_digest=BASE if name == "bare" else name,
                pooling=PoolingParams(task=Task.FILL_MASK),
                masks=(at,),
                words=tuple((token,) for token in range(backbone.spec.vocab_size)),
            )
        )
    bench.run()
    for name, index, at in jobs:
        wanted = expected[name][index][at]
        got = torch.tensor(bench.pooled(f"{name}/{index}/{at}").numbers())
        assert float((got - wanted).abs().max()) <= LIMIT * float(wanted.abs().max()), (name, index, at)
    whole = {op.site for op in deltas["the whole head"].ops if isinstance(op, Head)}
    assert whole == {Site("mlm.out"), Site("logits")}


def test_a_classifier_does_not_pass_its_own_layer_off_as_the_masked_head(tmp_path: Path) -> None:
    backbone = adopt_backbone(tiny_backbone("bert"), name="tiny", device="cpu", dtype="float32")
    with quiet():
        adapted = get_peft_model(tiny_backbone("bert"), configs("bert")["lora on the transform"])
        randomise(adapted, 1, 0.3)
        adapted.save_pretrained(str(tmp_path))
    delta = read_directory(tmp_path, backbone.spec)
    assert check(delta, backbone.spec) == []
    head = HeadSpec(pooling="cls", labels=("a", "b"), problem_type="single_label")
    classifier = replace(
        delta,
        task=Task.SEQUENCE_CLASSIFICATION.value,
        head=head,
        ops=(*delta.ops, Head(site=SCORES, weight=torch.ones(2, 32))),
    )
    (problem,) = check(classifier, backbone.spec)
    assert "never run for sequence-classification" in problem


@pytest.mark.parametrize("name", ["lora on the transform alone", "the whole head"])
def test_the_admission_probe_sees_what_only_the_masked_head_shows(name: str, tmp_path: Path) -> None:
    backbone = adopt_backbone(tiny_backbone("roberta"), name="tiny", device="cpu", dtype="float32")
    with quiet():
        adapted = get_peft_model(tiny_backbone("roberta"), configs("roberta")[name])
        randomise(adapted, 1, 0.3)
        adapted.save_pretrained(str(tmp_path))
    delta = read_directory(tmp_path, backbone.spec)
    bench = Bench(backbone, {"d": delta})
    proof = bench.engine.admit(delta, "d")
    bench.run(until=proof.done)
    assert proof.result().effect > 0.05
