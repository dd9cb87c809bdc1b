"""The engine as a library: terminal events, leases, cancellation, eviction, faults. No thread, no HTTP, no Ray."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from adapters.errors import ContextLengthExceeded, InvalidDelta, NotFound, Overloaded
from adapters.normal_form import (
    Affine,
    AttnPrefix,
    Delta,
    Head,
    LinearMap,
    LowRank,
    Op,
    Rows,
    Site,
    WeightDelta,
)
from serving.core import FinishReason, PromptEvent, TokenEvent
from serving.engine.effect import PROBE_TOKENS
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.placed_size import max_device_bytes
from serving.model.placement import place
from serving.model.weight_block import whole_pages
from tests.cases import tiny_backbone
from tests.unit.serving.engine.engine_support import BLOCK_BYTES, Bench, low_rank, prompt_tuning, tiny

EOS = 2


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny()


def one_by_one(
    backbone: Backbone, deltas: dict[str, Delta], calls: Sequence[tuple[str, list[int], str | None]]
) -> dict[str, list[int]]:
    bench = Bench(backbone, deltas)
    for name, prompt, digest in calls:
        bench.submit(name, prompt, digest)
        bench.run()
    return {name: bench.tokens(name) for name, _, _ in calls}


def test_alone_equals_together_through_churn_and_eviction(backbone: Backbone) -> None:
    deltas = {f"d{i}": low_rank(backbone, i) for i in range(6)} | {"p": prompt_tuning(backbone, 9)}
    names = [None, *deltas]
    calls = [(str(i), [(7 * i + j) % 97 for j in range(3 + i % 9)], names[i % len(names)]) for i in range(30)]
    expected = one_by_one(backbone, deltas, calls)
    room = 4 * BLOCK_BYTES  # two short requests, or all deltas
    bench = Bench(backbone, deltas, max_num_seqs=5, max_num_batched_tokens=12, memory_bytes=room)
    for name, prompt, digest in calls:
        bench.submit(name, prompt, digest)
    bench.run()
    assert {name: bench.tokens(name) for name, _, _ in calls} == expected
    assert bench.engine.deltas.residency.num_evictions > 0
    assert bench.engine.budget.used_bytes <= room
    bench.assert_nothing_held(*deltas)
    assert len({tuple(expected[str(i)]) for i in range(8)}) > 4, "the deltas hardly change the output"


def test_prompt_event_comes_first_and_events_end_once(backbone: Backbone) -> None:
    bench = Bench(backbone, {})
    bench.submit("a", [1, 2, 3], prompt_logprobs=1)
    bench.run()
    first = bench.events[0][1]
    assert isinstance(first, PromptEvent)
    assert first.prompt_token_ids == (1, 2, 3)
    assert first.logprobs is not None
    assert first.logprobs[0] is None
    assert [entry.chosen.token_id for entry in first.logprobs[1:] if entry] == [2, 3]
    assert bench.terminal("a").finish_reason == FinishReason.LENGTH


def test_end_of_sequence_token_stops_unless_ignored(backbone: Backbone) -> None:
    bench = Bench(backbone, {})
    bench.submit("stop", [5, 6], logit_bias={EOS: 100.0}, ignore_eos=False)
    bench.submit("on", [5, 6], logit_bias={EOS: 100.0}, ignore_eos=True, max_tokens=3)
    bench.run()
    assert (bench.tokens("stop"), bench.terminal("stop").finish_reason) == ([EOS], FinishReason.STOP)
    assert (bench.tokens("on"), bench.terminal("on").finish_reason) == ([EOS] * 3, FinishReason.LENGTH)


def test_stop_string_ends_with_the_text_before_it(backbone: Backbone) -> None:
    bench = Bench(backbone, {})
    bench.submit("free", [5, 6, 7], max_tokens=8)
    bench.run()
    text = "".join(e.text for n, e in bench.events if isinstance(e, TokenEvent))
    bench.submit("cut", [5, 6, 7], max_tokens=8, stop=(text[3:5],))
    bench.run()
    assert (
        "".join(e.text for n, e in bench.events if n == "cut" and isinstance(e, TokenEvent))
        == text[: text.find(text[3:5])]
    )
    assert bench.terminal("cut").finish_reason == FinishReason.STOP


def test_cancel_frees_slot_and_lease_within_one_step(backbone: Backbone) -> None:
    bench = Bench(backbone, {"d": low_rank(backbone, 1)})
    bench.submit("long", [1, 2], "d", max_tokens=200)
    bench.submit("waiting", [1], "never-there")
    bench.run(until=lambda: len(bench.tokens("long")) >= 3)
    bench.engine.cancel("long")
    bench.engine.step()
    assert bench.terminal("long").finish_reason == FinishReason.CANCELLED
    bench.assert_nothing_held("d")


def test_unknown_delta_fails_its_request_and_never_answers_as_the_base(backbone: Backbone) -> None:
    def load(digest: str) -> Delta:
        raise NotFound(f"no {digest}")

    bench = Bench(backbone, load)
    bench.submit("lost", [1, 2], "gone")
    bench.submit("base", [1, 2])
    bench.run()
    end = bench.terminal("lost")
    assert end.finish_reason == FinishReason.ERROR
    assert end.error is not None
    assert end.error.kind == "NotFound"
    assert bench.tokens("lost") == []
    assert len(bench.tokens("base")) == 6


def test_cold_delta_delays_no_other_row(backbone: Backbone) -> None:
    gate = threading.Event()

    def load(_: str) -> Delta:
        assert gate.wait(20)
        return low_rank(backbone, 1)

    bench = Bench(backbone, load)
    bench.submit("cold", [1, 2], "d")
    bench.submit("warm", [1, 2])
    bench.run(until=lambda: len(bench.tokens("warm")) == 6)
    assert bench.tokens("cold") == []
    gate.set()
    bench.run()
    assert len(bench.tokens("cold")) == 6


def test_delta_of_another_backbone_is_refused(backbone: Backbone) -> None:
    other = adopt_backbone(tiny_backbone("llama", seed=5), name="other", device="cpu", dtype="float32")
    bench = Bench(backbone, {"d": low_rank(other, 1)})
    bench.submit("a", [1], "d")
    bench.run()
    error = bench.terminal("a").error
    assert error is not None
    assert "bound to backbone" in error.message


def result_of(future: Future[Any], bench: Bench) -> Any:
    bench.run(until=future.done)
    return future.result()


def test_admission_measures_the_effect_and_refuses_a_delta_without_one(backbone: Backbone) -> None:
    bench = Bench(backbone, {})
    proof = result_of(bench.engine.admit(low_rank(backbone, 1), "d"), bench)
    assert proof.effect > 0.05
    assert proof.device_bytes == whole_pages(low_rank(backbone, 1).size_bytes)
    with pytest.raises(InvalidDelta, match="no effect"):
        result_of(bench.engine.admit(low_rank(backbone, 1, scale=0.0), "zero"), bench)
    assert "zero" not in bench.engine.deltas.residency
    bad = Delta(
        method="IA3",
        ops=(Affine(site=Site("v.out", 0), scale=torch.full((16,), 3e38)),),
        backbone_digest=backbone.spec.digest,
    )
    with pytest.raises(InvalidDelta, match="non-finite"):
        result_of(bench.engine.admit(bad, "inf"), bench)
    assert "inf" not in bench.engine.deltas.residency
    bench.assert_nothing_held("d")


@pytest.mark.parametrize(
    "op",
    [
        Affine(site=Site("v.out", 0), scale=torch.ones(16), shift=torch.zeros(16)),
        LinearMap(site=Site("q.out", 0), blocks=torch.eye(4).repeat(1, 8, 1, 1)),
        LowRank(read=Site("o.out", 1), write=Site("o.out", 1), A=torch.randn(4, 32), B=torch.zeros(32, 4)),
    ],
    ids=["scale and shift", "map", "bottleneck"],
)
def test_the_bare_row_of_the_probe_has_the_same_bits_as_one_with_an_idle_delta(
    backbone: Backbone, op: Op
) -> None:
    bench = Bench(backbone, {})
    idle = Delta(method="LORA", ops=(op,), backbone_digest=backbone.spec.digest)
    with pytest.raises(InvalidDelta, match="no effect"):
        result_of(bench.engine.admit(idle, "idle"), bench)


def test_an_admission_costs_the_other_rows_one_forward_of_the_probe(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = type(backbone).forward

    def counted(self: Backbone, tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(len(tokens))
        return forward(self, tokens, *args)

    monkeypatch.setattr(type(backbone), "forward", counted)
    bench = Bench(backbone, {})
    for seed in (1, 2, 3):
        assert result_of(bench.engine.admit(low_rank(backbone, seed), f"d{seed}"), bench).effect > 0.05
    assert seen == [PROBE_TOKENS] * 4


def test_the_probe_uses_the_tokens_that_a_delta_replaces(backbone: Backbone) -> None:
    bench = Bench(backbone, {})
    for token in range(0, 97, 8):  # a fixed probe has at most sixteen of them
        op = Rows(site=Site("embed"), ids=torch.tensor([token], dtype=torch.int32), rows=torch.ones(1, 32))
        delta = Delta(method="TRAINABLE_TOKENS", ops=(op,), backbone_digest=backbone.spec.digest)
        assert result_of(bench.engine.admit(delta, f"token {token}"), bench).effect > 0.05


@pytest.mark.parametrize(
    "op",
    [
        WeightDelta(
            site=Site("q.out", 0),
            layout="sparse",
            values=torch.ones(9),
            indices=torch.arange(18).view(2, 9).int(),
        ),
        WeightDelta(site=Site("q.out", 0), layout="circulant", values=torch.randn(16, 16, 2)),
        WeightDelta(
            site=Site("q.out", 0),
            layout="kron",
            values=torch.randn(8, 8),
            left=torch.randn(4, 4),
            scaling=2.0,
        ),
        LinearMap(site=Site("q.out", 0), reflections=torch.eye(32)[:7] * -1),
        LinearMap(
            site=Site("q.out", 0),
            blocks=torch.randn(2, 1, 2, 2),
            order=torch.arange(64).view(2, 32).int() % 32,
        ),
        Rows(site=Site("embed"), ids=torch.tensor([3], dtype=torch.int32), rows=torch.ones(1, 32)),
        Head(site=Site("logits"), weight=torch.randn(97, 32), bias=torch.randn(97)),
        AttnPrefix(
            layer=1,
            key=torch.randn(9, 32),
            value=torch.randn(9, 32),
            merge="separate",
            gate=torch.ones(1),
            projected=False,
        ),
    ],
    ids=lambda op: f"{op.kind.value} {getattr(op, 'layout', '')}",
)
def test_room_is_made_for_all_that_an_op_takes(backbone: Backbone, op: Op) -> None:
    delta = Delta(method="test", ops=(op,), backbone_digest=backbone.spec.digest)
    assert 0 < place(delta, "d", backbone).device_bytes <= max_device_bytes(delta, backbone)


def test_release_drains_then_frees_and_says_how_much(backbone: Backbone) -> None:
    bench = Bench(backbone, {"d": low_rank(backbone, 1)})
    bench.submit("running", [1, 2], "d", max_tokens=20)
    bench.run(until=lambda: len(bench.tokens("running")) >= 2)
    freed = bench.engine.release("d")
    bench.engine.step()
    assert not freed.done()
    bench.submit("late", [1, 2], "d")
    bench.run()
    assert len(bench.tokens("running")) == 20
    assert bench.terminal("late").finish_reason == FinishReason.ERROR
    assert freed.result(0) == whole_pages(low_rank(backbone, 1).size_bytes)
    assert bench.engine.deltas.residency.used_bytes == 0


def test_step_that_raises_ends_its_requests_and_the_engine_goes_on(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(backbone, {"d": low_rank(backbone, 1)})
    bench.submit("a", [1, 2], "d")
    healthy = bench.engine.runner.run

    def broken(rows: object) -> object:
        raise RuntimeError("kernel fault")

    monkeypatch.setattr(bench.engine.runner, "run", broken)
    bench.run()
    assert bench.terminal("a").finish_reason == FinishReason.ERROR
    bench.assert_nothing_held("d")
    monkeypatch.setattr(bench.engine.runner, "run", healthy)
    bench.submit("b", [1, 2], "d")
    bench.run()
    assert len(bench.tokens("b")) == 6


def test_non_finite_logits_are_an_error_not_an_answer(backbone: Backbone) -> None:
    poison = Delta(
        method="PREFIX_TUNING",
        ops=tuple(
            AttnPrefix(layer=i, key=torch.zeros(20, 2, 8), value=torch.full((20, 2, 8), torch.nan))
            for i in range(3)
        ),
        backbone_digest=backbone.spec.digest,
    )
    bench = Bench(backbone, {"bad": poison})
    bench.submit("bad", [1, 2], "bad")
    bench.submit("good", [1, 2])
    bench.run()
    assert bench.terminal("bad").finish_reason == FinishReason.ERROR
    assert bench.tokens("bad") == []
    assert bench.tokens("good") == one_by_one(backbone, {}, [("x", [1, 2], None)])["x"]
    # A short row now decodes in the slot that held NaN, beside a row long enough to read past the NaN's place.
    bench.submit("next", [1, 2], max_tokens=6)
    bench.submit("beside", range(25), max_tokens=6)
    bench.run()
    assert bench.tokens("next") == bench.tokens("good")
    assert len(bench.tokens("beside")) == 6


def test_queue_and_context_limits(backbone: Backbone) -> None:
    bench = Bench(backbone, {}, max_queue=1, max_num_seqs=1, max_model_len=32)
    with pytest.raises(ContextLengthExceeded):
        bench.submit("long", range(30), max_tokens=3)
    bench.submit("open", range(30), max_tokens=None)
    bench.submit("queued", [1])
    bench.submit("refused", [1])
    bench.run()
    assert len(bench.tokens("open")) == 2
    error = bench.terminal("refused").error
    assert error is not None
    assert error.kind == Overloaded.__name__


def test_thread_serves_and_stopping_cancels_what_runs(backbone: Backbone) -> None:
    bench = Bench(backbone, {})
    bench.engine.start()
    bench.submit("a", [1, 2], max_tokens=200)
    deadline = time.monotonic() + 20
    while len(bench.tokens("a")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert bench.engine.heartbeat_age_s < 5
    bench.engine.stop()
    assert bench.terminal("a").finish_reason == FinishReason.CANCELLED
