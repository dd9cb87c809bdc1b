"""When merged weights are used, and that their memory is counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from adapters.normal_form import Delta, LowRank, Site
from serving.engine.merging import HotMerge
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.merge import merged_bytes
from serving.model.placement import place
from serving.model.programs import PlacedDelta
from tests.cases import tiny_backbone

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


class Budget:
    """Room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def reserve(self, size: int) -> bool:
        if size > self.room:
            return False
        self.room -= size
        return True

    def free(self, size: int) -> None:
        self.room += size


@pytest.fixture
def budget() -> Budget:
    return Budget(10**9)


@pytest.fixture
def merging(backbone: Backbone, budget: Budget) -> Iterator[HotMerge]:
    policy = HotMerge(backbone, after_steps=AFTER, reserve=budget.reserve, free=budget.free)
    yield policy
    policy.close()


def finish(merging: HotMerge) -> None:
    assert merging._merged is not None
    merging._merged.weights.exception(timeout=30)


def test_merges_only_after_enough_steps_of_one_delta(backbone: Backbone, merging: HotMerge) -> None:
    one, two = placed(backbone, "1"), placed(backbone, "2")
    for sole in (one, one, two, one, None, one, one):
        assert not merging.weights_for(sole)
        assert merging._merged is None
    merging.weights_for(one)
    finish(merging)
    assert merging.weights_for(one).keys() == one.modules.keys()


def test_other_batches_run_the_base_and_the_merge_is_dropped_in_time(
    backbone: Backbone, merging: HotMerge, budget: Budget
) -> None:
    one = placed(backbone, "1")
    for _ in range(AFTER):
        merging.weights_for(one)
    finish(merging)
    assert budget.room == 10**9 - merged_bytes(one, backbone)
    assert not merging.weights_for(None)
    assert merging.weights_for(one)
    for _ in range(AFTER):
        assert not merging.weights_for(None)
    assert budget.room == 10**9
    assert not merging.weights_for(one)


def test_no_room_no_merge(backbone: Backbone) -> None:
    budget = Budget(10)
    merging = HotMerge(backbone, after_steps=1, reserve=budget.reserve, free=budget.free)
    for _ in range(3):
        assert not merging.weights_for(placed(backbone, "1"))
    assert (merging._merged, budget.room) == (None, 10)


def test_a_released_delta_takes_its_merge_along(
    backbone: Backbone, merging: HotMerge, budget: Budget
) -> None:
    one = placed(backbone, "1")
    for _ in range(AFTER):
        merging.weights_for(one)
    merging.drop("2")
    assert merging._merged is not None
    finish(merging)
    merging.drop("1")
    assert (merging._merged, budget.room) == (None, 10**9)


def test_bytes_of_a_merge_that_runs_are_given_back_when_it_ends(
    backbone: Backbone, merging: HotMerge, budget: Budget
) -> None:
    one = placed(backbone, "1")
    for _ in range(AFTER):
        merging.weights_for(one)
    merge = merging._merged
    assert merge is not None
    finish(merging)
    merge.abandoned = True  # as `drop` leaves it while the thread runs
    assert not merging.weights_for(one)
    assert (merging._merged, budget.room) == (None, 10**9)
