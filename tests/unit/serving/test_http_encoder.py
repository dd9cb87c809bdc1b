"""An encoder behind the endpoints: masks, pairs of texts, tasks side by side; what it does not do is said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertForMaskedLM, PreTrainedTokenizerFast

from adapters.store import LocalBlobStore
from serving.config import Engine as EngineSettings
from serving.engine.backend import LocalBackend
from serving.model.backbone import adopt_backbone
from tests.cases import quiet, randomise, tiny_backbone, tiny_body
from tests.contract.task_models import HeadCase, task_model
from tests.families import Encoder
from tests.unit.serving.http_support import FakeBackend, Gateway, gateway

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@lru_cache
def tokenizer() -> PreTrainedTokenizerFast:
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def with_head() -> BertForMaskedLM:
    model = cast(BertForMaskedLM, tiny_backbone("bert"))
    model.bert = tiny_body("bert")
    model.tie_weights()
    return model


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Gateway]:
    backbone = adopt_backbone(with_head(), name="tiny", tokenizer=tokenizer(), device="cpu", dtype="float32")
    backend = LocalBackend(backbone, LocalBlobStore(tmp_path / "blobs"), EngineSettings(max_num_seqs=8))
    backend.start()
    try:
        async with gateway(tmp_path, cast(FakeBackend, backend)) as made:
            yield made
    finally:
        await asyncio.to_thread(backend.stop)


async def push(world: Gateway, directory: Path, name: str) -> None:
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "tiny"}))
    files = [("file", (p.name, p.read_bytes())) for p in directory.iterdir() if p.suffix != ".md"]
    answer = await world.http.put(f"/v1/adapters/{name}/versions", files=files)
    assert answer.status_code == 201, answer.text


async def post(world: Gateway, route: str, **body: Any) -> dict[str, Any]:
    answer = await world.http.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def probabilities(model: Any, text: str) -> Tensor:
    with torch.no_grad():
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        logits: Tensor = model(input_ids=ids).logits[0]
    return logits[ids[0] == tokenizer().mask_token_id].softmax(dim=-1)


async def test_masks_are_filled_as_by_the_stock_model_and_through_a_delta(
    world: Gateway, tmp_path: Path
) -> None:
    directory, text = tmp_path / "filler", "a [MASK] c [MASK]"
    config = LoraConfig(r=3, target_modules=["query", "value", "predictions.decoder"])
    with quiet():
        adapted = get_peft_model(with_head(), config)
        randomise(adapted, 3)
        adapted.save_pretrained(str(directory), save_embedding_layers=False)
        tuned = PeftModel.from_pretrained(with_head(), str(directory)).eval()
    await push(world, directory, "filler")
    stock, changed = probabilities(with_head(), text), probabilities(tuned, text)
    assert not torch.allclose(stock, changed, atol=1e-2)
    for model, expected in (("tiny", stock), ("filler", changed)):
        (row,) = (await post(world, "fill_mask", model=model, input=text, top_k=3))["data"]
        assert len(row["masks"]) == 2
        for mask, wanted in zip(row["masks"], expected, strict=True):
            best = wanted.topk(3)
            assert [c["token"] for c in mask] == best.indices.tolist()
            assert [c["score"] for c in mask] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert mask[0]["token_str"] == tokenizer().decode([mask[0]["token"]])


async def test_only_targets_are_chosen_with_their_probabilities_among_all(world: Gateway) -> None:
    text = "a [MASK] c"
    (row,) = (await post(world, "fill_mask", model="tiny", input=text, targets=["b", "z"]))["data"]
    ids = tokenizer().convert_tokens_to_ids(["b", "z"])
    wanted = probabilities(with_head(), text)[0][ids]
    assert {c["token"]: c["score"] for c in row["masks"][0]} == pytest.approx(
        dict(zip(ids, wanted.tolist(), strict=True)), abs=1e-5
    )
    answer = await world.http.post("/v1/fill_mask", json={"model": "tiny", "input": text, "targets": ["bz"]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "targets"


async def test_pairs_are_read_with_their_token_types(world: Gateway, tmp_path: Path) -> None:
    case, directory = HeadCase("bert", "lora", "SEQ_CLS", 1), tmp_path / "fits"
    case.save(directory)
    await push(world, directory, "fits")
    query, documents = "abc", ["de", "f g h", "abc"]
    found = await post(world, "rerank", model="fits", query=query, documents=documents)
    with quiet(), torch.no_grad():
        model = PeftModel.from_pretrained(task_model("bert", "SEQ_CLS", 1), str(directory)).eval()
        encoded = [tokenizer()(query, document, return_tensors="pt") for document in documents]
        assert all(bool(e["token_type_ids"].any()) for e in encoded)
        typed = [float(model(**e).logits.sigmoid()) for e in encoded]
        plain = [float(model(input_ids=e["input_ids"]).logits.sigmoid()) for e in encoded]
    assert typed != pytest.approx(plain, abs=1e-3)
    scores = {result["index"]: result["relevance_score"] for result in found["results"]}
    assert [scores[i] for i in range(3)] == pytest.approx(typed, abs=2e-5)


@pytest.mark.parametrize(
    ("route", "body", "said"),
    [
        ("completions", {"prompt": "a"}, "is an encoder and does not generate"),
        ("fill_mask", {"input": "a b"}, "has no mask"),
        ("fill_mask", {"input": ""}, "The input is empty"),
        ("classify", {"input": "a"}, "has no head for sequence-classification"),
        ("embeddings", {"input": "a " * 200}, "tokens"),
    ],
)
async def test_what_an_encoder_can_not_answer_is_said(
    world: Gateway, route: str, body: dict[str, Any], said: str
) -> None:
    answer = await world.http.post(f"/v1/{route}", json={"model": "tiny", **body})
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


async def test_truncation_never_cuts_a_mask(world: Gateway) -> None:
    text = "ab " * 300 + "the [MASK] sat on a [MASK] mat"
    refused = await world.http.post("/v1/fill_mask", json={"model": "tiny", "input": text})
    assert refused.status_code == 400
    found = await post(world, "fill_mask", model="tiny", input=text, truncate_prompt_tokens=8)
    assert len(found["data"][0]["masks"]) == 2
    assert found["usage"]["prompt_tokens"] == 8
    short = {"model": "tiny", "input": text, "truncate_prompt_tokens": 4}
    refused = await world.http.post("/v1/fill_mask", json=short)
    assert "4 are special tokens and masks" in refused.json()["error"]["message"]


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
async def test_pairs_through_virtual_tokens_keep_their_types(
    world: Gateway, method: str, tmp_path: Path
) -> None:
    directory = tmp_path / "adapter"
    HeadCase("bert", method, "SEQ_CLS", 1).save(directory)
    with quiet(), torch.no_grad():
        model = PeftModel.from_pretrained(task_model("bert", "SEQ_CLS", 1), str(directory)).eval()
        expected = [
            float(model(**tokenizer()("who", text, return_tensors="pt")).logits) for text in ("a cat", "b")
        ]
    await push(world, directory, "fits")
    found = await post(world, "rerank", model="fits", query="who", documents=["a cat", "b"])
    scores = {item["index"]: item["relevance_score"] for item in found["results"]}
    sigmoids = [float(torch.tensor(value).sigmoid()) for value in expected]
    assert [scores[0], scores[1]] == pytest.approx(sigmoids, abs=2e-5)


@pytest.mark.parametrize("family", ["distilbert", "electra", "modernbert"])
async def test_every_family_fills_masks_as_its_stock_model(family: Encoder, tmp_path: Path) -> None:
    stock = probabilities(tiny_backbone(family), "the [MASK] sat on a [MASK]")
    backbone = adopt_backbone(
        tiny_backbone(family), name="tiny", tokenizer=tokenizer(), device="cpu", dtype="float32"
    )
    backend = LocalBackend(backbone, LocalBlobStore(tmp_path / "blobs"), EngineSettings())
    backend.start()
    try:
        async with gateway(tmp_path, cast(FakeBackend, backend)) as made:
            texts = ["the [MASK] sat on a [MASK]", "a [MASK]"]
            found = (await post(made, "fill_mask", model="tiny", input=texts, top_k=3))["data"]
    finally:
        await asyncio.to_thread(backend.stop)
    for mask, row in zip(found[0]["masks"], stock, strict=True):
        assert [item["token"] for item in mask] == row.topk(3).indices.tolist()
        assert [item["score"] for item in mask] == pytest.approx(row.topk(3).values.tolist(), abs=2e-5)
