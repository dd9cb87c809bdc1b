"""The endpoints of task heads over a real engine: what they answer equals PEFT's, and what they refuse is said."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.cases import tiny_backbone
from tests.contract.task_models import HeadCase
from tests.unit.serving.http_support import Gateway
from tests.unit.serving.pooling_support import Adapter, pooling_gateway, tokenizer
from tests.unit.serving.test_http_files import sent

TEXTS = ("the cat sat", "a dog, a bone", "zebra")
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    directory = tmp_path_factory.mktemp("adapters")
    made = [
        Adapter(
            directory, HeadCase("llama", "lora", "SEQ_CLS", 3), "mood", {"labels": ["bad", "so so", "good"]}
        ),
        Adapter(
            directory,
            HeadCase("llama", "ia3", "SEQ_CLS", 7),
            "topics",
            {"labels": {str(i): f"t{i}" for i in range(7)}, "problem_type": "multi_label_classification"},
        ),
        Adapter(directory, HeadCase("llama", "lora", "SEQ_CLS", 1), "fits"),
        Adapter(directory, HeadCase("llama", "lora", "TOKEN_CLS", 5), "names", {"labels": TAGS}),
        Adapter(directory, HeadCase("llama", "prefix_tuning", "FEATURE_EXTRACTION"), "vectors"),
        Adapter(directory, HeadCase("llama", "lora", "QUESTION_ANS"), "reader"),
    ]
    return {adapter.name: adapter for adapter in made}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with pooling_gateway(tmp_path) as made:
        yield made


async def post(world: Gateway, route: str, **body: Any) -> dict[str, Any]:
    answer = await world.http.post(f"/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refused(world: Gateway, route: str, **body: Any) -> str:
    answer = await world.http.post(f"/v1/{route}", json=body)
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["message"])


def close(got: Any, reference: Tensor) -> None:
    scale = max(1.0, float(reference.abs().max()))
    assert float((torch.tensor(got) - reference).abs().max()) <= 2e-5 * scale


def mean_of(text: str) -> Tensor:
    with torch.no_grad():
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        mean = tiny_backbone("llama").base_model(ids).last_hidden_state[0].mean(dim=0)
    return torch.nn.functional.normalize(mean, dim=0)


async def test_the_openai_sdk_gets_embeddings(world: Gateway, adapters: dict[str, Adapter]) -> None:
    await adapters["vectors"].push(world)
    bare = await world.openai.embeddings.create(model="tiny", input=list(TEXTS))
    for item, text in zip(bare.data, TEXTS, strict=True):
        close(item.embedding, mean_of(text))
    assert bare.usage.prompt_tokens == sum(len(tokenizer()(text)["input_ids"]) for text in TEXTS)
    adapted = await world.openai.embeddings.create(model="vectors", input=TEXTS[0])
    (reference,) = adapters["vectors"].reference(TEXTS[0])
    close(adapted.data[0].embedding, reference)
    short = await world.openai.embeddings.create(model="vectors", input=TEXTS[0], dimensions=8)
    close(short.data[0].embedding, torch.nn.functional.normalize(reference[:8], dim=0))


async def test_floats_base64_and_token_ids_are_the_same_vector(world: Gateway) -> None:
    ids = tokenizer()(TEXTS[0])["input_ids"]
    floats = await post(world, "embeddings", model="tiny", input=[ids, ids])
    text = await post(world, "embeddings", model="tiny", input=TEXTS[0], encoding_format="base64")
    vector = torch.frombuffer(bytearray(base64.b64decode(text["data"][0]["embedding"])), dtype=torch.float32)
    assert torch.tensor(floats["data"][1]["embedding"]).equal(vector)


async def test_classification_of_any_label_count_equals_peft(
    world: Gateway, adapters: dict[str, Adapter]
) -> None:
    for name in ("mood", "topics", "fits"):
        adapter = adapters[name]
        await adapter.push(world)
        answer = await post(world, "classify", model=name, input=list(TEXTS))
        references = adapter.reference(*TEXTS)
        for item, reference in zip(answer["data"], references, strict=True):
            close(item["logits"], reference)
            assert item["num_classes"] == len(reference) == len(answer["labels"])
            if name == "mood":
                close(item["probs"], reference.softmax(-1))
                assert item["label"] == ["bad", "so so", "good"][int(reference.argmax())]
                assert item["ood"]["energy"] == pytest.approx(-float(reference.logsumexp(-1)), abs=1e-4)
                assert item["ood"]["max_softmax"] == pytest.approx(
                    1 - float(reference.softmax(-1).max()), abs=1e-5
                )
            elif name == "topics":
                close(item["probs"], reference.sigmoid())
                chosen = [f"t{i}" for i, score in enumerate(reference) if score >= 0]
                assert item["predicted"] == chosen
            else:
                assert item["probs"] is None
                assert item["ood"] == {}


async def test_statistics_give_distances_to_the_classes(world: Gateway, adapters: dict[str, Adapter]) -> None:
    adapter = adapters["mood"]
    draw = torch.Generator().manual_seed(1)
    means, root = torch.randn(3, 32, generator=draw), torch.randn(32, 32, generator=draw)
    precision = root @ root.T
    files = adapter.files(**{"ood.safetensors": save({"class_means": means, "precision": precision})})
    assert (await world.http.put("/v1/adapters/known/versions", files=files)).status_code == 201
    answer = await post(world, "classify", model="known", input=TEXTS[0])
    (vector,) = adapter.features(TEXTS[0])
    away = vector.double() - means.double()
    mahalanobis = ((away @ precision.double()) * away).sum(-1).min()
    cosine = torch.nn.functional.cosine_similarity(vector[None], means).max()
    assert answer["data"][0]["ood"]["mahalanobis"] == pytest.approx(float(mahalanobis), rel=1e-4)
    assert answer["data"][0]["ood"]["cosine"] == pytest.approx(float(cosine), abs=1e-4)


async def test_tags_are_spans_of_the_text(world: Gateway, adapters: dict[str, Adapter]) -> None:
    await adapters["names"].push(world)
    text = "anna lives in oslo, near bo"
    (reference,) = adapters["names"].reference(text)
    encoded = tokenizer()(text, return_offsets_mapping=True)
    expected = [
        (TAGS[int(row.argmax())], float(row.softmax(-1).max()), text[a:b], a, b)
        for row, (a, b) in zip(reference, encoded["offset_mapping"], strict=True)
        if a < b and int(row.argmax())
    ]
    answer = await post(world, "token_classify", model="names", input=text, aggregation_strategy="none")
    got = [
        tuple(e[k] for k in ("label", "score", "text", "start", "end")) for e in answer["data"][0]["entities"]
    ]
    assert [(g[0], *g[2:]) for g in got] == [(e[0], *e[2:]) for e in expected]
    assert [g[1] for g in got] == pytest.approx([e[1] for e in expected], abs=1e-5)
    for strategy in ("simple", "first"):
        whole = await post(
            world, "token_classify", model="names", input=[text], aggregation_strategy=strategy
        )
        for entity in whole["data"][0]["entities"]:
            assert entity["text"] == text[entity["start"] : entity["end"]]
            assert entity["label"] in {"PER", "LOC"}


async def test_documents_come_in_the_order_of_the_head(world: Gateway, adapters: dict[str, Adapter]) -> None:
    await adapters["fits"].push(world)
    documents = [*TEXTS, "the end"]
    references = adapters["fits"].reference(*(("the cat", document) for document in documents))
    scores = [float(reference.sigmoid()) for reference in references]
    answer = await post(
        world, "rerank", model="fits", query="the cat", documents=documents, top_n=3, return_documents=True
    )
    order = sorted(range(4), key=lambda index: -scores[index])[:3]
    assert [result["index"] for result in answer["results"]] == order
    assert [r["relevance_score"] for r in answer["results"]] == pytest.approx(
        [scores[i] for i in order], abs=1e-5
    )
    assert [result["document"]["text"] for result in answer["results"]] == [documents[i] for i in order]


async def test_the_answer_to_a_question_is_the_likeliest_span(
    world: Gateway, adapters: dict[str, Adapter]
) -> None:
    await adapters["reader"].push(world)
    question, context = "who sat", "the cat sat on a mat"
    (reference,) = adapters["reader"].reference((question, context))
    encoding = tokenizer()(question, context).encodings[0]
    places = [at for at, sequence in enumerate(encoding.sequence_ids) if sequence == 1]
    begin, end = (reference[places, column].softmax(0) for column in (0, 1))
    spans = [
        (float(begin[i] * end[j]), i, j)
        for i in range(len(places))
        for j in range(i, min(i + 4, len(places)))
    ]
    best = sorted(spans, reverse=True)[:3]
    answer = await post(
        world,
        "question_answer",
        model="reader",
        question=question,
        context=context,
        top_n=3,
        max_answer_tokens=4,
    )
    expected = [(encoding.offsets[places[i]][0], encoding.offsets[places[j]][1]) for _, i, j in best]
    assert [(item["start"], item["end"]) for item in answer["data"]] == expected
    assert [item["answer"] for item in answer["data"]] == [context[a:b] for a, b in expected]
    assert [item["score"] for item in answer["data"]] == pytest.approx(
        [score for score, _, _ in best], abs=1e-5
    )


async def test_a_task_is_asked_for_at_its_own_endpoint(world: Gateway, adapters: dict[str, Adapter]) -> None:
    await adapters["mood"].push(world)
    await adapters["names"].push(world)
    for route, body in (
        ("completions", {"prompt": "a"}),
        ("embeddings", {"input": "a"}),
        ("token_classify", {"input": "a"}),
    ):
        message = await refused(world, route, model="mood", **body)
        assert "sequence-classification" in message
        assert "/v1/classify" in message
    assert "/v1/token_classify" in await refused(world, "classify", model="names", input="a")
    assert "no head for sequence-classification" in await refused(world, "classify", model="tiny", input="a")
    assert "3 labels, expected 1" in await refused(world, "rerank", model="mood", query="a", documents=["b"])


async def test_long_inputs_are_refused_or_truncated_where_asked(
    world: Gateway, adapters: dict[str, Adapter]
) -> None:
    await adapters["mood"].push(world)
    await adapters["fits"].push(world)
    long = "ab " * 200
    assert "tokens; 256 fit" in await refused(world, "classify", model="mood", input=long)
    answer = await post(world, "classify", model="mood", input=long, truncate_prompt_tokens=10)
    ids = tokenizer()(long)["input_ids"]
    cut = [*ids[:9], ids[-1]]  # the special token at the end stays
    assert answer["usage"]["prompt_tokens"] == 10
    (reference,) = adapters["mood"].case.reference(adapters["mood"].directory, [cut])
    close(answer["data"][0]["logits"], reference)
    most = await post(world, "classify", model="mood", input=[long, "a"], truncate_prompt_tokens=-1)
    assert most["usage"]["prompt_tokens"] == 256 + 3
    pair = await post(
        world, "rerank", model="fits", query="a b c", documents=[long], truncate_prompt_tokens=12
    )
    assert pair["usage"]["prompt_tokens"] == 12
    assert "2 are special" in await refused(
        world, "classify", model="mood", input=long, truncate_prompt_tokens=2
    )
    assert "truncate" in await refused(world, "classify", model="mood", input=long, truncate_prompt_tokens=0)


@pytest.mark.parametrize("empty", ["", [], [""], [[]], ["a", ""]])
async def test_empty_input_is_refused(world: Gateway, empty: Any) -> None:
    message = await refused(world, "embeddings", model="tiny", input=empty)
    assert "empty" in message


async def test_more_dimensions_than_there_are_is_refused(world: Gateway) -> None:
    assert "has 32" in await refused(world, "embeddings", model="tiny", input="a", dimensions=33)


async def test_unknown_models_and_too_many_inputs_are_refused(tmp_path: Path) -> None:
    async with pooling_gateway(tmp_path, max_choices=2) as world:
        answer = await world.http.post("/v1/embeddings", json={"model": "nobody", "input": "a"})
        assert answer.status_code == 404
        assert "at most 2" in await refused(world, "embeddings", model="tiny", input=["a"] * 3)


async def test_a_head_json_sent_as_a_file_names_the_labels(
    world: Gateway, adapters: dict[str, Adapter]
) -> None:
    adapter = adapters["mood"]
    contents = [item for _, item in adapter.files()]
    assert contents[-1][0] == "head.json"
    ids = [await sent(world, data, name, part=1 << 20) for name, data in contents]
    answer = await world.http.put("/v1/adapters/sent/versions", json={"file_ids": ids})
    assert answer.status_code == 201, answer.text
    await adapter.push(world)
    (by_id,), (in_body,) = [
        (await post(world, "classify", model=name, input=TEXTS[0]))["data"] for name in ("sent", adapter.name)
    ]
    assert by_id["label"] in {"bad", "so so", "good"}
    assert by_id == in_body


async def test_tokens_are_counted(world: Gateway) -> None:
    await post(world, "embeddings", model="tiny", input=list(TEXTS))
    wanted = sum(len(tokenizer()(text)["input_ids"]) for text in TEXTS)
    async with asyncio.timeout(10):  # the ledger closes its rows behind the answer
        while True:
            (used,) = (await world.http.get("/v1/usage")).json()["data"]
            if (used["prompt_tokens"], used["completion_tokens"]) == (wanted, 0):
                return
            await asyncio.sleep(0.01)
