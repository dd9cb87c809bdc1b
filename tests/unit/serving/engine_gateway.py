"""A gateway over a real engine with a tiny backbone, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.canonical import to_canonical
from adapters.store import BlobStore, LocalBlobStore
from serving.config import Engine as EngineSettings
from serving.engine.backend import LocalBackend
from serving.model.backbone import Backbone, adopt_backbone
from tests.integration.world import byte_tokenizer, redraw
from tests.unit.serving.engine.engine_support import low_rank
from tests.unit.serving.http_support import BACKBONE, Gateway, gateway

Files = list[tuple[str, tuple[str, bytes]]]


def make_backbone(context: int = 256) -> Backbone:
    """A random Llama that serves text and chat, of the shape that `low_rank` deltas are for."""
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=context,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    redraw(model, 0.2)
    return adopt_backbone(model.eval(), name=BACKBONE, tokenizer=tokenizer, device="cpu", dtype="float32")


def upload_of(backbone: Backbone, seed: int) -> Files:
    """A low-rank delta on the values of every layer, as the parts of a multipart body."""
    pair = to_canonical(low_rank(backbone, seed))
    files = {"manifest.json": pair.manifest, "tensors.safetensors": pair.tensors}
    return [("file", (name, data)) for name, data in files.items()]


@asynccontextmanager
async def engine_gateway(
    home: Path,
    backbone: Backbone,
    *,
    make_store: Callable[[Path], BlobStore] = LocalBlobStore,
    engine: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Gateway]:
    """A gateway below `home` whose backend is an engine; `options` are those of `gateway`."""
    store = make_store(home / "blobs")
    backend = LocalBackend(backbone, store, EngineSettings(max_num_seqs=8, **engine or {}))
    backend.start()
    try:
        async with gateway(home, backend, store_type=lambda _: store, **options) as made:  # type: ignore[arg-type]
            yield made
    finally:
        backend.stop()


async def complete(
    g: Gateway, model: str, prompt: str | Sequence[int] = "and now?", **fields: Any
) -> httpx.Response:
    """A greedy completion with its token ids."""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return await g.http.post("/v1/completions", json=body | {"return_token_ids": True} | fields)


def token_ids(reply: httpx.Response) -> list[int]:
    """What a completion generated."""
    assert reply.status_code == 200, reply.text
    found: list[int] = reply.json()["choices"][0]["token_ids"]
    return found
