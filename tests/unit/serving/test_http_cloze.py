"""Classification by cloze behind the endpoint: against the formula, beside other tasks, and what is refused where."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from httpx import Response
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save
from transformers import PreTrainedModel

from adapters.store import LocalBlobStore
from serving.config import Engine as EngineSettings
from serving.engine.backend import LocalBackend
from serving.model.backbone import adopt_backbone
from tests.cases import quiet, randomise, tiny_body
from tests.contract.cloze_reference import probabilities
from tests.contract.task_models import HeadCase
from tests.unit.serving.cli_support import commands
from tests.unit.serving.http_support import FakeBackend, Gateway, gateway
from tests.unit.serving.test_http_encoder import tokenizer, with_head

PATTERNS = ["{text} is {mask}.", "it was {mask}, {text}", "({mask}) {text}"]
VERBALIZER = {"up": ["a", "bcd"], "down": ["xy"], "level": ["q", "rs", "t"]}  # words of one to three tokens
WEIGHTS = [2, 1, 0.5]
CLOZE = {"patterns": PATTERNS, "verbalizer": VERBALIZER, "weights": WEIGHTS}
TEXTS = ["a cat", "b", "the quick brown fox jumps over it", "x {mask} y", "dog [MASK] q"]
LIMIT = 2e-5


async def serve(tmp_path: Path, model: PreTrainedModel) -> AsyncIterator[Gateway]:
    backbone = adopt_backbone(model, name="tiny", tokenizer=tokenizer(), device="cpu", dtype="float32")
    backend = LocalBackend(backbone, LocalBlobStore(tmp_path / "blobs"), EngineSettings(max_num_seqs=8))
    backend.start()
    try:
        async with gateway(tmp_path, cast(FakeBackend, backend)) as made:
            yield made
    finally:
        await asyncio.to_thread(backend.stop)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Gateway]:
    async for made in serve(tmp_path, with_head()):
        yield made


@pytest.fixture
async def headless(tmp_path: Path) -> AsyncIterator[Gateway]:
    async for made in serve(tmp_path, tiny_body("bert")):
        yield made


def adapted(directory: Path, seed: int = 3) -> dict[str, bytes]:
    """A LoRA on attention and on the transform of the masked head, as PEFT saves it."""
    config = LoraConfig(r=3, target_modules=["query", "value", "transform.dense"])
    with quiet():
        model = get_peft_model(with_head(), config)
        randomise(model, seed, 0.3)
        model.save_pretrained(str(directory))
    return files_of(directory)


def files_of(directory: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".md"}
    config = json.loads(found["adapter_config.json"]) | {"base_model_name_or_path": "tiny"}
    return found | {"adapter_config.json": json.dumps(config).encode()}


async def put(world: Gateway, name: str, files: dict[str, bytes], **head: Any) -> Response:
    whole = files | ({"head.json": json.dumps(head).encode()} if head else {})
    sent = [("file", item) for item in whole.items()]
    answer: Response = await world.http.put(f"/v1/adapters/{name}/versions", files=sent)
    return answer


async def push(world: Gateway, name: str, files: dict[str, bytes], **head: Any) -> dict[str, Any]:
    answer = await put(world, name, files, **head)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def post(world: Gateway, route: str, **body: Any) -> dict[str, Any]:
    answer = await world.http.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def check(item: dict[str, Any], expected: np.ndarray[Any, Any], energy: float) -> None:
    assert np.abs(np.array(item["probs"]) - expected).max() <= LIMIT
    assert item["label"] == list(VERBALIZER)[int(expected.argmax())]
    logits = np.array(item["logits"])
    scale = max(1.0, float(np.abs(logits).max()))
    assert np.abs(np.log(np.exp(logits).sum()) + energy) <= LIMIT * scale
    assert item["ood"]["energy"] == pytest.approx(energy, abs=LIMIT * scale)
    assert item["ood"]["max_softmax"] == pytest.approx(1 - expected.max(), abs=LIMIT)


async def test_answers_are_the_formulas_with_and_without_a_delta_beside_other_tasks(
    world: Gateway, tmp_path: Path
) -> None:
    await push(world, "tuned", adapted(tmp_path / "tuned"), cloze=CLOZE)
    await push(world, "zero", {}, cloze=CLOZE)
    HeadCase("bert", "lora", "SEQ_CLS").save(tmp_path / "ordinary")
    await push(world, "ordinary", files_of(tmp_path / "ordinary"))
    texts = [text for text in TEXTS if "[MASK]" not in text]
    jobs: list[dict[str, Any]] = [
        *({"route": "classify", "model": name, "input": texts} for name in ("tuned", "zero", "ordinary")),
        {"route": "fill_mask", "model": "tuned", "input": "a [MASK]"},
        {"route": "embeddings", "model": "tiny", "input": texts},
    ]
    mixed = await asyncio.gather(*(post(world, **job) for job in jobs))
    alone = [await post(world, **job) for job in jobs]
    with quiet():
        tuned = PeftModel.from_pretrained(with_head(), str(tmp_path / "tuned")).eval()
    answers = []
    for found, model in ((mixed[0], tuned), (mixed[1], with_head())):
        assert found["labels"] == list(VERBALIZER)
        expected = [
            probabilities(model, tokenizer(), PATTERNS, VERBALIZER, WEIGHTS, text=text) for text in texts
        ]
        for item, (wanted, energy) in zip(found["data"], expected, strict=True):
            check(item, wanted, energy)
        answers.append(np.array([wanted for wanted, _ in expected]))
    assert np.abs(answers[0] - answers[1]).max() > 0.05  # the delta does something
    assert np.abs(np.diff(answers[1], axis=0)).max() > 1e-3  # and so does the text
    for together, single in zip(mixed, alone, strict=True):
        for one, other in zip(together["data"], single["data"], strict=True):
            for field in ("probs", "logits", "embedding"):
                if field in one:
                    assert one[field] == pytest.approx(other[field], abs=1e-5)
    # all that ran is counted: each pattern, once for every length of a word
    lengths = [
        len(tokenizer()(pattern.replace("{mask}", "[MASK]" * k).replace("{text}", text))["input_ids"])
        for text in texts
        for pattern in PATTERNS
        for k in (1, 2, 3)
    ]
    assert mixed[0]["usage"]["prompt_tokens"] == sum(lengths)


async def test_a_mask_in_the_text_is_not_the_patterns(world: Gateway) -> None:
    await push(
        world, "zero", {}, cloze={"patterns": ["{text} {mask} ."], "verbalizer": {"y": ["a"], "n": ["b"]}}
    )
    found = await post(world, "classify", model="zero", input="dog [MASK] q")
    ids = torch.tensor([tokenizer()("dog [MASK] q [MASK] .")["input_ids"]])
    with torch.no_grad():
        own = (ids[0] == tokenizer().mask_token_id).nonzero()[-1]
        logits = with_head()(input_ids=ids).logits[0, own[0]]
    chosen = logits[tokenizer().convert_tokens_to_ids(["a", "b"])].softmax(dim=0)
    assert found["data"][0]["probs"] == pytest.approx(chosen.tolist(), abs=LIMIT)


async def test_two_texts_are_read_and_only_they_are_cut(world: Gateway) -> None:
    cloze = {"patterns": ["{text_pair} ? {mask}, {text}"], "verbalizer": {"y": ["a"], "n": ["bc"]}}
    await push(world, "pairs", {}, cloze=cloze)
    both = {"input": ["a b", "c"], "text_pair": ["d", "e f g"]}
    found = await post(world, "classify", model="pairs", **both)
    for index in range(2):
        texts = {"text": both["input"][index], "text_pair": both["text_pair"][index]}
        wanted, _ = probabilities(
            with_head(),
            tokenizer(),
            cloze["patterns"],
            cloze["verbalizer"],
            **texts,  # type: ignore[arg-type]
        )
        assert found["data"][index]["probs"] == pytest.approx(wanted.tolist(), abs=LIMIT)
    # 12 tokens for one mask: [CLS] ? [MASK] , [SEP] and 7 of texts; the longer text goes first
    long = {"input": "a " * 300, "text_pair": "d e f"}
    cut = await post(world, "classify", model="pairs", **long, truncate_prompt_tokens=12)
    for k, text in ((1, "a a a a"), (2, "a a a")):
        filled = f"d e f ? {'[MASK]' * k}, {text}"
        assert len(tokenizer()(filled)["input_ids"]) == 12
    assert cut["usage"]["prompt_tokens"] == 24
    (one,) = cut["data"]
    wanted = probabilities_of_parts(("a", "a a a a"), ("bc", "a a a"))
    assert one["probs"] == pytest.approx(wanted, abs=LIMIT)
    for body, said in (
        (long, "fit"),
        (long | {"truncate_prompt_tokens": 5}, "5 are special tokens, masks and the pattern"),
        ({"input": "a"}, "two texts"),
        ({"input": [[1, 2]]}, "token ids"),
        ({"input": "", "text_pair": "a"}, "empty"),
        ({"input": ["a", "b"], "text_pair": "a"}, "1 texts for 2 inputs"),
    ):
        refused = await world.http.post("/v1/classify", json={"model": "pairs", **body})
        assert refused.status_code == 400, refused.text
        assert said in refused.json()["error"]["message"]


def probabilities_of_parts(*parts: tuple[str, str]) -> list[float]:
    """Of words, each with the text that is left beside its masks."""
    from tests.contract.cloze_reference import word_score  # noqa: PLC0415

    scores = [
        word_score(
            with_head(), tokenizer(), "{text_pair} ? {mask}, {text}", word, text=text, text_pair="d e f"
        )
        for word, text in parts
    ]
    return [float(p) for p in torch.tensor(scores).softmax(dim=0)]


async def test_classes_are_told_apart_by_the_states_at_the_masks(world: Gateway, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    means, root = torch.randn(3, 32, generator=draw), torch.randn(32, 32, generator=draw)
    precision = root @ root.T
    statistics = save({"class_means": means, "precision": precision})
    await push(world, "zero", {"ood.safetensors": statistics}, cloze=CLOZE)
    found = await post(world, "classify", model="zero", input=TEXTS[:2])
    for item, text in zip(found["data"], TEXTS[:2], strict=True):
        vector = torch.zeros(32, dtype=torch.float64)
        for pattern, share in zip(PATTERNS, np.array(WEIGHTS) / sum(WEIGHTS), strict=True):
            rows = []
            for k in (1, 2, 3):
                filled = pattern.replace("{mask}", "[MASK]" * k).replace("{text}", text)
                ids = torch.tensor([tokenizer()(filled)["input_ids"]])
                with torch.no_grad():
                    states = with_head().bert(ids).last_hidden_state[0].double()
                rows.append(states[ids[0] == tokenizer().mask_token_id].mean(dim=0))
            vector += share * torch.stack(rows).mean(dim=0)
        away = vector - means.double()
        expected = float(((away @ precision.double()) * away).sum(dim=1).min())
        assert item["ood"]["mahalanobis"] == pytest.approx(expected, rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(vector[None], means.double()).max()
        assert item["ood"]["cosine"] == pytest.approx(float(cosine), abs=1e-4)


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"patterns": ["{text} it is"]}, "{mask} 0 times, expected once"),
    ({"patterns": ["{text} {mask} {mask}"]}, "{mask} 2 times"),
    ({"patterns": ["it is {mask}"]}, "{text} 0 times"),
    ({"patterns": ["{txt} {text} {mask}"]}, "braces stand around"),
    ({"patterns": ["{text} {mask}", "{text} {text_pair} {mask}"]}, "one text or two"),
    ({"patterns": []}, "patterns: 0"),
    ({"verbalizer": {"up": ["a"], "down": []}}, "label 1: 0 words"),
    ({"verbalizer": {"up": ["a"], "down": ["a"]}}, "stands for two labels"),
    ({"verbalizer": {"up": ["a"], "down": [" b"]}}, "without space around"),
    ({"verbalizer": {"up": ["a"]}}, "one label"),
    ({"verbalizer": {"up": ["a"], "down": ["1"]}}, "no tokens of its own"),  # [UNK]
    (
        {"verbalizer": {"up": ["a"], "down": ["\u200d"]}},
        "no tokens of its own",
    ),  # cleaned away or unknown
    ({"verbalizer": {"up": ["a"], "down": ["[MASK]"]}}, "no tokens of its own"),
    ({"verbalizer": {"up": ["a"], "down": ["bcdefghij"]}}, "9 tokens, expected at most 8"),
    ({"weights": [1, 2]}, "weights: 2 for 3 patterns"),
    ({"weights": [1, 0, 1]}, "above 0"),
    ({"pattern": ["{text} {mask}"]}, "pattern"),
)

BESIDE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"labels": ["up", "down"]}, "`labels` differ in 'level'"),
    ({"task": "token-classification"}, "a cloze is for sequence-classification"),
    ({"pooling": "mean"}, "reads what stands at its mask"),
    ({"problem_type": "multi_label"}, "single_label"),
)


async def test_what_can_not_be_asked_is_refused_when_it_is_uploaded(world: Gateway) -> None:
    asked = [({"cloze": CLOZE | head}, said) for head, said in REFUSED]
    for head, said in asked + [({"cloze": CLOZE} | changes, said) for changes, said in BESIDE]:
        answer = await put(world, "zero", {}, **head)
        assert answer.status_code == 400, (said, answer.text)
        assert said in answer.json()["error"]["message"]
    listed = await world.http.get("/v1/adapters")
    assert listed.json()["data"] == []


async def test_a_head_alone_that_is_no_cloze_and_a_cloze_beside_a_head_are_refused(
    world: Gateway, tmp_path: Path
) -> None:
    answer = await put(world, "zero", {}, labels=["a", "b"])
    assert "only a cloze stands alone" in answer.json()["error"]["message"]
    HeadCase("bert", "lora", "SEQ_CLS").save(tmp_path / "ordinary")
    answer = await put(world, "both", files_of(tmp_path / "ordinary"), cloze=CLOZE)
    assert "has a sequence-classification head of its own" in answer.json()["error"]["message"]


async def test_a_backbone_without_a_masked_head_refuses_a_cloze(headless: Gateway) -> None:
    answer = await put(headless, "zero", {}, cloze=CLOZE)
    assert answer.status_code == 400, answer.text
    assert "no masked language model head" in answer.json()["error"]["message"]


async def test_labels_order_the_scores_and_another_task_is_refused(world: Gateway) -> None:
    await push(world, "zero", {}, cloze=CLOZE, labels=["level", "up", "down"])
    found = await post(world, "classify", model="zero", input="a cat")
    assert found["labels"] == ["level", "up", "down"]
    expected, _ = probabilities(with_head(), tokenizer(), PATTERNS, VERBALIZER, WEIGHTS, text="a cat")
    assert found["data"][0]["probs"] == pytest.approx([expected[2], expected[0], expected[1]], abs=LIMIT)
    for route, body in (
        ("token_classify", {"input": "a"}),
        ("rerank", {"query": "a", "documents": ["b"]}),
        ("embeddings", {"input": "a"}),
    ):
        refused = await world.http.post(f"/v1/{route}", json={"model": "zero", **body})
        assert refused.status_code == 400, refused.text


async def test_the_commands_send_a_head_alone_and_show_what_it_asks(
    world: Gateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mood").mkdir()
    (tmp_path / "mood" / "head.json").write_text(json.dumps({"cloze": CLOZE}))
    run = commands(world, monkeypatch)
    await run("push", str(tmp_path / "mood"), "mood")
    shown = await run("adapters", "show", "mood")
    assert ", ".join(PATTERNS) in shown
    assert "up: a, bcd; down: xy; level: q, rs, t" in shown
