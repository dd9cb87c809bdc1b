"""The engine behind the `Backend` protocol, in this process: tokenises calls and hands events to asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Seq

from jinja2 import TemplateError
from prometheus_client import CollectorRegistry
from transformers import PreTrainedTokenizerBase

from adapters.canonical import digest_of, from_canonical
from adapters.errors import DeltamuxError, ErrorInfo, InvalidRequest, StoreError
from adapters.normal_form import Delta
from adapters.store import BlobStore
from serving.config import Engine as EngineSettings
from serving.core import (
    AdmissionProof,
    BackboneInfo,
    ChatMessage,
    Event,
    FailureEvent,
    GenerateCall,
    MetricFamily,
    Request,
    TokenEvent,
)
from serving.engine.engine import Engine
from serving.metrics import EngineMetrics, families
from serving.model.backbone import Backbone


def load_from(store: BlobStore, digest: str) -> Delta:
    """Read a delta from the store and check that its bytes are what the digest says.

    Raises StoreError, InvalidDelta.
    """
    blob = store.read(digest)
    if digest_of(blob.manifest, blob.tensors) != digest:
        raise StoreError(
            f"The stored bytes of {digest[:12]} do not match their digest.", remedy="Upload it again."
        )
    return from_canonical(blob.manifest, blob.tensors)


class LocalBackend:
    """`Backend` over an engine of this process. Use from one event loop, between `start` and `stop`.

    `flush_s`: after a call's first tokens, tokens are handed on at most once in that many seconds, because every
    message to another process costs more than a token.
    """

    def __init__(
        self, backbone: Backbone, store: BlobStore, settings: EngineSettings, *, flush_s: float = 0.0
    ) -> None:
        self.registry = CollectorRegistry()
        self.store = store
        self.backbone = backbone
        self.engine = Engine(
            backbone,
            lambda digest: load_from(store, digest),
            self._publish,
            metrics=EngineMetrics(self.registry),
            settings=settings,
        )
        self._flush_s = flush_s
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._created = int(time.time())

    def start(self) -> None:
        """Start the engine thread; events arrive on the running loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def stop(self) -> None:
        """End the engine; open calls end as cancelled."""
        self.engine.stop()

    def _publish(self, events: Seq[tuple[str, Event]]) -> None:
        # on the engine thread: one wake-up of the event loop per step, whatever the number of rows
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: Seq[tuple[str, Event]]) -> None:
        for request_id, event in events:
            if (waiting := self._queues.get(request_id)) is not None:
                waiting.put_nowait(event)

    async def describe(self) -> BackboneInfo:
        """See `Backend`."""
        spec, tokenizer = self.backbone.spec, self.backbone.tokenizer
        return BackboneInfo(
            name=spec.name,
            digest=spec.digest,
            spec_json=spec.to_json(),
            max_model_len=self.engine.max_len,
            vocab_size=spec.vocab_size,
            has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
            created=self._created,
        )

    async def generate(self, call: GenerateCall) -> AsyncGenerator[tuple[Event, ...], None]:
        """See `Backend`."""
        try:
            request = await asyncio.to_thread(self._tokenise, call)
            if request.request_id in self._queues:
                raise InvalidRequest("request_id is in use.", param="request_id", remedy="Send a unique one.")
            events: asyncio.Queue[Event] = asyncio.Queue()
            self._queues[request.request_id] = events
            try:
                self.engine.submit(request)
            except DeltamuxError:
                del self._queues[request.request_id]
                raise
        except DeltamuxError as error:
            yield (FailureEvent(error=error.info()),)
            return
        first, ended = True, False
        try:
            while not ended:
                batch = await self._next_batch(events, wait_s=0.0 if first else self._flush_s)
                ended = _is_terminal(batch[-1])
                refusal = batch[0].error if isinstance(batch[0], TokenEvent) else None
                if first and refusal is not None:  # it ended before it began
                    batch = (FailureEvent(error=refusal),)
                first = False
                yield batch
        finally:
            del self._queues[request.request_id]
            if not ended:
                self.engine.cancel(request.request_id)

    @staticmethod
    async def _next_batch(events: asyncio.Queue[Event], wait_s: float) -> tuple[Event, ...]:
        batch = [await events.get()]
        if wait_s and not _is_terminal(batch[0]):
            await asyncio.sleep(wait_s)
        while not events.empty():
            batch.append(events.get_nowait())
        return tuple(batch)

    def _tokenise(self, call: GenerateCall) -> Request:
        """Prompt to token ids. Raises InvalidRequest for what the tokenizer or the vocabulary can't take."""
        tokenizer, vocab_size = self.backbone.tokenizer, self.backbone.spec.vocab_size
        prompt = call.prompt
        if isinstance(prompt, str):
            ids = tuple(_need(tokenizer)(prompt)["input_ids"])
        elif all(isinstance(token, int) for token in prompt):
            ids = tuple(token for token in prompt if isinstance(token, int))
        else:
            if not getattr(tokenizer, "chat_template", None):
                raise InvalidRequest(
                    "This backbone has no chat template.", param="messages", remedy="Use /v1/completions."
                )
            turns = [{"role": m.role, "content": m.content} for m in prompt if isinstance(m, ChatMessage)]
            try:
                text = _need(tokenizer).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:  # templates refuse roles and orders that they do not know
                raise InvalidRequest(
                    f"The chat template refuses these messages: {error}", param="messages"
                ) from None
            ids = tuple(_need(tokenizer)(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise InvalidRequest("The prompt is empty.", param="prompt", remedy="Send at least one token.")
        for field, tokens in (("prompt", ids), ("logit_bias", call.sampling.logit_bias)):
            if outside := [token for token in tokens if not 0 <= token < vocab_size]:
                raise InvalidRequest(
                    f"{field}: token id {outside[0]} is outside the vocabulary of {vocab_size}.", param=field
                )
        return Request(
            request_id=call.request_id,
            prompt_token_ids=ids,
            sampling=call.sampling,
            adapter_digest=call.adapter_digest,
            tenant=call.tenant,
            weight=call.weight,
            service_class=call.service_class,
            max_wait_s=call.max_wait_s,
        )

    async def admit(self, digest: str) -> AdmissionProof | ErrorInfo:
        """See `Backend`."""
        try:
            delta = await asyncio.wrap_future(self.engine.deltas.host.request(digest))
            return await asyncio.wrap_future(self.engine.admit(delta, digest))
        except DeltamuxError as error:
            return error.info()

    async def release(self, digest: str) -> int:
        """See `Backend`."""
        return await asyncio.wrap_future(self.engine.release(digest))

    async def scrape(self) -> list[tuple[Mapping[str, str], tuple[MetricFamily, ...]]]:
        """See `Backend`."""
        return [({}, families(self.registry))]

    async def heartbeat_age_s(self) -> float:
        """See `Backend`."""
        return self.engine.heartbeat_age_s


def _need(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InvalidRequest("This backbone has no tokenizer.", param="prompt", remedy="Send token ids.")
    return tokenizer


def _is_terminal(event: Event) -> bool:
    return isinstance(event, TokenEvent) and event.finish_reason is not None
