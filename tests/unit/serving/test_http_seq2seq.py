"""An encoder-decoder behind the endpoints: uploads, streams, choices and usage; what it does not do is said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from peft import LoraConfig, PeftModel, get_peft_model

from adapters.store import LocalBlobStore
from serving.config import Engine as EngineSettings
from serving.core import BackboneInfo
from serving.engine.backend import LocalBackend
from serving.http.generation import planned_usage
from serving.model.backbone import Backbone, load_backbone
from tests.cases import quiet, randomise
from tests.unit.serving.engine.seq2seq_support import generated, one_character_a_token, tiny_model
from tests.unit.serving.http_support import FakeBackend, Gateway, gateway

TEXT = "A#prompt&of*some(length"
IDS = [ord(c) - 33 for c in TEXT]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    directory = tmp_path_factory.mktemp("backbone") / "tiny"
    tiny_model("t5").save_pretrained(directory)
    one_character_a_token().save_pretrained(directory)
    return load_backbone(str(directory), device="cpu", dtype="float32")


@pytest.fixture
async def world(backbone: Backbone, tmp_path: Path) -> AsyncIterator[Gateway]:
    backend = LocalBackend(backbone, LocalBlobStore(tmp_path / "blobs"), EngineSettings(max_num_seqs=8))
    backend.start()
    try:
        async with gateway(tmp_path, cast(FakeBackend, backend)) as made:
            yield made
    finally:
        await asyncio.to_thread(backend.stop)


def text_of(tokens: list[int]) -> str:
    return "".join(chr(33 + token) for token in tokens)


async def test_a_lora_of_both_stacks_is_uploaded_and_served_beside_the_backbone(
    world: Gateway, tmp_path: Path
) -> None:
    directory = tmp_path / "adapter"
    with quiet():
        adapted = get_peft_model(
            tiny_model("t5"),
            LoraConfig(r=3, target_modules=["q", "k", "v", "o", "wi", "wo"], task_type="SEQ_2_SEQ_LM"),
        )
        randomise(adapted, 3)
        adapted.save_pretrained(str(directory))
        tuned = PeftModel.from_pretrained(tiny_model("t5"), str(directory)).eval()
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "tiny"}))
    files = [("file", (p.name, p.read_bytes())) for p in directory.iterdir() if p.suffix != ".md"]
    answer = await world.http.put("/v1/adapters/tuned/versions", files=files)
    assert answer.status_code == 201, answer.text
    body = {"prompt": TEXT, "max_tokens": 7, "temperature": 0, "ignore_eos": True}
    bare, delta = await asyncio.gather(
        *(world.http.post("/v1/completions", json={"model": name, **body}) for name in ("tiny", "tuned"))
    )
    expected = [generated(model, IDS, 7) for model in (tiny_model("t5"), tuned)]
    assert [reply.json()["choices"][0]["text"] for reply in (bare, delta)] == list(map(text_of, expected))
    assert expected[0] != expected[1]
    assert bare.json()["usage"] == {
        **bare.json()["usage"],
        "prompt_tokens": len(TEXT),
        "completion_tokens": 7,
        "total_tokens": len(TEXT) + 7,
    }


async def test_choices_and_streams_carry_tokens_and_their_probabilities(world: Gateway) -> None:
    body = {"model": "tiny", "prompt": IDS, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    answer = await world.http.post("/v1/completions", json={**body, "n": 3, "logprobs": 2})
    assert answer.status_code == 200, answer.text
    expected = text_of(generated(tiny_model("t5"), IDS, 5))
    assert [choice["text"] for choice in answer.json()["choices"]] == [expected] * 3
    assert len(answer.json()["choices"][0]["logprobs"]["token_logprobs"]) == 5
    streamed = await world.http.post("/v1/completions", json={**body, "stream": True})
    events = [
        line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: {")
    ]
    assert "".join(c["text"] for e in events for c in json.loads(e)["choices"]) == expected


@pytest.mark.parametrize(
    ("route", "body", "said"),
    [
        ("completions", {"prompt": "a", "prompt_logprobs": 1}, "encoder-decoder"),
        ("completions", {"prompt": [5] * 2049}, "fit the encoder"),
        ("completions", {"prompt": "a", "max_tokens": 2048}, "fit the decoder"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "chat template"),
        ("fill_mask", {"input": "a"}, "mask"),
        ("embeddings", {"input": "a"}, "encoder-decoder"),
        ("classify", {"input": "a"}, "encoder-decoder"),
    ],
)
async def test_what_an_encoder_decoder_can_not_answer_is_said(
    world: Gateway, route: str, body: dict[str, Any], said: str
) -> None:
    answer = await world.http.post(f"/v1/{route}", json={"model": "tiny", **body})
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(("reads_apart", "reserved"), [(False, 64), (True, 110)])
def test_limits_reserve_prompt_and_answer_apart(reads_apart: bool, reserved: int) -> None:
    info = BackboneInfo(
        name="tiny",
        digest="",
        spec_json="",
        max_model_len=64,
        vocab_size=97,
        has_chat_template=False,
        created=0,
        reads_apart=reads_apart,
    )
    assert planned_usage([(5,) * 60], 1, 1, 50, info).reserved_tokens == reserved
