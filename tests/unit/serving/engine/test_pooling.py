"""Pooling requests in the engine: refusals, faults, prefixes, preemption, and the admission proof of task heads."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.errors import InvalidDelta
from adapters.normal_form import SCORES, Delta, Head
from adapters.tasks import HeadSpec, Task
from serving.core import AdmissionProof, Pooled, PromptEvent
from serving.model.backbone import Backbone
from tests.cases import tiny_backbone
from tests.unit.serving.engine.engine_support import Bench, low_rank, prompt_tuning, tiny

CLASSIFY, EMBED = Task.SEQUENCE_CLASSIFICATION, Task.EMBEDDING
PROMPT = [3 + i % 90 for i in range(60)]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny()


def classifier(body: Delta, *, scale: float = 1.0, **head: Any) -> Delta:
    """`body` with a head of three labels over it."""
    weight = scale * torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
    spec = {"pooling": "last", "labels": ("a", "b", "c"), "problem_type": "single_label", **head}
    return replace(
        body, ops=(*body.ops, Head(site=SCORES, weight=weight)), task=CLASSIFY.value, head=HeadSpec(**spec)
    )


def head_only(backbone: Backbone, **changes: Any) -> Delta:
    return classifier(Delta(method="HEAD", ops=(), backbone_digest=backbone.spec.digest), **changes)


def numbers(pooled: Pooled) -> Tensor:
    return torch.tensor(pooled.numbers())


def same(one: Pooled, other: Pooled) -> bool:
    return torch.allclose(numbers(one), numbers(other), rtol=0, atol=2e-5)


def test_every_pooling_is_the_same_in_one_step_and_in_many(backbone: Backbone) -> None:
    for pooling in ("cls", "last", "last_not_pad", "mean"):
        deltas = {"d": classifier(low_rank(backbone, 1), pooling=pooling)}
        whole, pieces = Bench(backbone, deltas), Bench(backbone, deltas, max_num_batched_tokens=7)
        for bench in (whole, pieces):
            bench.pool("a", PROMPT, CLASSIFY, "d")
            bench.run()
        assert same(whole.pooled("a"), pieces.pooled("a")), pooling
        tail = Bench(backbone, deltas)
        tail.pool("a", PROMPT[:-1], CLASSIFY, "d")
        tail.run()
        assert same(whole.pooled("a"), tail.pooled("a")) == (pooling == "cls")


@pytest.mark.parametrize("pooling", ["cls", "last", "last_not_pad", "mean"])
def test_a_head_reads_what_its_pooling_says(backbone: Backbone, pooling: str) -> None:
    delta = head_only(backbone, pooling=pooling, pad_token_id=7 if pooling == "last_not_pad" else None)
    bench = Bench(backbone, {"d": delta}, max_num_batched_tokens=16)
    prompt = [*PROMPT, 7, 7]
    bench.pool("a", prompt, CLASSIFY, "d")
    bench.run()
    with torch.no_grad():
        hidden = tiny_backbone("llama").base_model(torch.tensor([prompt])).last_hidden_state[0]
    read = {"cls": hidden[0], "last": hidden[-1], "last_not_pad": hidden[-3], "mean": hidden.mean(dim=0)}
    expected = delta.head_stages[0].weight @ read[pooling]
    assert (numbers(bench.pooled("a")) - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))


def test_a_generated_prompt_is_a_known_prefix_and_the_other_way_round(backbone: Backbone) -> None:
    deltas = {"d": classifier(low_rank(backbone, 1)), "m": classifier(low_rank(backbone, 1), pooling="mean")}
    bench = Bench(backbone, deltas)
    for name, digest in (("a", "d"), ("b", "d"), ("c", "m"), ("e", "m")):
        bench.pool(name, PROMPT, CLASSIFY, digest)
        bench.run()
    cached = [e.num_cached_tokens for _, e in bench.events if isinstance(e, PromptEvent)]
    assert cached[0] == cached[2] == cached[3] == 0  # a mean needs every token's hidden state
    assert cached[1] > 0
    assert same(bench.pooled("a"), bench.pooled("b"))
    assert same(bench.pooled("c"), bench.pooled("e"))
    bench.pool("f", PROMPT, EMBED)
    bench.run()
    bench.submit("g", PROMPT)
    bench.run()
    assert bench.events[-1][0] == "g"
    assert next(e for n, e in bench.events if n == "g" and isinstance(e, PromptEvent)).num_cached_tokens > 0
    alone = Bench(backbone, {})
    alone.submit("g", PROMPT)
    alone.run()
    assert alone.tokens("g") == bench.tokens("g")


def test_a_preempted_request_starts_its_mean_anew(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = {"m": classifier(low_rank(backbone, 1), pooling="mean")}
    calm = Bench(backbone, deltas)
    calm.pool("a", PROMPT, CLASSIFY, "m")
    calm.run()
    bench = Bench(backbone, deltas, max_num_batched_tokens=16)
    bench.pool("a", PROMPT, CLASSIFY, "m")
    bench.run(lambda: any(seq.num_computed > 20 for seq in bench.engine.scheduler.running))
    scheduler = bench.engine.scheduler
    grow = scheduler.kv.grow
    no_room = iter([False])
    monkeypatch.setattr(scheduler.kv, "grow", lambda *room: next(no_room, None) is None and grow(*room))
    bench.run()
    assert scheduler.num_preemptions == 1
    assert same(calm.pooled("a"), bench.pooled("a"))
    bench.assert_nothing_held("m")


def test_numbers_that_are_not_finite_end_the_request_and_nobody_elses(backbone: Backbone) -> None:
    deltas = {"d": classifier(low_rank(backbone, 1)), "bad": classifier(low_rank(backbone, 1), scale=1e38)}
    bench = Bench(backbone, deltas)
    bench.pool("a", PROMPT, CLASSIFY, "d")
    bench.pool("b", PROMPT, CLASSIFY, "bad")
    bench.run()
    assert bench.pooled("a")
    failed = bench.terminal("b")
    assert failed.error is not None
    assert failed.pooled is None
    bench.assert_nothing_held("d", "bad")


def test_a_task_that_the_delta_does_not_have_is_refused(backbone: Backbone) -> None:
    bench = Bench(backbone, {"d": classifier(low_rank(backbone, 1)), "l": low_rank(backbone, 1)})
    bench.submit("generate", PROMPT, "d")
    bench.pool("embed", PROMPT, EMBED, "d")
    bench.pool("classify", PROMPT, CLASSIFY, "l")
    bench.pool("bare", PROMPT, CLASSIFY)
    bench.pool("labels", PROMPT, CLASSIFY, "d", num_labels=1)
    bench.pool("through a language model's delta", PROMPT, EMBED, "l")
    bench.run()
    for name in ("generate", "embed", "classify", "bare", "labels"):
        error = bench.terminal(name).error
        assert error is not None
        assert (error.kind, error.param) == ("InvalidRequest", "model")
    assert bench.pooled("through a language model's delta")
    bench.assert_nothing_held("d", "l")


def test_a_cancelled_request_leaves_nothing(backbone: Backbone) -> None:
    bench = Bench(backbone, {"d": classifier(prompt_tuning(backbone, 2))}, max_num_batched_tokens=8)
    bench.pool("a", PROMPT, CLASSIFY, "d")
    bench.run(lambda: bool(bench.engine.scheduler.running))
    bench.engine.cancel("a")
    bench.run()
    assert bench.terminal("a").pooled is None
    bench.assert_nothing_held("d")


def admitted(backbone: Backbone, delta: Delta) -> AdmissionProof:
    bench = Bench(backbone, {"x": delta})
    proof: Future[AdmissionProof] = bench.engine.admit(delta, "x")
    bench.run(proof.done)
    return proof.result()


def test_the_effect_of_a_task_head_is_in_its_scores(backbone: Backbone) -> None:
    assert admitted(backbone, classifier(low_rank(backbone, 1))).effect > 0
    assert admitted(backbone, classifier(prompt_tuning(backbone, 1))).effect > 0
    assert admitted(backbone, head_only(backbone)).effect > 0


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda b: classifier(low_rank(b, 1, scale=0.0)), "scores equal the bare backbone's"),
        (lambda b: classifier(low_rank(b, 1), scale=0.0), "scores equal the bare backbone's"),
        (lambda b: head_only(b, scale=0.0), "scores them all alike"),
        (lambda b: head_only(b, scale=1e38), "non-finite scores"),
    ],
)
def test_a_task_head_without_effect_is_refused(backbone: Backbone, make: Any, named: str) -> None:
    with pytest.raises(InvalidDelta, match=named):
        admitted(backbone, make(backbone))
