"""The engine behind asyncio: tokenising, refusals before admission, cancellation, integrity of stored bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters.canonical import to_canonical
from adapters.errors import ErrorInfo
from adapters.normal_form import Delta, LowRank, Site
from adapters.store import LocalBlobStore
from serving.config import Engine as EngineSettings
from serving.core import (
    AdmissionProof,
    ChatMessage,
    Event,
    FailureEvent,
    FinishReason,
    GenerateCall,
    PromptEvent,
    Request,
    SamplingParams,
    ServiceClass,
    TokenEvent,
)
from serving.engine.backend import LocalBackend
from serving.model.backbone import Backbone, adopt_backbone
from tests.cases import tiny_backbone


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    tokenizer = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(97)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = (
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}>"
    )
    return adopt_backbone(tiny_backbone("llama"), name="tiny", tokenizer=fast, device="cpu", dtype="float32")


@pytest.fixture
async def backend(backbone: Backbone, tmp_path: Path) -> AsyncIterator[LocalBackend]:
    made = LocalBackend(backbone, LocalBlobStore(tmp_path / "store"), EngineSettings(max_num_seqs=4))
    made.start()
    yield made
    await asyncio.to_thread(made.stop)


def call(prompt: Any, name: str = "r", digest: str | None = None, **sampling: Any) -> GenerateCall:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 5, "ignore_eos": True, **sampling})
    return GenerateCall(request_id=name, prompt=prompt, sampling=params, adapter_digest=digest)


async def collect(backend: LocalBackend, request: GenerateCall) -> list[Event]:
    async with asyncio.timeout(20):
        return [event async for batch in backend.generate(request) for event in batch]


def store_delta(backend: LocalBackend, scale: float = 1.0) -> str:
    torch.manual_seed(0)
    op = LowRank(
        read=Site("attn.x", 0), write=Site("q.out", 0), A=scale * torch.randn(4, 32), B=torch.randn(32, 4)
    )
    pair = to_canonical(Delta(method="LORA", ops=(op,), backbone_digest=backend.backbone.spec.digest))
    backend.store.put(pair.digest, pair.manifest, pair.tensors)
    return pair.digest


async def test_text_ids_and_chat_are_the_same_tokens(backend: LocalBackend) -> None:
    text = await collect(backend, call("uabc>", "a"))
    ids = await collect(backend, call(tuple(ord(c) - 33 for c in "uabc>"), "b"))
    chat = await collect(backend, call((ChatMessage(role="user", content="abc"),), "c"))
    assert text == ids == chat
    first = text[0]
    assert isinstance(first, PromptEvent)
    assert len(first.prompt_token_ids) == 5
    last = text[-1]
    assert isinstance(last, TokenEvent)
    assert last.finish_reason == FinishReason.LENGTH


async def test_a_call_that_is_no_stream_gets_its_first_tokens_and_then_the_rest(
    backend: LocalBackend,
) -> None:
    request = call("abc", max_tokens=40)
    streamed = [batch async for batch in backend.generate(request)]
    together = [batch async for batch in backend.generate(replace(request, streamed=False))]
    assert len(together) == 2
    assert sum(together, ()) == sum(streamed, ())


@pytest.mark.parametrize(
    ("request_", "kind", "param"),
    [
        (call(""), "InvalidRequest", "prompt"),
        (call((5, 97)), "InvalidRequest", "prompt"),
        (call("a", logit_bias={97: 1.0}), "InvalidRequest", "logit_bias"),
        (call("a", max_tokens=10_000), "ContextLengthExceeded", "max_tokens"),
        (call((ChatMessage(role="tool", content="x"),)), "InvalidRequest", "messages"),
        (call("a" * 300), "ContextLengthExceeded", "prompt"),
        (call("a", digest="0" * 64), "StoreError", None),
    ],
)
async def test_refusal_is_one_failure_event(
    backend: LocalBackend, request_: GenerateCall, kind: str, param: str | None
) -> None:
    (event,) = await collect(backend, request_)
    assert isinstance(event, FailureEvent)
    assert (event.error.kind, event.error.param) == (kind, param)
    assert await collect(backend, call("ok", "after"))


async def test_closing_the_stream_cancels_the_request(backend: LocalBackend) -> None:
    stream = backend.generate(call("ab", max_tokens=200))
    await anext(stream)
    await stream.aclose()
    async with asyncio.timeout(5):
        while backend.engine.scheduler.kv.usage > 0:
            await asyncio.sleep(0.005)
    assert await collect(backend, call("ab", "again"))


async def test_admission_of_a_stored_delta_and_refusal_of_an_empty_one(backend: LocalBackend) -> None:
    proof = await backend.admit(store_delta(backend))
    assert isinstance(proof, AdmissionProof)
    assert proof.effect > 0
    refused = await backend.admit(store_delta(backend, scale=0.0))
    assert isinstance(refused, ErrorInfo)
    assert refused.kind == "InvalidDelta"


async def test_stored_bytes_that_changed_are_never_served(backend: LocalBackend, tmp_path: Path) -> None:
    digest = store_delta(backend)
    (path,) = tmp_path.rglob(f"{digest}/tensors.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    (event,) = await collect(backend, call("ab", digest=digest))
    assert isinstance(event, FailureEvent)
    assert "do not match their digest" in event.error.message


async def test_release_frees_the_device_and_a_later_request_loads_again(backend: LocalBackend) -> None:
    digest = store_delta(backend)
    before = await collect(backend, call("ab", "a", digest))
    assert await backend.release(digest) > 0
    assert await collect(backend, call("ab", "b", digest)) == before
    assert before != await collect(backend, call("ab", "c"))


async def test_a_request_id_in_use_is_refused(backend: LocalBackend) -> None:
    stream = backend.generate(call("ab", "same", max_tokens=200))
    await anext(stream)
    (event,) = await collect(backend, call("ab", "same"))
    assert isinstance(event, FailureEvent)
    assert event.error.param == "request_id"
    await stream.aclose()


async def test_who_asks_and_its_standing_reach_the_engine(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Request] = []
    submit = backend.engine.submit

    def noting(request: Request) -> None:
        seen.append(request)
        submit(request)

    monkeypatch.setattr(backend.engine, "submit", noting)
    asked = replace(call("hello"), tenant="acme", weight=2.5, service_class=ServiceClass.BATCH)
    async for _ in backend.generate(asked):
        pass
    assert [(r.tenant, r.weight, r.service_class) for r in seen] == [("acme", 2.5, ServiceClass.BATCH)]
