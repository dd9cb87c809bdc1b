"""Task heads against PEFT and transformers: alone, mixed with others and with generation, shuffled, in chunks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.canonical import from_canonical, to_canonical
from adapters.formats import read_directory
from adapters.normal_form import Delta
from serving.core import BASE, Pooled
from serving.model.backbone import Backbone, adopt_backbone
from tests.cases import tiny_backbone
from tests.contract.task_models import OWN_HEADS, HeadCase, body_of, prompts
from tests.families import CONFIGS, ENCODERS, Encoder, Family
from tests.unit.serving.engine.engine_support import Bench

LIMIT = 2e-5
PROMPTED = {"electra": "prefix_tuning", "distilbert": "prompt_tuning"}
"""The only prompt method that PEFT has for a family: ELECTRA's embeddings are narrow, DistilBERT takes no past keys."""
POOLERS: dict[Encoder, tuple[str, ...]] = {"albert": (), "deberta_v3": ("pooler",), "deberta_v2": ("pooler",)}
"""What a classifier of the family saves besides: DeBERTa's pooler is not its body's, and starts at random."""
CASES = [
    *(HeadCase(f, m, "SEQ_CLS") for f in ("llama", "gpt2") for m in ("lora", "ia3", "ln_tuning")),
    *(HeadCase(f, m, "SEQ_CLS") for f in ("llama", "gpt2") for m in ("prefix_tuning", "prompt_tuning")),
    *(HeadCase("llama", "lora", "SEQ_CLS", n) for n in (1, 2, 7, 50)),
    *(HeadCase(f, m, "TOKEN_CLS", 5) for f in ("llama", "gpt2") for m in ("lora", "prefix_tuning")),
    HeadCase("gpt2", "prompt_tuning", "TOKEN_CLS", 2),
    *(HeadCase(f, "lora", "QUESTION_ANS") for f in ("llama", "gpt2")),
    *(HeadCase(f, m, "FEATURE_EXTRACTION") for f in ("llama", "gpt2") for m in ("lora", "prompt_tuning")),
    *(HeadCase(f, "lora", t) for f in ("opt", "bloom", "qwen2") for t in ("SEQ_CLS", "FEATURE_EXTRACTION")),
    *(
        HeadCase(f, m, t, 2 if t == "QUESTION_ANS" else 3)
        for f in ("bert", "roberta", "electra", "distilbert")
        for t in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
        for m in ("lora", "ia3", "ln_tuning", "prompt_tuning", "prefix_tuning")
        if PROMPTED.get(f, m) == m or "tuning" not in m or m == "ln_tuning"
    ),
    *(HeadCase("bert", "lora", "SEQ_CLS", n) for n in (1, 2, 7, 50)),
    *(
        HeadCase(f, m, t, 2 if t == "QUESTION_ANS" else 3, POOLERS[f] if t == "SEQ_CLS" else ())
        for f in POOLERS
        for m, t in (
            *(("lora", t) for t in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")),
            ("ia3", "QUESTION_ANS"),
            ("ln_tuning", "SEQ_CLS"),
            ("prompt_tuning", "SEQ_CLS"),
            ("prompt_tuning", "TOKEN_CLS"),
        )
    ),
    HeadCase("modernbert", "lora", "FEATURE_EXTRACTION"),
    *(
        HeadCase("modernbert", "lora", t, 2, saved)
        for t in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
        for saved in (("classifier",), ("head", "classifier"))
    ),
    HeadCase("modernbert", "ln_tuning", "SEQ_CLS"),
    HeadCase("modernbert", "prompt_tuning", "SEQ_CLS"),
]


def backbone_of(family: Family | Encoder) -> Backbone:
    alone = family in ENCODERS and family not in OWN_HEADS
    model = body_of(family) if alone else tiny_backbone(family)
    return adopt_backbone(model, name="tiny", device="cpu", dtype="float32")


def numbers(pooled: Pooled) -> Tensor:
    return torch.tensor(pooled.numbers()).view(pooled.shape)


def check(pooled: Pooled, reference: Tensor) -> None:
    got = numbers(pooled)
    assert got.shape == reference.shape
    scale = max(1.0, float(reference.abs().max()))
    assert float((got - reference).abs().max()) <= LIMIT * scale


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Delta, list[Tensor]]]:
    """Every case: its delta, through canonical bytes, and PEFT's answers."""
    found = {}
    for family in {case.family for case in CASES}:
        spec = backbone_of(family).spec
        for case in (c for c in CASES if c.family == family):
            directory: Path = tmp_path_factory.mktemp("adapter")
            case.save(directory)
            pair = to_canonical(read_directory(directory, spec))
            delta = from_canonical(pair.manifest, pair.tensors)
            found[case.name] = (delta, case.reference(directory, [list(p) for p in prompts()]))
    return found


