"""An engine without thread, HTTP and Ray, whose deltas come from a dictionary and whose events are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters.normal_form import Delta, LowRank, Site, VirtualTokens
from adapters.tasks import Task
from serving.config import Engine as EngineSettings
from serving.core import (
    Event,
    FinishReason,
    Pooled,
    PoolingParams,
    Request,
    SamplingParams,
    ServiceClass,
    TokenEvent,
)
from serving.engine.engine import Engine
from serving.engine.prefix_cache import BLOCK_TOKENS
from serving.metrics import EngineMetrics
from serving.model.backbone import Backbone, adopt_backbone
from tests.cases import tiny_backbone

BLOCK_BYTES = 3 * 2 * 2 * 8 * 4 * BLOCK_TOKENS
"""Keys and values of one block: layers, both, heads, width, fp32."""


def tiny() -> Backbone:
    """A tiny Llama with a tokenizer of one character a token."""
    vocabulary = {chr(33 + i): i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return adopt_backbone(tiny_backbone("llama"), name="tiny", tokenizer=fast, device="cpu", dtype="float32")


def low_rank(backbone: Backbone, seed: int, scale: float = 0.5) -> Delta:
    draw = torch.Generator().manual_seed(seed)
    ops = tuple(
        LowRank(
            read=Site("attn.x", layer),
            write=Site("v.out", layer),
            A=scale * torch.randn(4, 32, generator=draw),
            B=torch.randn(16, 4, generator=draw),
        )
        for layer in range(3)
    )
    return Delta(method="LORA", ops=ops, backbone_digest=backbone.spec.digest)


def prompt_tuning(backbone: Backbone, seed: int) -> Delta:
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))
    return Delta(
        method="PROMPT_TUNING",
        ops=(VirtualTokens(embeddings=rows),),
        position_offset=5,
        backbone_digest=backbone.spec.digest,
    )


class Bench:
    """An engine whose deltas come from a dictionary and whose events are kept."""

    def __init__(
        self, backbone: Backbone, deltas: dict[str, Delta] | Callable[[str], Delta], **settings: Any
    ) -> None:
        self.events: list[tuple[str, Event]] = []
        load = deltas if callable(deltas) else deltas.__getitem__
        self.engine = Engine(
            backbone,
            load,
            self.events.extend,
            metrics=EngineMetrics(CollectorRegistry()),
            settings=EngineSettings(**settings),
        )

    def submit(
        self,
        name: str,
        prompt: Sequence[int],
        digest: str | None = None,
        *,
        tenant: str = "t",
        service_class: ServiceClass = ServiceClass.STANDARD,
        **sampling: Any,
    ) -> None:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **sampling})
        request = Request(
            request_id=name,
            prompt_token_ids=tuple(prompt),
            sampling=params,
            adapter_digest=digest,
            tenant=tenant,
            service_class=service_class,
        )
        self.engine.submit(request)

    def pool(
        self, name: str, prompt: Sequence[int], task: Task, digest: str | None = None, **pooling: Any
    ) -> None:
        """Ask for a task head's answer."""
        params = PoolingParams(task=task, **pooling)
        request = Request(
            request_id=name, prompt_token_ids=tuple(prompt), adapter_digest=digest, tenant="t", pooling=params
        )
        self.engine.submit(request)

    def pooled(self, name: str) -> Pooled:
        """That answer."""
        end = self.terminal(name)
        assert end.pooled is not None, end.error
        assert end.finish_reason is FinishReason.STOP
        return end.pooled

    def run(self, until: Callable[[], bool] | None = None) -> None:
        deadline = time.monotonic() + 20
        done = until or (lambda: not self.engine._live and self.engine._inbox.empty())
        while not done():
            assert time.monotonic() < deadline, "the engine made no progress"
            if not self.engine.step():
                time.sleep(0.001)

    def tokens(self, name: str) -> list[int]:
        return [t for n, e in self.events if n == name and isinstance(e, TokenEvent) for t in e.token_ids]

    def terminal(self, name: str) -> TokenEvent:
        ends = [e for n, e in self.events if n == name and isinstance(e, TokenEvent) and e.finish_reason]
        assert len(ends) == 1, f"{name}: {len(ends)} terminal events"
        assert [e for n, e in self.events if n == name][-1] is ends[0]
        return ends[0]

    def assert_nothing_held(self, *digests: str) -> None:
        assert self.engine.scheduler.kv.usage == 0.0
        assert [self.engine.deltas.residency.leases(d) for d in digests] == [0] * len(digests)
