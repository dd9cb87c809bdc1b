"""The engine: one thread that repeats schedule -> run -> sample -> emit.

Other threads talk to it through an inbox that is emptied between steps; it talks back through `publish`, once a step
with everything that happened. It runs without Ray, without HTTP and, for benchmarks and tests, without its thread.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future

import torch
from tokenizers import Tokenizer

from adapters.errors import DeltamuxError, ErrorInfo, InvalidRequest
from adapters.normal_form import Delta
from serving.config import Engine as EngineSettings
from serving.core import (
    AdmissionProof,
    Event,
    FinishReason,
    Pooled,
    Request,
    TokenEvent,
)
from serving.engine.answers import Answers, RowState
from serving.engine.beam import Beams, Candidate, search
from serving.engine.deltas import DeltaManager
from serving.engine.fair_queue import FairQueue
from serving.engine.kv_manager import SlotKVManager
from serving.engine.merging import CONSUMER as MERGED
from serving.engine.merging import HotMerge
from serving.engine.pooling import advance
from serving.engine.prefix_cache import PrefixKeys
from serving.engine.rules import GenerationRules
from serving.engine.runner import RowOutput, Runner
from serving.engine.sampler import Sampled, sample
from serving.engine.scheduler import Scheduler, SchedulerLimits
from serving.engine.sequence import Sequence, max_total_len, refuse_unanswerable, require_readable
from serving.engine.waiting import FirstComeQueue, WaitingQueue
from serving.memory.budget import AUTO_SHARE, MemoryBudget, auto_capacity
from serving.memory.host_cache import HostCache
from serving.metrics import EngineMetrics
from serving.model.backbone import Backbone

log = logging.getLogger(__name__)

Publish = Callable[[Seq[tuple[str, Event]]], None]

INTERNAL_ERROR = ErrorInfo("DeltamuxError", "The engine failed on this request.", None, "Send it again.")


class Engine:
    """Many requests, many deltas, one backbone. All methods but `step` are thread-safe."""

    def __init__(
        self,
        backbone: Backbone,
        load_delta: Callable[[str], Delta],
        publish: Publish,
        *,
        metrics: EngineMetrics,
        settings: EngineSettings,
    ) -> None:
        self.backbone = backbone
        self.max_len = min(settings.max_model_len or backbone.spec.max_positions, backbone.spec.max_positions)
        self.metrics = metrics
        self._publish = publish
        self._events: list[tuple[str, Event]] = []
        tokenizer: Tokenizer | None = getattr(backbone.tokenizer, "backend_tokenizer", None)
        self.budget = MemoryBudget(settings.memory_bytes or _auto_memory(backbone.device))
        self.runner = Runner(backbone, num_slots=settings.max_num_seqs, max_len=self.max_len)
        self.runner.merging = self.merging = HotMerge(
            backbone, self.budget, after_steps=settings.merge_after_steps, forget=self.runner.forget_programs
        )
        self.rules: GenerationRules | None = None
        if backbone.spec.kind == "encoder-decoder":
            self.rules = GenerationRules(backbone.model, backbone.eos_token_ids)
        self._answers = Answers(tokenizer, backbone.eos_token_ids, self.rules)
        self._wake = threading.Event()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        host = HostCache(load_delta, settings.host_cache_bytes)
        self.deltas = DeltaManager(self.runner, host, budget=self.budget, metrics=metrics, post=self._post)
        self.scheduler = self._make_scheduler(settings)
        self._live: dict[str, Sequence] = {}
        self._releases: list[tuple[str, Future[int]]] = []
        self._counted_preemptions = 0
        self._stopping = False
        self._last_turn = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def _make_scheduler(self, settings: EngineSettings) -> Scheduler:
        cache, kind = self.runner.cache, self.backbone.spec.kind
        kv = SlotKVManager(
            cache.num_slots, cache.max_len, entry_bytes=cache.entry_bytes, budget=self.budget, storage=cache
        )
        policy: WaitingQueue = FirstComeQueue()
        if settings.scheduling == "fair":
            policy = FairQueue(
                max_wait_s=settings.max_wait_s,
                max_lead=settings.max_lead_tokens,
                num_kept=int(settings.headroom * settings.max_num_seqs),
                is_resident=lambda seq: (
                    seq.request.adapter_digest is None or self.deltas.is_resident(seq.request.adapter_digest)
                ),
            )
        limits = SchedulerLimits(
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_queue=settings.max_queue,
            max_wait_s=settings.max_wait_s,
            max_queue_s=settings.max_queue_s,
            whole_rows=kind != "decoder",
            max_read=self.max_len,
        )
        keys = PrefixKeys(self.backbone.spec.digest, settings.prefix_cache if kind == "decoder" else "off")
        pad = getattr(self.backbone.model.config, "pad_token_id", None)
        return Scheduler(kv, self.deltas, policy, keys, limits=limits, clock=time.monotonic, pad_token_id=pad)

    # -- the step loop ------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run one batch. False when there was nothing to run."""
        self.deltas.start_step()
        self._serve_inbox()
        rows, failed = self.scheduler.schedule()
        for seq, error in failed:
            self._end(seq, FinishReason.ERROR, error=error.info())
        if rows:
            started = time.perf_counter()
            try:
                outputs = self.runner.run(rows)
                sampled = self._sample(outputs)
                answers, found = advance(outputs), search(outputs)
            except Exception:  # whatever a kernel raises ends the requests of this batch, never the engine
                log.exception("a step of %d rows failed", len(rows))
                for seq, _ in rows:
                    self._fail(seq)
            else:
                self._advance(outputs, sampled)
                for seq, answer in answers.items():
                    self._answer(seq, answer)
                for seq, candidates in found.items():
                    self._branch(seq, candidates)
                self.metrics.step_seconds.observe(time.perf_counter() - started)
        self._finish_releases()
        self._flush()
        return bool(rows)

    def _sample(self, outputs: Seq[RowOutput]) -> dict[Sequence, Sampled]:
        ready = [(row.seq, logits) for row, logits, _ in outputs if row.samples and not row.seq.together]
        if not ready:
            return {}
        last_RV = torch.cat([logits[-1:] for _, logits in ready])
        drawn = sample(last_RV, [seq.state.sampler for seq, _ in ready])
        return {seq: token for (seq, _), token in zip(ready, drawn, strict=True)}

    def _advance(self, outputs: Seq[RowOutput], sampled: dict[Sequence, Sampled]) -> None:
        for (seq, count), logits, _ in outputs:
            self._answers.note_prompt(seq, count, logits)
            seq.num_computed += count
            if seq in sampled:
                self._append(seq, sampled[seq])

    def _append(self, seq: Sequence, drawn: Sampled) -> None:
        """Take one new token: announce the prompt first, then emit text, then end the request where it ends."""
        if drawn.token_id < 0:
            self._fail(seq)
            return
        self._announce(seq)
        seq.tokens.append(drawn.token_id)
        self.metrics.generated_tokens.inc()
        event = self._answers.token(seq, drawn)
        if event.finish_reason is None:
            self._events.append((seq.request.request_id, event))
        else:
            self._end(seq, event.finish_reason, event=event)

    def _branch(self, seq: Sequence, candidates: list[Candidate] | None) -> None:
        """Take one step of a search: its rows go on as the best beams, or it ends with the best hypotheses."""
        beams: Beams = seq.state.beams
        if candidates is None:
            self._fail(seq)
            return
        seq.answered = True
        self._announce(seq)
        for copy in beams.advance(candidates):
            self.scheduler.kv.copy(*copy)
        width = len(seq.rows)
        self.metrics.generated_tokens.inc(width)
        if not beams.done:
            self._events.append((seq.request.request_id, TokenEvent(num_searched=width)))
            return
        event = self._answers.found(seq, beams.finished[: beams.params.num_returned], width)
        assert event.finish_reason is not None
        self._end(seq, event.finish_reason, event=event)

    def _answer(self, seq: Sequence, answer: Pooled | InvalidRequest | None) -> None:
        """End a request that its delta's head has answered."""
        if answer is None:
            self._fail(seq)
            return
        seq.answered = True
        if isinstance(answer, InvalidRequest):
            self._end(seq, FinishReason.ERROR, error=answer.info())
            return
        self._announce(seq)
        self._end(seq, FinishReason.STOP, event=TokenEvent(pooled=answer, finish_reason=FinishReason.STOP))

    def _announce(self, seq: Sequence) -> None:
        state: RowState = seq.state
        if state.announced:
            return
        state.announced = True
        self._events.append((seq.request.request_id, self._answers.prompt(seq)))
        self.metrics.prompt_tokens.inc(len(seq.request.prompt_token_ids))
        if seq.num_cached:
            self.metrics.prefix_hits.inc()
            self.metrics.prefix_tokens.inc(seq.num_cached)

    def _end(
        self,
        seq: Sequence,
        reason: FinishReason,
        *,
        event: TokenEvent | None = None,
        error: ErrorInfo | None = None,
        failed: bool = False,
    ) -> None:
        """The one place where a request ends: one terminal event, slot and lease freed."""
        if self._live.pop(seq.request.request_id, None) is None:
            return
        self.scheduler.finish(seq, failed=failed)
        self.metrics.requests_finished.labels(reason=reason.value).inc()
        self._events.append((seq.request.request_id, event or TokenEvent(finish_reason=reason, error=error)))

    def _fail(self, seq: Sequence) -> None:
        """End a request whose numbers went wrong. Its slot is wiped: NaN would leak through the next owner's mask."""
        self._end(seq, FinishReason.ERROR, error=INTERNAL_ERROR, failed=True)

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._publish(events)
        self.metrics.requests_running.set(sum(seq.leads for seq in self.scheduler.running))
        self.metrics.requests_waiting.set(len(self.scheduler.queue))
        self.metrics.merged_bytes.set(self.budget.used_by(MERGED))
        self.metrics.kv_usage.set(self.scheduler.kv.usage)
        self.metrics.preemptions.inc(self.scheduler.num_preemptions - self._counted_preemptions)
        self._counted_preemptions = self.scheduler.num_preemptions

    # -- what other threads ask for -----------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request; its events arrive through `publish`. Raises ContextLengthExceeded, InvalidRequest."""
        if not 0 < request.weight < math.inf:
            raise InvalidRequest(f"weight: got {request.weight}, expected a share above 0.", param="weight")
        refuse_unanswerable(request, self.backbone.spec)
        if self.rules is None:
            max_total_len(len(request.prompt_token_ids), request.max_tokens, self.max_len)
        else:
            require_readable(len(request.prompt_token_ids), self.max_len)
            max_total_len(len(self.rules.start_tokens), request.max_tokens, self.max_len, begins=True)
        self._refuse_too_wide(request)
        self._post(lambda: self._enqueue(request))

    def _refuse_too_wide(self, request: Request) -> None:
        beams, limits = request.sampling.beams, self.scheduler.limits
        room = min(self.runner.cache.num_slots, limits.max_num_batched_tokens)
        if beams is not None and beams.width > room:
            raise InvalidRequest(
                f"num_beams: got {beams.width}, the server has room for {room}.",
                param="num_beams",
                remedy="Ask for fewer beams.",
            )

    def cancel(self, request_id: str) -> None:
        """End a request within one step. Unknown and ended ones are left alone."""
        self._post(lambda: self._cancel(request_id))

    def admit(self, delta: Delta, digest: str) -> Future[AdmissionProof]:
        """Place a delta beside the steps and measure its effect between two of them."""
        proof: Future[AdmissionProof] = Future()
        self._post(lambda: self.deltas.admit(delta, digest, proof))
        return proof

    def find_activations(self, delta: Delta, digest: str) -> Future[bytes]:
        """Find which neurons a delta activates on the probe tokens, between two steps."""
        found: Future[bytes] = Future()
        self._post(lambda: self.deltas.find_activations(delta, digest, found))
        return found

    def release(self, digest: str) -> Future[int]:
        """Drain a delta's requests, free it; the future holds the device bytes freed."""
        future: Future[int] = Future()

        def begin() -> None:
            self.deltas.start_release(digest)
            self._releases.append((digest, future))

        self._post(begin)
        return future

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the loop last turned."""
        return time.monotonic() - self._last_turn

    def start(self) -> None:
        """Run the loop on a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """End the loop; live requests end as cancelled."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self.deltas.close()
        self.merging.close()

    def _loop(self) -> None:
        while not self._stopping:
            self._last_turn = time.monotonic()
            self._wake.clear()
            if not self.step():
                self._wake.wait(timeout=1.0)
        for seq in list(self._live.values()):
            self._end(seq, FinishReason.CANCELLED)
        self._flush()

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.put(command)
        self._wake.set()

    def _serve_inbox(self) -> None:
        while not self._inbox.empty():
            self._inbox.get()()

    def _enqueue(self, request: Request) -> None:
        seq = self._answers.begin(request)
        self._live[request.request_id] = seq
        try:
            self.scheduler.add(seq)
        except DeltamuxError as error:
            self._end(seq, FinishReason.ERROR, error=error.info())

    def _cancel(self, request_id: str) -> None:
        seq = self._live.get(request_id)
        if seq is None:
            return
        self._end(seq, FinishReason.CANCELLED)
        digest = seq.request.adapter_digest
        if digest is not None and not self.scheduler.is_awaited(digest):
            self.deltas.abandon(digest)

    def _finish_releases(self) -> None:
        for item in list(self._releases):
            digest, future = item
            freed = self.deltas.finish_release(digest)
            if freed is not None:
                self._releases.remove(item)
                future.set_result(freed)


def _auto_memory(device: torch.device) -> int:
    """A share of the memory of the device that the backbone runs on."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1] * AUTO_SHARE)
    return auto_capacity()