Served = dict[str, tuple[Delta, list[Tensor]]]


@pytest.mark.parametrize("family", sorted({case.family for case in CASES}))
@pytest.mark.parametrize("chunk", [4096, 7])
def test_mixed_and_shuffled_rows_equal_peft_alone(
    family: Family | Encoder, served: Served, chunk: int
) -> None:
    backbone = backbone_of(family)
    mine = [case for case in CASES if case.family == family]
    bench = Bench(
        backbone,
        {case.name: served[case.name][0] for case in mine},
        max_num_batched_tokens=chunk,
        max_num_seqs=8,
    )
    jobs = [(case, index) for case in mine for index in range(len(prompts()))]
    random.Random(chunk).shuffle(jobs)
    for number, (case, index) in enumerate(jobs):
        if number % 5 == 0 and family not in ENCODERS:  # rows that generate, bare, in between
            bench.submit(f"g{number}", prompts()[index], max_tokens=3)
        bench.pool(f"{case.name}/{index}", prompts()[index], case.task, case.name)
    bench.run()
    for case, index in jobs:
        check(bench.pooled(f"{case.name}/{index}"), served[case.name][1][index])
    alone = Bench(backbone, {})
    for number, (_, index) in enumerate(jobs):
        if number % 5 == 0 and family not in ENCODERS:
            alone.submit(f"g{number}", prompts()[index], max_tokens=3)
    alone.run()
    assert all(alone.tokens(n) == bench.tokens(n) for n in {n for n, _ in alone.events})
    bench.assert_nothing_held(*(case.name for case in mine))


def test_the_bare_backbone_embeds_by_the_normalised_mean() -> None:
    backbone = backbone_of("llama")
    bench = Bench(backbone, {})
    for index, prompt in enumerate(prompts()):
        bench.pool(str(index), prompt, HeadCase("llama", "lora", "FEATURE_EXTRACTION").task, BASE)
    bench.run()
    stock = tiny_backbone("llama").base_model
    for index, prompt in enumerate(prompts()):
        with torch.no_grad():
            mean = stock(torch.tensor([prompt])).last_hidden_state[0].mean(dim=0)
        check(bench.pooled(str(index)), torch.nn.functional.normalize(mean, dim=0))


@pytest.mark.parametrize(
    "options",
    [
        {"classifier_pooling": "mean"},
        {"classifier_pooling": "mean", "classifier_activation": "silu", "classifier_bias": True},
        {"classifier_bias": True, "norm_bias": True, "norm_eps": 0.01},
    ],
)
def test_modernbert_heads_are_as_the_configuration_says(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = type(CONFIGS["modernbert"])(**{**CONFIGS["modernbert"].to_diff_dict(), **options})
    monkeypatch.setitem(CONFIGS, "modernbert", changed)
    cases = [HeadCase("modernbert", "lora", "SEQ_CLS", 3, saved) for saved in ((), ("head",))]
    backbone, deltas = backbone_of("modernbert"), {}
    for case in cases:
        case.save(tmp_path / case.name)
        deltas[case.name] = read_directory(tmp_path / case.name, backbone.spec)
    assert [delta.head.base_head for delta in deltas.values() if delta.head is not None] == [True, False]
    bench = Bench(backbone, deltas)
    for case in cases:
        for index, prompt in enumerate(prompts()):
            bench.pool(f"{case.name}/{index}", prompt, case.task, case.name)
    bench.run()
    for case in cases:
        wanted = case.reference(tmp_path / case.name, [list(prompt) for prompt in prompts()])
        for index, reference in enumerate(wanted):
            check(bench.pooled(f"{case.name}/{index}"), reference)
