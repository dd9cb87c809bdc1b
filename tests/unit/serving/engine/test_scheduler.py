"""The scheduler's policy on exact rows: decodes first, chunks, admission, sharing, preemption, no leaks."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.errors import ContextLengthExceeded, NotFound, Overloaded
from adapters.positions import FirstTokens, FromInvocation, LastTokens
from serving.core import SamplingParams, ServiceClass
from serving.engine.prefix_cache import BLOCK_TOKENS
from tests.unit.serving.engine.scheduler_support import BLOCK, FakeDelta, World, sequence


def test_long_prompt_is_chunked_and_never_delays_a_decode() -> None:
    world = World(tokens=10)
    world.add("short", 3, max_tokens=9)
    assert world.turn() == [("short", 3)]
    world.add("long", 25)
    assert world.turn() == [("short", 1), ("long", 9)]
    assert world.turn() == [("short", 1), ("long", 9)]
    assert world.turn() == [("short", 1), ("long", 7)]
    assert world.turn() == [("short", 1), ("long", 1)]


@pytest.mark.parametrize("fair", [True, False])
def test_waiting_requests_of_one_tenant_are_admitted_in_order_while_slots_last(fair: bool) -> None:
    world = World(slots=2, tokens=100, fair=fair)
    for name in "abc":
        world.add(name, 2)
    assert world.turn() == [("a", 2), ("b", 2)]
    world.scheduler.finish(world.scheduler.running[0])
    assert world.turn() == [("b", 1), ("c", 2)]
    assert [seq.slot for seq in world.scheduler.running] == [1, 0]


def test_request_with_a_loading_delta_is_passed_over_and_served_when_it_arrives() -> None:
    world = World(deltas=(FakeDelta("d", 0, prefix_len=5, position_offset=5),), load_s=1.0)
    cold = world.add("cold", 2, adapter_digest="d")
    assert world.leases.prefetched == ["d"]
    world.add("warm", 2)
    assert world.turn(1.0) == [("warm", 2)]
    assert world.turn() == [("warm", 1), ("cold", 2)]
    assert (cold.prefix_len, cold.position_offset) == (5, 5)
    assert world.leases.residency.leases("d") == 1
    world.scheduler.finish(cold)
    assert world.leases.residency.leases("d") == 0


def test_no_free_slot_leases_nothing() -> None:
    world = World(deltas=(FakeDelta("d"),), slots=1)
    world.add("a", 2)
    world.add("b", 2, adapter_digest="d")
    world.turn()
    assert world.leases.residency.leases("d") == 0
    assert len(world.scheduler.queue) == 1


def test_broken_delta_fails_only_its_own_request() -> None:
    world = World()
    world.leases.broken["x"] = NotFound("gone")
    world.add("bad", 2, adapter_digest="x")
    world.add("good", 2)
    assert world.turn() == [("good", 2)]
    assert isinstance(world.failed["bad"], NotFound)


def test_virtual_tokens_count_against_the_context_and_the_lease_comes_back() -> None:
    world = World(deltas=(FakeDelta("d", 0, prefix_len=60),), max_len=64)
    world.add("a", 2, adapter_digest="d", max_tokens=3)
    assert world.turn() == []
    error = world.failed["a"]
    assert isinstance(error, ContextLengthExceeded)
    assert error.param == "max_tokens"
    assert world.leases.residency.leases("d") == 0
    assert world.kv.usage == 0.0


def test_a_request_that_the_budget_could_never_hold_is_refused_and_an_open_one_is_bounded() -> None:
    world = World(deltas=(FakeDelta("d", 2 * BLOCK),), blocks=6)
    world.add("big", 2, max_tokens=5 * BLOCK_TOKENS, adapter_digest="d")
    open_end = world.add("open", 2, max_tokens=None, adapter_digest="d")
    world.turn()
    assert isinstance(world.failed["big"], ContextLengthExceeded)
    assert open_end.max_len == 4 * BLOCK_TOKENS


def test_unlimited_max_tokens_reaches_to_the_end_of_the_slot() -> None:
    world = World(deltas=(FakeDelta("d", 0, prefix_len=10),), max_len=64)
    seq = world.add("a", 2, adapter_digest="d", max_tokens=None)
    world.turn()
    assert seq.max_len == 54


def test_full_queue_is_overloaded() -> None:
    world = World()
    for index in range(8):
        world.add(str(index), 2)
    with pytest.raises(Overloaded, match="8 requests are waiting"):
        world.add("late", 2)


def test_a_request_that_waits_too_long_is_refused_and_one_that_ran_is_not() -> None:
    world = World(slots=1, max_queue_s=10.0, tokens=100)
    world.add("batch", 8, max_tokens=60, service_class=ServiceClass.BATCH)
    world.turn(1.0)
    world.add("real", 8, max_tokens=60, service_class=ServiceClass.REALTIME)
    world.add("late", 8)
    world.turn(10.0)
    assert world.running() == ["real"]
    world.turn(0.1)
    assert world.failed == {}
    world.turn()
    assert list(world.failed) == ["late"]
    assert isinstance(world.failed["late"], Overloaded)
    assert "waited 10 s" in world.failed["late"].message
    assert world.failed["late"].remedy is not None
    assert len(world.scheduler.queue) == 1


def test_a_request_that_would_wait_too_long_is_refused_at_once_and_told_when_to_return() -> None:
    world = World(slots=1, tokens=100, max_queue=99, max_queue_s=95.0)
    for index in range(24):
        world.add(
            f"a{index}", 2, max_tokens=4, tenant="a", max_wait_s=1.0
        )  # nothing is known yet: no refusal
    while len(world.scheduler.queue) > 8:
        world.turn(1.0)  # one is admitted every four seconds
    for may_wait_s in (20.0, 10.0):
        with pytest.raises(Overloaded, match=f"for a place; the limit is {may_wait_s:g} s") as refused:
            world.add("a", 2, tenant="a", max_wait_s=may_wait_s)
        assert refused.value.retry_after_s == pytest.approx(32.0 - may_wait_s, abs=2.0)
    world.add("patient", 2, tenant="a", max_wait_s=40.0)
    world.add("b", 2, tenant="b", max_wait_s=10.0)  # its tenant has nothing waiting: it is the next
    for index in range(15):
        world.add(f"a more {index}", 2, tenant="a")
    with pytest.raises(Overloaded, match="the limit is 95 s"):  # the engine's own
        world.add("one more", 2, tenant="a")
    for _ in range(1000):  # a pause is no slowness
        world.turn(1.0)
    world.add("later", 2, tenant="a", max_wait_s=0.1)


def test_who_comes_first_is_asked_how_many_are_there_and_a_fair_queue_how_many_are_before() -> None:
    def ahead(fair: bool, tenant: str, **request: Any) -> float:
        world = World(slots=0, max_queue=99, fair=fair)
        for index in range(20):
            world.add(f"a{index}", 2, tenant="a")
        for index in range(4):
            world.add(f"b{index}", 2, tenant="b", weight=3.0)
        return world.scheduler.queue.num_ahead(sequence("new", 2, tenant=tenant, **request))

    assert [ahead(False, tenant) for tenant in "abc"] == [24, 24, 24]
    assert ahead(True, "c") == 0
    assert ahead(True, "b", weight=3.0) == pytest.approx(4 * 4 / 3)
    assert ahead(True, "a") == 24  # all, and no more than all
    batch = {"weight": 3.0, "service_class": ServiceClass.BATCH}
    assert ahead(True, "b", **batch) == 0


def test_finishing_a_waiting_request_removes_it() -> None:
    world = World(deltas=(FakeDelta("d"),))
    waiting = world.add("a", 2, adapter_digest="d")
    assert world.scheduler.is_awaited("d")
    world.scheduler.finish(waiting)
    assert not world.scheduler.is_awaited("d")
    assert world.turn() == []


# -- sharing ----------------------------------------------------------------------------------------------------

PROMPT = list(range(100, 100 + 4 * BLOCK_TOKENS + 3))


def test_siblings_wait_for_the_first_one_and_compute_only_what_is_left() -> None:
    world = World(tokens=32, slots=4)
    for name in ("s0", "s1", "s2"):
        world.add(name, PROMPT)
    assert world.turn() == [("s0", 32)]  # the others wait, although there are slots
    assert world.turn() == [("s0", 32)]
    assert world.turn() == [("s0", 3)]
    assert world.turn() == [("s0", 1), ("s1", 3), ("s2", 3)]
    while world.scheduler.running:
        world.turn()
    assert world.computed == {"s0": len(PROMPT) + 3, "s1": 3 + 3, "s2": 3 + 3}


def test_siblings_do_not_wait_for_a_small_common_part() -> None:
    world = World(tokens=200)
    world.add("a", PROMPT)
    world.add("b", PROMPT[: 2 * BLOCK_TOKENS] + list(range(900, 900 + 3 * BLOCK_TOKENS)))
    assert [name for name, _ in world.turn()] == ["a", "b"]


def test_a_sibling_whose_leader_ends_early_computes_by_itself() -> None:
    world = World(tokens=32)
    leader = world.add("a", PROMPT)
    world.add("b", PROMPT)
    world.turn()
    world.scheduler.finish(leader)
    assert world.turn() == [("b", 32)]  # half a prompt that was never checked is of no use
    assert world.storage.slots[world.scheduler.running[0].slot]


def test_a_later_prompt_reuses_what_an_ended_request_computed() -> None:
    world = World(tokens=200)
    first = world.add("first", PROMPT, max_tokens=20)
    while first.num_generated != 20:
        world.turn()
    again = world.add("again", [*first.tokens, 7, 8, 9])
    world.turn()
    # the last token was never computed; whole blocks are reused, of prompt and answer alike
    reused = (len(first.tokens) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert again.num_cached == reused == 5 * BLOCK_TOKENS
    assert world.computed["again"] == len(again.request.prompt_token_ids) - reused


@pytest.mark.parametrize("change", [{"tenant": "other"}, {"adapter_digest": "d2"}, {"adapter_digest": None}])
def test_another_tenant_or_delta_reuses_nothing(change: dict[str, str | None]) -> None:
    world = World(tokens=200, deltas=(FakeDelta("d1", 0, prefix_len=4), FakeDelta("d2", 0, prefix_len=4)))
    mine = {"tenant": "me", "adapter_digest": "d1"}
    for name, request in (("first", mine), ("foreign", mine | change), ("own", mine)):
        seq = world.add(name, PROMPT, **request)
        while world.scheduler.running or len(world.scheduler.queue):
            world.turn()
        assert seq.num_cached == (4 * BLOCK_TOKENS if name == "own" else 0)


def test_a_prompt_that_invokes_its_delta_elsewhere_reuses_nothing() -> None:
    world = World(tokens=200, deltas=(FakeDelta("d", positions=frozenset({FromInvocation((102,))})),))
    for name, prompt, cached in (
        ("first", PROMPT, 0),
        ("invoked again", [*PROMPT, 102, 7], 0),  # all that came before is computed as before an invocation
        ("continued", [*PROMPT, 7, 8], 4 * BLOCK_TOKENS),
    ):
        seq = world.add(name, prompt, adapter_digest="d")
        while world.scheduler.running or len(world.scheduler.queue):
            world.turn()
        assert seq.num_cached == cached


def test_a_prompt_whose_last_tokens_are_others_reuses_nothing() -> None:
    """The last tokens of a shorter prompt were edited; those of an equally long one stand at the same places."""
    world = World(tokens=200, deltas=(FakeDelta("d", positions=frozenset({FirstTokens(2), LastTokens(3)})),))
    for name, prompt, cached in (
        ("first", PROMPT, 0),
        ("longer", [*PROMPT, 7], 0),
        ("as long", [*PROMPT[:-1], 7], (len(PROMPT) - 1) // BLOCK_TOKENS * BLOCK_TOKENS),
    ):
        seq = world.add(name, prompt, adapter_digest="d")
        while world.scheduler.running or len(world.scheduler.queue):
            world.turn()
        assert seq.num_cached == cached


def test_prompt_logprobs_compute_the_whole_prompt() -> None:
    world = World(tokens=200)
    for name in ("a", "b"):
        seq = world.add(name, PROMPT, sampling=SamplingParams(max_tokens=2, prompt_logprobs=0))
        while world.scheduler.running or len(world.scheduler.queue):
            world.turn()
        assert seq.num_cached == 0
    assert world.computed == {"a": len(PROMPT) + 1, "b": len(PROMPT) + 1}


def test_a_failed_request_leaves_nothing_to_reuse() -> None:
    world = World(tokens=200)
    first = world.add("first", PROMPT)
    world.turn()
    world.turn()
    world.scheduler.finish(first, failed=True)
    assert world.storage.slots == {}
    assert world.add("again", PROMPT).num_cached == 0
    assert world.turn() == [("again", len(PROMPT))]


# -- preemption -------------------------------------------------------------------------------------------------


def test_the_lowest_class_and_then_the_youngest_gives_way_and_goes_on_later() -> None:
    world = World(tokens=200, blocks=11)
    classes = {
        "old": ServiceClass.STANDARD,
        "batch": ServiceClass.BATCH,
        "young": ServiceClass.STANDARD,
        "real": ServiceClass.REALTIME,
    }
    for name, service_class in classes.items():
        world.add(name, 2 * BLOCK_TOKENS - 2, max_tokens=24, service_class=service_class)
    world.turn()
    assert len(world.running()) == 4  # two blocks each, of which each will need four
    gone: list[str] = []
    while len(gone) < 2:
        before = world.running()
        world.turn()
        gone += sorted(set(before) - set(world.running()))
    assert gone == ["batch", "young"]
    while world.scheduler.running or len(world.scheduler.queue):
        world.turn()
    assert world.generated == dict.fromkeys(classes, 24)


def test_who_is_preempted_keeps_its_tokens_and_emits_each_once() -> None:
    world = World(tokens=100, blocks=8)
    old = world.add("old", 2 * BLOCK_TOKENS, max_tokens=3 * BLOCK_TOKENS)
    young = world.add("young", BLOCK_TOKENS, max_tokens=3 * BLOCK_TOKENS)
    while world.scheduler.num_preemptions == 0:
        world.turn()
    kept = list(young.tokens)
    assert world.running() == ["old"]
    assert (young.slot, young.num_computed) == (-1, 0)
    assert len(kept) > BLOCK_TOKENS
    while world.scheduler.running or len(world.scheduler.queue):
        world.turn()
        assert world.budget.used_bytes <= world.budget.capacity_bytes
    assert young.tokens[: len(kept)] == kept
    assert world.generated == {"old": 3 * BLOCK_TOKENS, "young": 3 * BLOCK_TOKENS}
    assert old.num_generated == 3 * BLOCK_TOKENS


def test_retained_prefixes_and_idle_deltas_go_before_anybody_is_preempted() -> None:
    world = World(tokens=100, blocks=8, deltas=(FakeDelta("d", 2 * BLOCK),))
    world.add("first", 2 * BLOCK_TOKENS, max_tokens=1, adapter_digest="d")
    world.turn()
    assert world.budget.used_bytes == 4 * BLOCK
    world.add("grows", 2 * BLOCK_TOKENS, max_tokens=6 * BLOCK_TOKENS)
    while world.scheduler.running or len(world.scheduler.queue):
        world.turn()
    assert world.generated["grows"] == 6 * BLOCK_TOKENS
    assert world.scheduler.num_preemptions == 0
    assert "d" not in world.leases.residency


def test_batch_yields_its_place_while_it_had_more_than_its_share_and_is_not_overdue() -> None:
    world = World(tokens=100, slots=1, max_wait_s=5.0)
    batch = world.add("batch", 8, max_tokens=200, service_class=ServiceClass.BATCH)
    world.turn(1.0)
    real = world.add("real", 8, max_tokens=2, service_class=ServiceClass.REALTIME)
    assert world.turn(1.0) == [("real", 8)]
    world.turn(1.0)
    assert real.num_generated == 2
    world.turn(4.0)
    assert world.running() == ["batch"]
    world.add("next", 8, service_class=ServiceClass.REALTIME)
    world.turn()
    assert world.running() == ["batch"]  # it has waited long enough
    assert batch.num_generated == 3


def test_standard_never_yields_to_realtime() -> None:
    world = World(tokens=100, slots=1)
    world.add("standard", 8, max_tokens=50)
    world.turn()
    world.add("real", 8, service_class=ServiceClass.REALTIME)
    world.turn()
    assert world.running() == ["standard"]


def test_tokens_that_are_computed_again_are_not_charged_again() -> None:
    world = World(tokens=100, blocks=8, sharing="off")
    world.add("old", 2 * BLOCK_TOKENS, max_tokens=3 * BLOCK_TOKENS, tenant="a")
    world.add("young", BLOCK_TOKENS, max_tokens=3 * BLOCK_TOKENS, tenant="b")
    while world.scheduler.running or len(world.scheduler.queue):
        world.turn()
    assert world.scheduler.num_preemptions > 0
    queue = world.scheduler.queue
    assert queue.served("a") == 2 * BLOCK_TOKENS + 2 * 3 * BLOCK_TOKENS  # type: ignore[attr-defined]
    assert queue.served("b") == BLOCK_TOKENS + 2 * 3 * BLOCK_TOKENS  # type: ignore[attr-defined]


# -- deltas that do not all fit ---------------------------------------------------------------------------------


def test_an_overdue_request_gets_room_for_its_delta_by_draining_the_one_with_the_fewest_rows() -> None:
    deltas = tuple(FakeDelta(name, 100 * BLOCK) for name in "abc")
    world = World(tokens=100, slots=8, blocks=250, max_queue=99, deltas=deltas, max_wait_s=2.0)
    for name in ("a1", "a2", "b1"):
        world.add(name, 4, max_tokens=8, adapter_digest=name[0])
    world.turn(1.0)
    world.add("c1", 4, adapter_digest="c")
    world.turn(1.0)
    world.add("b2", 4, max_tokens=30, adapter_digest="b")
    world.turn(1.5)
    assert world.running() == ["a1", "a2", "b1", "b2"]  # c1 is not overdue: what is resident goes on
    world.add("b3", 4, max_tokens=30, adapter_digest="b")
    world.add("a3", 4, max_tokens=30, adapter_digest="a")
    world.add("base", 4, max_tokens=30)
    world.turn(0.0)
    assert "a3" not in world.running()  # of two with two rows each, one is closed
    assert {"b3", "base"} <= set(world.running())
    while "c1" not in world.running():
        world.turn()
    assert "a" not in world.leases.residency
