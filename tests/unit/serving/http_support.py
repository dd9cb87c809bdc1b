"""A gateway over a scripted backend, a real registry and a real store, and clients for it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI
from prometheus_client import CollectorRegistry

from adapters.backbone_spec import BackboneSpec, ModuleShape
from adapters.canonical import to_canonical
from adapters.errors import ErrorInfo
from adapters.normal_form import Delta, LowRank, Site
from adapters.registry import Registry
from adapters.site_maps import build_spec
from adapters.store import LocalBlobStore
from serving.config import Auth, Backbone, Database, Limits, Server, Settings
from serving.core import (
    AdmissionProof,
    Alternative,
    BackboneInfo,
    Event,
    FinishReason,
    GenerateCall,
    MetricFamily,
    PromptEvent,
    TokenEvent,
    TokenLogprobs,
)
from serving.http.app import create_app
from serving.metrics import GatewayMetrics
from serving.tenancy.ledger import Tokens
from serving.tenancy.principal import Limits as TenantLimits
from serving.tenancy.principal import Scope
from serving.tenancy.tenancy import Tenancy

BACKBONE = "tiny"
WIDTH = 8
PROMPT_IDS = (1, 2, 3)
WORDS = ("Hello", ",", " world")
OUTPUT_IDS = (10, 11, 12)
PROOF = AdmissionProof(effect=1.5, reference_scale=3.0, load_s=0.01, host_bytes=100, device_bytes=200)

Batches = Sequence[tuple[Event, ...] | Exception]


def spec() -> BackboneSpec:
    """A one-layer Llama as uploads are checked against; no model exists."""

    def shape_of(path: str) -> ModuleShape:
        last = path.rpartition(".")[2]
        kind = "norm" if "norm" in last else "embedding" if "embed" in last else "linear"
        if last.isdigit():
            kind = "layer"
        return ModuleShape(kind, WIDTH, WIDTH, has_bias=False)

    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "hidden_size": WIDTH,
        "vocab_size": 32,
        "max_position_embeddings": 64,
    }
    return build_spec(config, shape_of, name=BACKBONE, digest="b" * 64, names=(BACKBONE,))


SPEC = spec()


def alternatives(word: str, token_id: int) -> TokenLogprobs:
    """A token with one more likely rival."""
    chosen = Alternative(token_id, -0.5, word)
    return TokenLogprobs(chosen, (Alternative(9, -0.25, "<rival>"), chosen))


def tokens(call: GenerateCall, *, finish: FinishReason | None = FinishReason.STOP) -> list[tuple[Event, ...]]:
    """The default script: the prompt, then three words one by one, the last of them with the finish reason."""
    wanted = call.sampling.logprobs is not None
    prompt = PromptEvent(
        prompt_token_ids=PROMPT_IDS,
        logprobs=(None, alternatives("b", 2), alternatives("c", 3))
        if call.sampling.prompt_logprobs is not None
        else None,
    )
    words = [
        TokenEvent(
            token_ids=(token,),
            text=word,
            logprobs=(alternatives(word, token),) if wanted else (),
            finish_reason=finish if token == OUTPUT_IDS[-1] else None,
        )
        for word, token in zip(WORDS, OUTPUT_IDS, strict=True)
    ]
    return [(prompt, words[0]), (words[1],), (words[2],)]


@dataclass
class FakeBackend:
    """A backend with known tokens. `script` gives a call's batches, or the exceptions in their place."""

    spec: BackboneSpec = SPEC
    script: Callable[[GenerateCall], Batches] = tokens
    admission: Callable[[str], AdmissionProof | ErrorInfo] = lambda digest: PROOF
    activated: Callable[[str], bytes | ErrorInfo] = bytes.fromhex
    has_chat_template: bool = True
    hold: asyncio.Event | None = None  # where given, every call waits for it after its first batch
    admit_gate: asyncio.Event | None = None
    heartbeat_s: float = 0.1
    scraped: list[tuple[Mapping[str, str], tuple[MetricFamily, ...]]] = field(default_factory=list)
    failure: Exception | None = None  # raised by scrape, release and heartbeat_age_s
    calls: list[GenerateCall] = field(default_factory=list)
    open_calls: set[str] = field(default_factory=set)
    admitted: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)

    async def describe(self) -> BackboneInfo:
        return BackboneInfo(
            name=BACKBONE,
            digest=self.spec.digest,
            spec_json=self.spec.to_json(),
            max_model_len=64,
            vocab_size=32,
            has_chat_template=self.has_chat_template,
            created=1,
        )

    async def generate(self, call: GenerateCall) -> AsyncIterator[tuple[Event, ...]]:
        self.calls.append(call)
        self.open_calls.add(call.request_id)
        try:
            for index, batch in enumerate(self.script(call)):
                if isinstance(batch, Exception):
                    raise batch
                if index and self.hold:
                    await self.hold.wait()
                yield batch
        finally:
            self.open_calls.discard(call.request_id)

    async def admit(self, digest: str) -> AdmissionProof | ErrorInfo:
        self.admitted.append(digest)
        if self.admit_gate:
            await self.admit_gate.wait()
        return self.admission(digest)

    async def activations(self, digest: str) -> bytes | ErrorInfo:
        return self.activated(digest)

    async def release(self, digest: str) -> int:
        self._fail()
        self.released.append(digest)
        return 200

    async def scrape(self) -> list[tuple[Mapping[str, str], tuple[MetricFamily, ...]]]:
        self._fail()
        return self.scraped

    async def heartbeat_age_s(self) -> float:
        self._fail()
        return self.heartbeat_s

    def _fail(self) -> None:
        if self.failure:
            raise self.failure


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Pauses:
    """Makes the SDK's pauses instant and notes them; `clock` moves by them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: Clock | None = None) -> None:
        self.lengths: list[float] = []

        async def sleep(seconds: float) -> None:
            self.lengths.append(seconds)
            if clock is not None:
                clock.now += seconds

        monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)


@dataclass
class Gateway:
    """A running application and what it stands on."""

    app: FastAPI
    backend: FakeBackend
    registry: Registry
    store: LocalBlobStore
    tenancy: Tenancy
    metrics: GatewayMetrics
    openai: AsyncOpenAI
    http: httpx.AsyncClient

    def sample(self, name: str, **labels: str) -> float:
        """The value of one sample of the gateway's metrics."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def key(self, tenant: str = "default", *scopes: Scope, adapters: Sequence[str] = ()) -> str:
        """A new key of a tenant, which is made where it is missing; with every scope but admin by default."""
        if tenant not in {item.name for item in self.tenancy.tenants.list()}:
            self.tenancy.tenants.create(tenant, TenantLimits(), actor="test")
        wanted = scopes or (Scope.INFER, Scope.UPLOAD, Scope.MANAGE)
        return self.tenancy.keys.create(tenant, wanted, adapters=adapters, actor="test")[1].text

    def limited(self, **limits: Any) -> str:
        """A key, in use from now on, of the tenant `acme`, whose limits these are from now on."""
        key = self.key("acme")
        self.tenancy.tenants.set_limits("acme", TenantLimits(**limits), actor="test")
        self.use(key)
        return key

    def use(self, key: str) -> None:
        """Have both clients show this key from now on."""
        self.openai.api_key = key
        self.http.headers["authorization"] = f"Bearer {key}"

    async def push(self, name: str = "delta", *, seed: int = 0, **fields: str) -> httpx.Response:
        """Upload a LoRA as a canonical pair."""
        return await self.http.put(f"/v1/adapters/{name}/versions", files=pair(seed), data=fields)


