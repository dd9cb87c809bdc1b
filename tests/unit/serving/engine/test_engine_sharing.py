"""Prefix cache and preemption on real tensors: what is reused or computed again gives the same answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from adapters.errors import StoreError
from adapters.normal_form import Affine, Delta, Site
from serving.core import Event, FinishReason, PromptEvent, ServiceClass, TokenEvent
from serving.engine import deltas as deltas_module
from serving.engine.prefix_cache import BLOCK_TOKENS
from serving.engine.runner import RowOutput
from serving.model.backbone import Backbone
from serving.model.placed_size import max_device_bytes
from serving.model.weight_block import whole_pages
from tests.unit.serving.engine.engine_support import BLOCK_BYTES, Bench, low_rank, prompt_tuning, tiny

PROMPT = [(5 * i + i * i) % 97 for i in range(3 * BLOCK_TOKENS + 7)]
CALLS = [(f"{d}-{n}", PROMPT[: n * BLOCK_TOKENS + 5], d) for n in (1, 2, 3) for d in (None, "lora", "prompt")]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny()


@pytest.fixture(scope="module")
def deltas(backbone: Backbone) -> dict[str, Delta]:
    return {
        "lora": low_rank(backbone, 1),
        "lora2": low_rank(backbone, 2),
        "prompt": prompt_tuning(backbone, 3),
    }


@contextmanager
def recorded_logits(bench: Bench) -> Iterator[dict[str, list[torch.Tensor]]]:
    """The logits that each request was sampled from."""
    seen: dict[str, list[torch.Tensor]] = {}
    run = bench.engine.runner.run

    def recording(rows: Any) -> list[RowOutput]:
        outputs = run(rows)
        for row, logits, _ in outputs:
            if row.samples:
                seen.setdefault(row.seq.request.request_id, []).append(logits[-1])
        return outputs

    bench.engine.runner.run = recording  # type: ignore[method-assign]
    yield seen


def cached_tokens(bench: Bench, name: str) -> int:
    (event,) = [e for n, e in bench.events if n == name and isinstance(e, PromptEvent)]
    return event.num_cached_tokens


def ask(bench: Bench, name: str, prompt: list[int], digest: str | None, **request: Any) -> list[int]:
    bench.submit(name, prompt, digest, **request)
    bench.run()
    return bench.tokens(name)


def test_answers_are_the_same_with_and_without_the_cache(
    backbone: Backbone, deltas: dict[str, Delta]
) -> None:
    benches = {mode: Bench(backbone, deltas, prefix_cache=mode) for mode in ("off", "tenant")}
    logits = {}
    for mode, bench in benches.items():
        with recorded_logits(bench) as logits[mode]:
            for name, prompt, digest in CALLS:
                ask(bench, name, prompt, digest)
                ask(bench, f"{name} again", prompt, digest)
    for name, prompt, _ in CALLS:
        for each in (name, f"{name} again"):
            assert benches["tenant"].tokens(each) == benches["off"].tokens(each)
            pairs = zip(logits["tenant"][each], logits["off"][each], strict=True)
            for cached, computed in pairs:
                assert (cached - computed).abs().max() <= 2e-5 * max(1.0, float(computed.abs().max()))
            assert cached_tokens(benches["off"], each) == 0
        assert (
            cached_tokens(benches["tenant"], f"{name} again")
            == (len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        )
    assert len({tuple(benches["off"].tokens(name)) for name, _, _ in CALLS}) > 6, "the deltas hardly matter"


def test_hits_and_saved_tokens_are_counted(backbone: Backbone, deltas: dict[str, Delta]) -> None:
    bench = Bench(backbone, deltas)
    for name in "abc":
        ask(bench, name, PROMPT, "lora")
    metrics = bench.engine.metrics
    assert metrics.prefix_hits._value.get() == 2
    assert metrics.prefix_tokens._value.get() == 2 * 3 * BLOCK_TOKENS


@pytest.mark.parametrize(("mode", "foreign"), [("tenant", 0), ("shared", 3 * BLOCK_TOKENS), ("off", 0)])
def test_tenants_share_only_where_the_operator_says_so(backbone: Backbone, mode: str, foreign: int) -> None:
    bench = Bench(backbone, {}, prefix_cache=mode)
    ask(bench, "mine", PROMPT, None, tenant="a")
    ask(bench, "other's", PROMPT, None, tenant="b")
    assert cached_tokens(bench, "other's") == foreign
    ask(bench, "mine again", PROMPT, None, tenant="a")
    assert cached_tokens(bench, "mine again") == (0 if mode == "off" else 3 * BLOCK_TOKENS)


def test_a_delta_never_reads_another_ones_prefix(backbone: Backbone, deltas: dict[str, Delta]) -> None:
    alone = Bench(backbone, deltas, prefix_cache="off")
    bench = Bench(backbone, deltas)
    for digest in (None, "lora", "lora2", "prompt"):
        assert ask(bench, str(digest), PROMPT, digest) == ask(alone, str(digest), PROMPT, digest)
        assert cached_tokens(bench, str(digest)) == 0


def test_a_second_turn_continues_the_slot_of_the_first(backbone: Backbone, deltas: dict[str, Delta]) -> None:
    bench, alone = Bench(backbone, deltas), Bench(backbone, deltas, prefix_cache="off")
    answer = ask(bench, "first", PROMPT, "prompt", max_tokens=20)
    turn = [*PROMPT, *answer, 4, 5, 6]
    assert ask(bench, "second", turn, "prompt") == ask(alone, "second", turn, "prompt")
    assert cached_tokens(bench, "second") == (len(PROMPT) + 19) // BLOCK_TOKENS * BLOCK_TOKENS


def test_siblings_compute_their_prompt_once(backbone: Backbone, deltas: dict[str, Delta]) -> None:
    alone = Bench(backbone, deltas, prefix_cache="off")
    bench = Bench(backbone, deltas, max_num_batched_tokens=24)
    computed = 0
    run = bench.engine.runner.run

    def counting(rows: Any) -> list[RowOutput]:
        nonlocal computed
        computed += sum(row.num_tokens for row in rows)
        return run(rows)

    bench.engine.runner.run = counting  # type: ignore[method-assign]
    sampling = {"temperature": 1.0, "max_tokens": 5}
    for seed in range(4):
        bench.submit(f"s{seed}", PROMPT, "prompt", seed=seed, **sampling)
        alone.submit(f"s{seed}", PROMPT, "prompt", seed=seed, **sampling)
    bench.run()
    alone.run()
    answers = [bench.tokens(f"s{seed}") for seed in range(4)]
    assert answers == [alone.tokens(f"s{seed}") for seed in range(4)]
    assert len({tuple(answer) for answer in answers}) == 4
    rest = len(PROMPT) - 3 * BLOCK_TOKENS
    assert computed == len(PROMPT) + 3 * rest + 4 * (5 - 1)


def events_of(bench: Bench, name: str) -> list[Event]:
    return [event for n, event in bench.events if n == name]


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.9, "seed": 11, "top_p": 0.9},
    "penalised": {"temperature": 0.8, "seed": 5, "presence_penalty": 1.5, "repetition_penalty": 1.3},
    "scored": {"logprobs": 2, "prompt_logprobs": 1},
}


@pytest.mark.parametrize("prefix_cache", ["tenant", "off"])
def test_a_preempted_request_says_what_it_would_have_said(
    backbone: Backbone, deltas: dict[str, Delta], prefix_cache: str
) -> None:
    calls = [
        (f"{kind} {digest}", PROMPT[: 20 + 3 * i], digest, sampling)
        for i, (kind, sampling) in enumerate(SAMPLINGS.items())
        for digest in (None, "lora", "prompt")
    ]
    roomy = Bench(backbone, deltas, prefix_cache="off")
    tight = Bench(
        backbone, deltas, prefix_cache=prefix_cache, memory_bytes=11 * BLOCK_BYTES, max_num_batched_tokens=40
    )
    for bench in (roomy, tight):
        for name, prompt, digest, sampling in calls:
            bench.submit(name, prompt, digest, max_tokens=40, **sampling)
        bench.run()
    assert tight.engine.scheduler.num_preemptions >= 2
    assert tight.engine.metrics.preemptions._value.get() == tight.engine.scheduler.num_preemptions
    for name, *_ in calls:
        assert tight.tokens(name) == roomy.tokens(name)
        ours, theirs = events_of(tight, name), events_of(roomy, name)
        assert len(ours) == len(theirs)
        assert [e.text for e in ours if isinstance(e, TokenEvent)] == [
            e.text for e in theirs if isinstance(e, TokenEvent)
        ]
        assert tight.terminal(name).finish_reason == FinishReason.LENGTH
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_scores(mine, other)
    tight.assert_nothing_held(*deltas)


def test_a_prompt_that_was_interrupted_is_scored_once(backbone: Backbone) -> None:
    calm = Bench(backbone, {})
    ask(calm, "scored", PROMPT, None, prompt_logprobs=1)
    bench = Bench(backbone, {}, max_num_seqs=1, max_num_batched_tokens=16)
    bench.submit("scored", PROMPT, None, service_class=ServiceClass.BATCH, prompt_logprobs=1)
    bench.engine.step()
    bench.engine.step()
    ask(bench, "urgent", [1, 2], None, service_class=ServiceClass.REALTIME)
    assert bench.engine.scheduler.num_preemptions == 1
    assert_same_scores(events_of(bench, "scored")[0], events_of(calm, "scored")[0])


def assert_same_scores(ours: Event, theirs: Event) -> None:
    assert isinstance(ours, PromptEvent | TokenEvent)
    assert type(ours) is type(theirs)
    mine, others = ours.logprobs or (), theirs.logprobs or ()  # type: ignore[union-attr]
    assert len(mine) == len(others)
    for one, other in zip(mine, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.chosen.token_id == other.chosen.token_id
            assert one.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-4)


def test_a_stop_string_is_found_across_a_preemption(backbone: Backbone) -> None:
    roomy = Bench(backbone, {})
    ask(roomy, "free", PROMPT[:20], None, max_tokens=40)
    text = "".join(e.text for e in events_of(roomy, "free") if isinstance(e, TokenEvent))
    tight = Bench(backbone, {}, memory_bytes=5 * BLOCK_BYTES)
    tight.submit("old", PROMPT[20:40], None, max_tokens=40)
    tight.submit("young", PROMPT[:20], None, max_tokens=40, stop=(text[34:37],))
    tight.run()
    assert tight.engine.scheduler.num_preemptions > 0
    said = "".join(e.text for e in events_of(tight, "young") if isinstance(e, TokenEvent))
    assert said == text[: text.find(text[34:37])]
    assert tight.terminal("young").finish_reason == FinishReason.STOP


def test_a_request_cancelled_while_preempted_ends_once_and_leaves_nothing(backbone: Backbone) -> None:
    bench = Bench(backbone, {}, memory_bytes=5 * BLOCK_BYTES)
    bench.submit("old", PROMPT[:20], None, max_tokens=40)
    bench.submit("young", PROMPT[20:40], None, max_tokens=40)
    bench.run(until=lambda: bench.engine.scheduler.num_preemptions > 0)
    bench.engine.cancel("young")
    bench.run()
    assert bench.terminal("young").finish_reason == FinishReason.CANCELLED
    assert len(bench.tokens("old")) == 40
    bench.assert_nothing_held()


def test_placing_a_delta_stalls_no_other_row(
    backbone: Backbone, deltas: dict[str, Delta], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), deltas_module.place
    threads: list[str] = []

    def slow(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        assert gate.wait(20)
        return real(*args)

    monkeypatch.setattr(deltas_module, "place", slow)
    bench = Bench(backbone, deltas)
    bench.submit("cold", [1, 2], "lora")
    bench.submit("warm", [1, 2])
    proof = bench.engine.admit(deltas["lora2"], "lora2")
    bench.run(until=lambda: len(bench.tokens("warm")) == 6)
    assert bench.tokens("cold") == []
    assert not proof.done()
    gate.set()
    bench.run(until=lambda: proof.done() and len(bench.tokens("cold")) == 6)
    assert proof.result().effect > 0.05
    assert len(threads) == 2
    assert all(name.startswith("delta-place") for name in threads)
    bench.engine.deltas.close()


@pytest.mark.parametrize("known", [True, False], ids=["ours", "unforeseen"])
def test_a_delta_that_can_not_be_placed_fails_its_requests_and_gives_its_room_back(
    backbone: Backbone, deltas: dict[str, Delta], monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    def broken(*_: Any) -> Any:
        raise StoreError("no such tensor") if known else RuntimeError("secret detail")

    monkeypatch.setattr(deltas_module, "place", broken)
    bench = Bench(backbone, deltas)
    for digest in ("lora", "prompt"):  # placed beside the steps, and between them
        bench.submit(digest, [1, 2], digest)
        bench.run()
        error = bench.terminal(digest).error
        assert error is not None
        assert error.kind == "StoreError"
        assert "secret" not in error.message
    proof = bench.engine.admit(deltas["lora2"], "lora2")
    bench.run(until=proof.done)
    assert isinstance(proof.exception(), StoreError)
    assert bench.engine.budget.used_by("deltas") == 0


def test_unloading_waits_for_a_delta_that_is_being_placed(
    backbone: Backbone, deltas: dict[str, Delta], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), deltas_module.place

    def slow(*args: Any) -> Any:
        assert gate.wait(20)
        return real(*args)

    monkeypatch.setattr(deltas_module, "place", slow)
    bench = Bench(backbone, deltas)
    bench.submit("cold", [1, 2], "lora")
    bench.run(until=lambda: bench.engine.budget.used_by("deltas") > 0)
    freed = bench.engine.release("lora")
    bench.engine.step()
    assert not freed.done()
    gate.set()
    bench.run(until=lambda: freed.done() and not bench.engine._live)
    assert freed.result() == whole_pages(deltas["lora"].size_bytes)
    assert bench.terminal("cold").finish_reason == FinishReason.ERROR
    assert bench.engine.budget.used_by("deltas") == 0


def test_both_policies_give_the_same_answers(backbone: Backbone, deltas: dict[str, Delta]) -> None:
    answers: dict[str, list[list[int]]] = {}
    for scheduling in ("fair", "first_come"):
        bench = Bench(backbone, deltas, scheduling=scheduling, max_num_seqs=2)
        for index, (name, prompt, digest) in enumerate(CALLS):
            bench.submit(name, prompt, digest, tenant="abc"[index % 3])
        bench.run()
        answers[scheduling] = [bench.tokens(name) for name, _, _ in CALLS]
    assert answers["fair"] == answers["first_come"]


def small_deltas(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> tuple[Bench, list[int]]:
    """Two deltas in host memory, of which a step may place one at once, and the threads that placed them."""
    deltas, real, threads = {str(i): low_rank(backbone, i) for i in range(2)}, deltas_module.place, []

    def seen(*args: Any) -> Any:
        threads.append(threading.get_ident())
        return real(*args)

    monkeypatch.setattr(deltas_module, "place", seen)
    spec = backbone.spec
    share = 1.5 * max_device_bytes(deltas["0"], backbone)
    share /= sum(m.shape.d_in * m.shape.d_out for m in spec.modules) * backbone.dtype.itemsize
    monkeypatch.setattr(deltas_module, "AT_ONCE_SHARE", share)
    bench = Bench(backbone, deltas)
    for digest in deltas:
        bench.engine.deltas.host.request(digest).result()
    return bench, threads


def test_a_small_delta_in_host_memory_delays_its_first_token_by_no_step(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, threads = small_deltas(backbone, monkeypatch)
    bench.submit("cold", [1, 2], "0")
    assert bench.engine.step()
    assert len(bench.tokens("cold")) == 1
    assert threads == [threading.get_ident()]


def test_more_small_deltas_than_a_step_may_place_come_from_another_thread(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, threads = small_deltas(backbone, monkeypatch)
    for digest in ("0", "1"):
        bench.submit(f"cold {digest}", [1, 2], digest)
    bench.run()
    assert threads[0] == threading.get_ident()
    assert len(threads) == 2
    assert threads[1] != threading.get_ident()
    assert bench.tokens("cold 1")


def test_a_small_delta_that_is_folded_with_base_weights_is_placed_beside_the_steps(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, threads = small_deltas(backbone, monkeypatch)
    plain = low_rank(backbone, 3)
    magnitude = Affine(
        site=Site("v.out", 0), scale=torch.full((16,), 2.0), covers_bias=False, weight_normalized=True
    )
    dora = Delta(method="DORA", ops=(*plain.ops, magnitude), backbone_digest=backbone.spec.digest)
    bench.engine.deltas.host._load = {"dora": dora}.__getitem__
    bench.engine.deltas.host.request("dora").result()
    bench.submit("cold", [1, 2], "dora")
    bench.run()
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
    assert bench.tokens("cold")
