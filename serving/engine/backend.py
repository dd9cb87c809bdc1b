"""The engine behind the `Backend` protocol, in this process: tokenises calls and hands events to asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from prometheus_client import CollectorRegistry

from adapters.canonical import digest_of, from_canonical
from adapters.errors import DeltamuxError, ErrorInfo, InvalidRequest, StoreError
from adapters.normal_form import Delta
from adapters.store import BlobStore
from adapters.tasks import Task
from serving.config import Engine as EngineSettings
from serving.core import (
    AdmissionProof,
    BackboneInfo,
    Event,
    FailureEvent,
    GenerateCall,
    MetricFamily,
    Request,
    TokenEvent,
)
from serving.engine.engine import Engine
from serving.engine.tokenise import Tokens, masks_of, targets_of, tokenise
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
            reads_apart=spec.kind == "encoder-decoder",
        )

    async def generate(self, call: GenerateCall) -> AsyncGenerator[tuple[Event, ...], None]:
        """See `Backend`."""
        try:
            request, tokens = await asyncio.to_thread(self._tokenise, call)
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
                yield batch if call.pooling is None else tuple(self._in_text(e, tokens) for e in batch)
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

    def _tokenise(self, call: GenerateCall) -> tuple[Request, Tokens]:
        """The request that `call` is, and its tokens' places in the text. Raises InvalidRequest."""
        spec = self.backbone.spec
        tokens = tokenise(call, self.backbone.tokenizer, vocab_size=spec.vocab_size, room=self.engine.max_len)
        request = Request(
            request_id=call.request_id,
            prompt_token_ids=tokens.ids,
            sampling=call.sampling,
            adapter_digest=call.adapter_digest,
            tenant=call.tenant,
            weight=call.weight,
            service_class=call.service_class,
            pooling=call.pooling,
            token_types=tokens.types if any(tokens.types) and self.backbone.takes_token_types else (),
            max_wait_s=call.max_wait_s,
        )
        if call.pooling is not None and call.pooling.task is Task.FILL_MASK:
            tokenizer = self.backbone.tokenizer
            masks, targets = masks_of(tokens, tokenizer), targets_of(call.pooling, tokenizer)
            request = replace(request, masks=masks, targets=targets)
        return request, tokens

    def _in_text(self, event: Event, tokens: Tokens) -> Event:
        """`event`, an answer with its tokens' places in the text that was asked about, and its choices as text."""
        if not isinstance(event, TokenEvent) or event.pooled is None:
            return event
        decode = getattr(self.backbone.tokenizer, "decode", lambda _: "")
        masks = tuple(
            tuple(replace(choice, text=decode([choice.token_id])) for choice in mask)
            for mask in event.pooled.masks
        )
        pooled = replace(
            event.pooled,
            masks=masks,
            offsets=tokens.offsets,
            words=tokens.words,
            sequences=tokens.sequences,
        )
        return replace(event, pooled=pooled)

    async def admit(self, digest: str) -> AdmissionProof | ErrorInfo:
        """See `Backend`."""
        try:
            delta = await asyncio.wrap_future(self.engine.deltas.host.request(digest))
            return await asyncio.wrap_future(self.engine.admit(delta, digest))
        except DeltamuxError as error:
            return error.info()

    async def activations(self, digest: str) -> bytes | ErrorInfo:
        """See `Backend`."""
        try:
            delta = await asyncio.wrap_future(self.engine.deltas.host.request(digest))
            return await asyncio.wrap_future(self.engine.find_activations(delta, digest))
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


def _is_terminal(event: Event) -> bool:
    return isinstance(event, TokenEvent) and event.finish_reason is not None