@asynccontextmanager
async def gateway(
    tmp_path: Path,
    backend: FakeBackend | None = None,
    *,
    registry_type: type[Registry] = Registry,
    store_type: type[LocalBlobStore] = LocalBlobStore,
    clock: Callable[[], float] = time.time,
    url: str | None = None,
    server: Server | None = None,
    **limits: Any,
) -> AsyncIterator[Gateway]:
    """A gateway in this process, reached without sockets. `url`: of its database, if not a file in `tmp_path`."""
    backend = backend or FakeBackend()
    settings = Settings(
        server=server or Server(),
        backbone=Backbone(path=BACKBONE),
        limits=Limits(**limits),
        database=Database(url=url or f"sqlite:///{tmp_path}/registry.db"),
        auth=Auth(secret_file=tmp_path / "secret"),
    )
    metrics = GatewayMetrics(CollectorRegistry())
    store = store_type(tmp_path / "blobs")

    def count(outcome: str, tokens: Tokens) -> None:
        metrics.count_usage(outcome, asdict(tokens))

    with (
        registry_type(settings.database.url) as registry,
        Tenancy(settings, clock=clock, on_closed=count) as tenancy,
    ):
        app = create_app(
            backend=backend,
            registry=registry,
            store=store,
            tenancy=tenancy,
            settings=settings,
            metrics=metrics,
        )
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            sdk = AsyncOpenAI(api_key="none", base_url="http://gateway/v1", http_client=client, max_retries=0)
            yield Gateway(app, backend, registry, store, tenancy, metrics, sdk, client)
        # what requests still give back would lose its connection
        giving = [task for task in asyncio.all_tasks() if "Buckets.give" in str(task.get_coro())]
        await asyncio.gather(*giving)


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[tuple[str, int]]:
    """`app` on a real socket of this machine; the address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[:2]
    finally:
        server.should_exit = True
        await task


async def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`; the test's own timeout bounds it."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def lora(seed: int = 0, *, backbone_digest: str = SPEC.digest) -> Delta:
    """A rank-2 LoRA on q_proj."""
    random = torch.Generator().manual_seed(seed)
    op = LowRank(
        read=Site("attn.x", 0),
        write=Site("q.out", 0),
        A=torch.randn(2, WIDTH, generator=random),
        B=torch.randn(WIDTH, 2, generator=random),
    )
    return Delta(method="LORA", ops=(op,), backbone_digest=backbone_digest)


def digest(seed: int = 0) -> str:
    """The content digest of `lora(seed)`."""
    return to_canonical(lora(seed)).digest


def pair(seed: int = 0, **changes: str) -> list[tuple[str, tuple[str, bytes]]]:
    """`lora(seed)` as the parts of an upload."""
    canonical = to_canonical(lora(seed, **changes))
    files = {"manifest.json": canonical.manifest, "tensors.safetensors": canonical.tensors}
    return [("file", (name, data)) for name, data in files.items()]


def sse_events(text: str) -> list[Any]:
    """The payloads of a stream of server-sent events; `[DONE]` stays text."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
