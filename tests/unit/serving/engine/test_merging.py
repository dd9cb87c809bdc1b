"""When merged weights are used, and that their memory is counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from adapters.normal_form import Delta, LowRank, Site
from serving.core import TokenEvent
from serving.engine.merging import HotMerge
from serving.memory.budget import MemoryBudget
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.merge import merged_bytes
from serving.model.placement import place
from serving.model.programs import MergedModule, PlacedDelta
from tests.cases import tiny_backbone
from tests.unit.serving.engine.engine_support import Bench, low_rank, tiny

AFTER = 3


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return adopt_backbone(tiny_backbone("llama"), name="tiny", device="cpu", dtype="float32")


def placed(backbone: Backbone, digest: str) -> PlacedDelta:
    width = backbone.spec.hidden_size
    op = LowRank(
        read=Site("attn.x", 0),
        write=Site("q.out", 0),
        A=torch.randn(4, width),
        B=torch.randn(width, 4),
        scaling=0.5,
    )
    return place(Delta(method="LORA", ops=(op,), backbone_digest=backbone.spec.digest), digest, backbone)


@pytest.fixture
def budget() -> MemoryBudget:
    return MemoryBudget(10**9)


@pytest.fixture
def merging(backbone: Backbone, budget: MemoryBudget) -> Iterator[HotMerge]:
    policy = HotMerge(backbone, budget, after_steps=AFTER, forget=lambda: None)
    yield policy
    policy.close()


def merged(merging: HotMerge, delta: PlacedDelta) -> None:
    for _ in range(AFTER):
        assert not merging.weights_for(delta)
    assert merging._merged is not None
    merging._merged.weights.exception(timeout=30)


def test_merges_only_after_enough_steps_of_one_delta(backbone: Backbone, merging: HotMerge) -> None:
    one, two = placed(backbone, "1"), placed(backbone, "2")
    for sole in (one, one, two, one, None, one, one, placed(backbone, "1")):
        assert not merging.weights_for(sole)
        assert merging._merged is None
    merged(merging, one)
    assert merging.weights_for(one).keys() == one.modules.keys()
    assert not merging.weights_for(placed(backbone, "1"))  # placed anew: not the one that was merged


def test_other_batches_run_the_base_and_the_merge_is_dropped_in_time(
    backbone: Backbone, merging: HotMerge, budget: MemoryBudget
) -> None:
    one = placed(backbone, "1")
    merged(merging, one)
    assert budget.used_bytes == merged_bytes(one, backbone) > 0
    assert not merging.weights_for(None)
    assert merging.weights_for(one)
    for _ in range(AFTER):
        assert not merging.weights_for(None)
    assert budget.used_bytes == 0
    assert not merging.weights_for(one)


def test_no_room_no_merge(backbone: Backbone) -> None:
    budget = MemoryBudget(10)
    merging = HotMerge(backbone, budget, after_steps=1, forget=lambda: None)
    for _ in range(3):
        assert not merging.weights_for(placed(backbone, "1"))
    assert (merging._merged, budget.used_bytes) == (None, 0)


def test_whoever_needs_memory_gets_it_from_the_merge_first(
    backbone: Backbone, merging: HotMerge, budget: MemoryBudget
) -> None:
    one = placed(backbone, "1")
    merged(merging, one)
    budget.register("other")
    assert budget.reserve("other", budget.capacity_bytes)
    assert not merging.weights_for(one)
    assert budget.used_by("merged") == 0


def test_an_evicted_delta_takes_its_merge_along(
    backbone: Backbone, merging: HotMerge, budget: MemoryBudget
) -> None:
    one = placed(backbone, "1")
    merged(merging, one)
    merging.evict("2")
    assert merging.weights_for(one)
    merging.evict("1")
    assert (merging._merged, merging._sole, budget.used_bytes) == (None, None, 0)


def test_bytes_of_a_merge_that_runs_are_given_back_when_it_ends(
    backbone: Backbone, merging: HotMerge, budget: MemoryBudget
) -> None:
    one = placed(backbone, "1")
    merged(merging, one)
    assert merging._merged is not None
    merging._merged.abandoned = True  # as `drop` leaves it while the thread runs
    assert not merging.weights_for(one)
    assert (merging._merged, budget.used_bytes) == (None, 0)


def test_the_engine_answers_the_same_merged_and_the_base_is_bit_for_bit_its_own() -> None:
    backbone = tiny()
    deltas = {"d": low_rank(backbone, 1), "e": low_rank(backbone, 2)}
    plain = Bench(backbone, deltas, merge_after_steps=0)
    merging = Bench(backbone, deltas, merge_after_steps=2)
    calls = [
        ("bare", None),
        ("first", "d"),
        ("second", "d"),
        ("bare again", None),
        ("other", "e"),
        ("third", "d"),
    ]
    merged_steps = 0
    for name, digest in calls:
        for bench in (plain, merging):
            bench.submit(name, [5, 17, 3, 88], digest, max_tokens=40, logprobs=1)
        plain.run()
        while merging.engine._live or not merging.engine._inbox.empty():
            merging.engine.step()
            if (going := merging.engine.merging._merged) is not None:
                going.weights.exception(timeout=30)  # in a server the steps go on meanwhile
            merged_steps += any(isinstance(p, MergedModule) for p in merging.engine.runner._programs)
    assert merged_steps > 60
    assert {n: plain.tokens(n) for n, _ in calls} == {n: merging.tokens(n) for n, _ in calls}
    assert plain.tokens("bare") != plain.tokens("first") != plain.tokens("other")
    assert logprobs(merging, "bare") == logprobs(merging, "bare again")  # to the last bit
    assert logprobs(merging, "second") == pytest.approx(logprobs(plain, "second"), abs=1e-5)
    assert logprobs(merging, "second") != logprobs(plain, "second"), "nothing was merged"


def logprobs(bench: Bench, name: str) -> list[float]:
    events = [e for n, e in bench.events if n == name and isinstance(e, TokenEvent)]
    return [item.chosen.logprob for event in events for item in event.logprobs]
