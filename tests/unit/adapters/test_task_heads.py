"""Task heads at rest: what is stored, what is refused, and how PEFT's are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, ones

from adapters.backbone_spec import BackboneSpec, HeadStyle, ModuleShape, ModuleSpec, Slice
from adapters.canonical import from_canonical, to_canonical
from adapters.errors import InvalidDelta
from adapters.formats import read_upload
from adapters.normal_form import SCORES, Affine, Delta, Head, LowRank, Site
from adapters.tasks import HeadSpec, Task
from adapters.validate import check
from tests.cases import DIGEST, spec_of, tiny_backbone
from tests.contract.task_models import HeadCase
from tests.families import Encoder

SPEC = spec_of(tiny_backbone("llama"))
SCORE = "base_model.model.score.weight"
Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def classifier(*stages: Head, task: str = Task.SEQUENCE_CLASSIFICATION, **head: Any) -> Delta:
    """A LoRA with a head of three labels."""
    lora = LowRank(read=Site("attn.x", 0), write=Site("q.out", 0), A=ones(2, 32), B=ones(32, 2))
    spec = {"pooling": "last", "labels": ("a", "b", "c"), "problem_type": "single_label", **head}
    ops = (lora, *(stages or (Head(site=SCORES, weight=ones(3, 32)),)))
    return Delta(method="LORA", ops=ops, task=task, head=HeadSpec(**spec), backbone_digest=DIGEST)


TWO = (
    Head(
        site=SCORES,
        weight=ones(8, 32),
        activation="tanh",
        norm_weight=ones(8),
        norm_bias=ones(8),
        norm_eps=1e-5,
    ),
    Head(site=SCORES, weight=ones(3, 8), bias=ones(3)),
)


@pytest.mark.parametrize(
    "delta",
    [
        classifier(),
        classifier(*TWO),
        classifier(Head(site=SCORES, weight=ones(3, 32), class_means=ones(3, 32), precision=ones(32, 32))),
        classifier(task=Task.TOKEN_CLASSIFICATION, pooling="tokens"),
        classifier(problem_type="multi_label", pooling="last_not_pad", pad_token_id=7),
        classifier(
            Head(site=SCORES, weight=ones(2, 32)),
            task=Task.QUESTION_ANSWERING, pooling="tokens", labels=(), problem_type=None,
        ),
        classifier(task=Task.EMBEDDING, pooling="mean", labels=(), problem_type=None, normalize=True),
    ],
)  # fmt: skip
def test_a_head_comes_back_as_it_was_stored(delta: Delta) -> None:
    assert check(delta, SPEC) == []
    pair = to_canonical(delta)
    back = from_canonical(pair.manifest, pair.tensors)
    assert (back.head, back.task) == (delta.head, delta.task)
    assert to_canonical(back) == pair
    other = replace(delta, head=replace(delta.head, pooling="cls"))  # type: ignore[type-var]
    assert to_canonical(other).digest != pair.digest


def test_the_digest_of_a_delta_without_a_task_head_is_what_it_was_before_there_were_any() -> None:
    lora = LowRank(
        read=Site("attn.x", 0), write=Site("q.out", 0), A=torch.arange(8.0).view(2, 4) / 8, B=ones(4, 2)
    )
    lm_head = Head(site=Site("logits"), weight=torch.arange(12.0).view(3, 4), bias=ones(3))
    delta = Delta(method="LORA", ops=(lora, lm_head), backbone_digest=DIGEST, labels={"team": "x"})
    assert to_canonical(delta).digest == "5a301d361f98b39d6f9bda75a7ba319f3a39a41214a1dd3e0813ff3511dd4950"


@pytest.mark.parametrize(
    ("delta", "named"),
    [
        (classifier(labels=("a", "b")), "2 labels for a head with 3 scores"),
        (classifier(labels=("a", "a", "c")), "same name"),
        (classifier(labels=("a", "", "c")), "1 to 256 characters"),
        (classifier(labels=(1, 2, 3)), "1 to 256 characters"),
        (classifier(problem_type=None), "problem_type: expected single_label or multi_label or regression"),
        (classifier(pooling="tokens"), "scores one vector of the whole input"),
        (classifier(pooling="median"), "pooling: expected one of"),
        (classifier(pooling="pooler"), "has no pooler"),
        (classifier(normalize=True), "normalize"),
        (classifier(pad_token_id=3), "only beside the pooling last_not_pad"),
        (classifier(task=Task.TOKEN_CLASSIFICATION), "scores each token by itself"),
        (classifier(task=Task.EMBEDDING), "embedding has none"),
        (classifier(base_head=True), "base_head: the backbone has no dense layer"),
        (classifier(task=Task.CAUSAL_LM), "has no task head"),
        (classifier(task="poetry"), "task: not served yet"),
        (classifier(Head(site=SCORES, weight=ones(3, 31))), "stage 0 of the head: weight: shape [3, 31]"),
        (classifier(TWO[0], Head(site=SCORES, weight=ones(3, 9))), "stage 1 of the head: weight: shape [3, 9]"),
        (classifier(Head(site=SCORES, weight=ones(3, 32), activation="mish")), "activation"),  # type: ignore[arg-type]
        (classifier(Head(site=SCORES, weight=ones(3, 32), norm_weight=ones(3))), "a norm has both"),
        (classifier(Head(site=SCORES, weight=ones(3, 32) * torch.nan)), "96 non-finite values"),
        (classifier(Head(site=SCORES, weight=ones(3, 32), precision=ones(32, 32))), "class_means"),
        (classifier(TWO[0], replace(TWO[1], class_means=ones(3, 8))), "stage 1 of the head: class_means"),
        (classifier(Head(site=SCORES, weight=ones(3, 32)), Head(site=Site("logits"), weight=ones(97, 32))),
         "never run for sequence-classification"),
        (classifier(Head(site=SCORES, weight=ones(3, 32)), task=Task.QUESTION_ANSWERING, pooling="tokens"),
         "3 scores a token, expected 2"),
        (replace(classifier(), head=None), "says how its head is read"),
        (replace(classifier(), ops=(Affine(site=Site("final"), scale=ones(32)),)), "at least one stage"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(delta: Delta, named: str) -> None:
    assert named in " | ".join(check(delta, SPEC))


@pytest.mark.parametrize("poison", [None, 5, "x", [1], {"a": 1}, True, 1.5])
@pytest.mark.parametrize(
    "field", ["pooling", "labels", "problem_type", "normalize", "pad_token_id", "base_head"]
)
def test_fields_of_any_type_are_problems_not_crashes(field: str, poison: Any) -> None:
    pair = to_canonical(classifier())
    manifest = json.loads(pair.manifest)
    manifest["head"][field] = poison
    files = {"manifest.json": json.dumps(manifest).encode(), "tensors.safetensors": pair.tensors}
    allowed = {("pad_token_id", None)}
    if (field, poison) in [(f, p) for f, p in allowed]:
        assert read_upload(files, SPEC).head == classifier().head
        return
    with pytest.raises(InvalidDelta):
        read_upload(files, SPEC)


@lru_cache
def saved(case: HeadCase) -> tuple[str, bytes]:
    with TemporaryDirectory() as directory:
        case.save(Path(directory))
        names = ("adapter_config.json", "adapter_model.safetensors")
        config, tensors = ((Path(directory) / name).read_bytes() for name in names)
        return config.decode(), tensors


def read(case: HeadCase, change: Change = lambda _c, _t: None, head: Any = None, **more: bytes) -> Delta:
    raw, stored = saved(case)
    config, tensors = json.loads(raw), load(stored)
    change(config, tensors)
    files = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": save(tensors),
    } | more
    if head is not None:
        files["head.json"] = head if isinstance(head, bytes) else json.dumps(head).encode()
    return read_upload(files, SPEC)


MOOD = HeadCase("llama", "lora", "SEQ_CLS", 3)


def test_labels_and_problem_type_are_those_of_transformers_where_nobody_says() -> None:
    for count, problem in ((1, "regression"), (2, "single_label"), (50, "single_label")):
        delta = read(HeadCase("llama", "lora", "SEQ_CLS", count))
        assert delta.head == HeadSpec(
            pooling="last_not_pad",
            labels=tuple(f"LABEL_{i}" for i in range(count)),
            problem_type=problem,  # type: ignore[arg-type]
        )
        (stage,) = delta.head_stages
        assert torch.equal(stage.weight, load(saved(HeadCase("llama", "lora", "SEQ_CLS", count))[1])[SCORE])


@pytest.mark.parametrize("labels", [["x", "y", "z"], {"2": "z", "0": "x", "1": "y"}])
def test_labels_are_named_by_the_uploader(labels: Any) -> None:
    delta = read(
        MOOD, head={"labels": labels, "problem_type": "multi_label_classification", "pooling": "mean"}
    )
    assert delta.head == HeadSpec(pooling="mean", labels=("x", "y", "z"), problem_type="multi_label")


def test_the_uploader_says_the_task_of_a_config_that_leaves_it_open() -> None:
    case = HeadCase("llama", "lora", "FEATURE_EXTRACTION")
    stated, said = read(case), read(case, lambda c, _t: c.update(task_type=None), head={"task": "embedding"})
    assert to_canonical(stated).digest == to_canonical(said).digest


@pytest.mark.parametrize(
    ("change", "head", "named"),
    [
        (lambda _c, t: t.pop(SCORE), None, "the head has no 'score.weight'"),
        (lambda _c, t: t.update({SCORE: ones(3, 31)}), None, "[3, 31], expected [3, 32]"),
        (lambda _c, t: t.update({SCORE: ones(3)}), None, "[3], expected [3, 32]"),
        (lambda _c, t: t.update({SCORE[:-6] + "bias": ones(3)}), None, "score.bias'"),
        (lambda c, _t: c.update(task_type="TOKEN_CLS"), None, "the head has no 'score.bias'"),
        (lambda c, _t: c.update(task_type="QUESTION_ANS"), None, "the head has no 'qa_outputs.weight'"),
        (lambda c, _t: c.update(task_type="CAUSAL_LM"), None, "no module of the backbone that could be replaced"),
        (lambda c, _t: c.update(task_type="SEQ_2_SEQ_LM"), None, "encoder and a decoder"),
        (lambda c, _t: c.update(task_type=["SEQ_CLS"]), None, "task_type: got a list"),
        (lambda c, _t: c["modules_to_save"].append("pooler"), None, "ends in 'pooler'"),
        (lambda _c, t: t[SCORE].view(-1)[3].fill_(torch.inf), None, "1 non-finite value"),
        (None, {"labels": ["a", "b"]}, "2 labels for a head with 3 scores"),
        (None, {"labels": {"0": "a", "2": "b", "3": "c"}}, "indices 0 to 2"),
        (None, {"labels": "abc"}, "labels"),
        (None, {"names": ["a", "b", "c"]}, "names"),
        (None, {"pooling": "max"}, "pooling"),
        (None, {"task": "embedding"}, "task: embedding, but the adapter itself says sequence-classification"),
        (None, {"normalize": True}, "normalize"),
        (None, b"[]", "head.json"),
        (None, b"{", "head.json"),
    ],
)  # fmt: skip
def test_what_a_peft_adapter_with_a_head_may_not_be(change: Change | None, head: Any, named: str) -> None:
    with pytest.raises(InvalidDelta) as caught:
        read(MOOD, change or (lambda _c, _t: None), head)
    assert named in str(caught.value)


def test_every_problem_of_head_and_adapter_is_listed() -> None:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[SCORE] = ones(3, 31)
        tensors["base_model.model.nowhere.weight"] = ones(2)
        config["extra"] = 1

    with pytest.raises(InvalidDelta) as caught:
        read(MOOD, change, {"labels": {"1": "a"}}, **{"ood.safetensors": save({"mean": ones(3, 32)})})
    text = " ".join(caught.value.problems)
    for named in ("[3, 31]", "nowhere", "'extra'", "indices 0 to 0", "'mean'"):
        assert named in text


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"class_means": ones(3, 31)}, "class_means: shape [3, 31]"),
        ({"class_means": ones(3, 32), "precision": ones(32)}, "precision: shape [32]"),
        ({"precision": ones(32, 32)}, "it has no class_means"),
        ({"class_means": ones(3, 32) * torch.nan}, "96 non-finite"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tensors: dict[str, Tensor], named: str) -> None:
    with pytest.raises(InvalidDelta) as caught:
        read(MOOD, **{"ood.safetensors": save(tensors)})
    assert named in str(caught.value)


def encoder_spec(family: Encoder, **options: Any) -> BackboneSpec:
    """The spec of a backbone with its language model head, changed by `options`."""
    model = tiny_backbone(family)
    model.config = type(model.config)(
        **{**model.config.to_diff_dict(), **options}
    )  # not the one that all share
    return spec_of(model)


@pytest.mark.parametrize(
    ("case", "spec", "named"),
    [
        (
            HeadCase("deberta_v3", "lora", "SEQ_CLS"),
            encoder_spec("deberta_v3"),
            "the head has no 'pooler.dense.weight'; PEFT saves the head where modules_to_save names it",
        ),
        (
            HeadCase("deberta_v3", "lora", "SEQ_CLS", 3, ("pooler",)),
            encoder_spec("deberta_v3", pooler_hidden_act="mish"),
            "whose head could be read",
        ),
        (
            HeadCase("modernbert", "lora", "SEQ_CLS"),
            replace(encoder_spec("modernbert"), head_style=HeadStyle("cls", "gelu", norm_eps=1e-5)),
            "the head has no 'head.dense.weight'",
        ),
        (
            HeadCase("modernbert", "lora", "SEQ_CLS", 3, ("head",)),
            encoder_spec("modernbert", classifier_bias=True),
            "the head has no 'head.dense.bias'",
        ),
        (
            HeadCase("modernbert", "prompt_tuning", "SEQ_CLS"),
            encoder_spec("modernbert", classifier_pooling="mean"),
            "a mean that counts virtual tokens",
        ),
    ],
)  # fmt: skip
def test_heads_of_encoders_that_can_not_be_as_trained_are_refused(
    case: HeadCase, spec: BackboneSpec, named: str
) -> None:
    config, tensors = saved(case)
    with pytest.raises(InvalidDelta) as caught:
        read_upload({"adapter_config.json": config.encode(), "adapter_model.safetensors": tensors}, spec)
    assert named in str(caught.value)


def test_a_delta_in_the_head_that_the_backbone_lends_is_refused() -> None:
    spec = encoder_spec("modernbert")
    place, shape = Slice(Site("dense.out"), 0, 32), ModuleShape("linear", 32, 32, has_bias=False)
    spec = replace(spec, modules=(*spec.modules, ModuleSpec("head.dense", Site("dense.x"), (place,), shape)))
    lora = LowRank(read=Site("dense.x"), write=Site("dense.out"), A=ones(2, 32), B=ones(32, 2))
    for own, wanted in ((True, True), (False, False)):
        delta = classifier(pooling="cls", base_head=own)
        found = check(replace(delta, ops=(*delta.ops, lora)), spec)
        assert any("changes the backbone's own head" in text for text in found) == wanted


def test_a_spec_with_head_and_shared_rows_comes_back_from_json() -> None:
    for spec in (encoder_spec("deberta_v3"), encoder_spec("modernbert")):
        assert BackboneSpec.from_json(spec.to_json()) == spec


def test_a_language_model_adapter_has_no_head_to_say_more_of() -> None:
    with pytest.raises(InvalidDelta, match="no task head"):
        read(
            HeadCase("llama", "lora", "FEATURE_EXTRACTION"),
            lambda c, t: (
                c.update(task_type="CAUSAL_LM"),
                [t.update({k.replace("model.layers", "model.model.layers"): t.pop(k)}) for k in list(t)],
            ),
            {"labels": ["a"]},
        )
