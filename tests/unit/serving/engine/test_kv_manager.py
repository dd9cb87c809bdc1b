"""Slots, retained prefixes and the bytes they stand for, on exact slots and copies."""

from __future__ import annotations

from dataclasses import dataclass, field

from serving.engine.kv_manager import Opened, SlotKVManager
from serving.engine.prefix_cache import BLOCK_TOKENS, HashChain
from serving.memory.budget import MemoryBudget

ENTRY = 10
BLOCK = ENTRY * BLOCK_TOKENS


@dataclass
class FakeStorage:
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    cleared: list[int] = field(default_factory=list)

    def copy(self, source: int, target: int, stop: int, start: int = 0) -> None:
        assert start == 0
        self.copies.append((source, target, stop))

    def clear(self, slot: int) -> None:
        self.cleared.append(slot)


class Slots:
    """A manager with everything around it; requests are token lists with one root."""

    def __init__(self, slots: int = 3, blocks: int = 100, max_len: int = 256) -> None:
        self.storage = FakeStorage()
        self.budget = MemoryBudget(blocks * BLOCK)
        self.kv = SlotKVManager(slots, max_len, entry_bytes=ENTRY, budget=self.budget, storage=self.storage)

    def open(
        self, tokens: list[int], *, prefix_len: int = 0, headroom: int = 0, root: bytes = b"root"
    ) -> tuple[int, int] | None:
        opened = self.kv.open(HashChain(root), tokens, prefix_len, headroom=headroom)
        return None if opened is None else (opened.slot, opened.num_cached)

    def run(self, tokens: list[int], root: bytes = b"root") -> int:
        """Compute `tokens` and end the request; its slot is retained."""
        opened = self.open(tokens, root=root)
        assert opened is not None
        self.kv.publish(opened[0], HashChain(root), tokens, len(tokens))
        self.kv.close(opened[0], sound=True)
        return opened[0]


def prompt(blocks: int, extra: int = 1, start: int = 0) -> list[int]:
    return list(range(start, start + blocks * BLOCK_TOKENS + extra))


def test_the_lowest_empty_slot_goes_first_and_the_last_is_the_last() -> None:
    slots = Slots(3)
    assert [slots.open([1]) for _ in range(4)] == [(0, 0), (1, 0), (2, 0), None]
    slots.kv.close(2, sound=True)
    slots.kv.close(0, sound=True)
    assert [slots.open([1]), slots.open([1])] == [(0, 0), (2, 0)]
    assert slots.kv.usage == 1.0
    assert not slots.kv.num_free_slots


def test_a_prompt_that_continues_a_retained_one_takes_its_slot_over() -> None:
    slots = Slots()
    slots.run(prompt(2))
    assert slots.open(prompt(3)) == (0, 2 * BLOCK_TOKENS)
    assert slots.storage.copies == []


def test_a_prompt_that_shares_a_beginning_gets_a_copy_and_the_original_stays() -> None:
    slots = Slots()
    slots.run(prompt(4))
    branch = prompt(2) + prompt(1, start=500)
    assert slots.open(branch, prefix_len=7) == (1, 2 * BLOCK_TOKENS)
    assert slots.storage.copies == [(0, 1, 7 + 2 * BLOCK_TOKENS)]  # virtual tokens in front come along
    assert slots.open(prompt(4, extra=9)) == (0, 4 * BLOCK_TOKENS)


def test_a_live_slot_is_copied_from_and_never_taken_over() -> None:
    slots = Slots()
    assert slots.open(prompt(2)) == (0, 0)
    slots.kv.publish(0, HashChain(b"root"), prompt(2), 2 * BLOCK_TOKENS)
    assert slots.open(prompt(2)) == (1, 2 * BLOCK_TOKENS)
    assert slots.storage.copies == [(0, 1, 2 * BLOCK_TOKENS)]


def test_the_last_token_is_always_computed() -> None:
    slots = Slots()
    slots.run(prompt(2, extra=0))
    assert slots.open(prompt(2, extra=0)) == (1, BLOCK_TOKENS)


def test_without_an_empty_slot_the_retained_one_of_least_worth_goes() -> None:
    slots = Slots(3)
    for index, root in enumerate((b"a", b"b", b"c")):
        assert slots.run(prompt(2), root) == index
    slots.run(prompt(2), b"a")  # a hit: worth more than the others
    assert slots.open(prompt(1), root=b"x") == (1, 0)
    assert slots.open(prompt(1), root=b"y") == (2, 0)
    assert slots.open(prompt(3), root=b"a") == (0, 2 * BLOCK_TOKENS)


def test_a_slot_that_was_taken_over_is_no_longer_what_it_was() -> None:
    slots = Slots(1)
    slots.run(prompt(3), b"a")
    assert slots.open(prompt(1), root=b"b") == (0, 0)
    slots.kv.close(0, sound=True)
    assert slots.open(prompt(3), root=b"a") == (0, 0)
    slots.kv.publish(0, HashChain(b"a"), prompt(3), 3 * BLOCK_TOKENS)
    slots.kv.close(0, sound=True)
    branch = prompt(1) + prompt(1, start=500)
    assert slots.open(branch, root=b"a") == (0, BLOCK_TOKENS)  # in place: the only slot
    slots.kv.close(0, sound=True)
    assert slots.open(prompt(3), root=b"a") == (0, BLOCK_TOKENS)


def test_unsound_contents_are_wiped_and_matched_by_nobody() -> None:
    slots = Slots()
    slots.open(prompt(2))
    slots.kv.publish(0, HashChain(b"root"), prompt(2), 2 * BLOCK_TOKENS)
    slots.kv.close(0, sound=False)
    assert slots.storage.cleared == [0]
    assert slots.budget.used_bytes == 0
    assert slots.open(prompt(2)) == (0, 0)


def test_a_slot_costs_what_was_written_to_it_and_keeps_it_until_someone_needs_it() -> None:
    slots = Slots(blocks=6)
    slots.run(prompt(3))  # 3 blocks and a token
    assert slots.budget.used_bytes == 4 * BLOCK
    assert slots.open(prompt(1, start=900)) == (1, 0)  # 2 blocks: all of the budget
    assert slots.budget.used_bytes == 6 * BLOCK
    assert slots.kv.grow(1, 2 * BLOCK_TOKENS)
    assert slots.storage.cleared == []
    assert slots.kv.grow(1, 2 * BLOCK_TOKENS + 1)
    assert slots.storage.cleared == [0]
    assert slots.budget.used_bytes == 3 * BLOCK
    assert slots.kv.grow(1, 6 * BLOCK_TOKENS)
    assert not slots.kv.grow(1, 6 * BLOCK_TOKENS + 1)


def test_room_is_refused_where_running_requests_could_not_grow() -> None:
    slots = Slots(blocks=6)
    assert slots.open(prompt(2, extra=0), headroom=5) is None
    assert slots.budget.used_bytes == 0
    assert slots.open(prompt(2, extra=0), headroom=4) == (0, 0)


def test_the_source_of_a_copy_is_not_dropped_to_make_room_for_the_copy() -> None:
    slots = Slots(blocks=7)
    slots.run(prompt(3, extra=0))
    assert slots.open(prompt(3, extra=0)) == (1, 2 * BLOCK_TOKENS)
    assert slots.storage.copies == [(0, 1, 2 * BLOCK_TOKENS)]


def test_a_prefix_that_can_not_stay_beside_its_copy_is_continued_in_place() -> None:
    slots = Slots(blocks=7)
    slots.run(prompt(3, extra=0))
    branch = prompt(2) + prompt(2, start=500)  # 5 blocks, of which 4 have room
    assert slots.open(branch) == (0, 2 * BLOCK_TOKENS)
    assert slots.storage.copies == []
    assert slots.budget.used_bytes == 5 * BLOCK


def test_a_longest_request_fits_beside_its_delta() -> None:
    slots = Slots(blocks=6, max_len=256)
    assert slots.kv.max_entries(0) == 6 * BLOCK_TOKENS
    assert slots.kv.max_entries(BLOCK // 2) == 5 * BLOCK_TOKENS
    assert Slots(blocks=600).kv.max_entries(0) == 256


def test_what_a_running_request_will_compute_is_known_to_others_until_it_is_there() -> None:
    slots = Slots()
    slots.open(prompt(3))
    waiting = HashChain(b"root")
    assert slots.kv.will_be_cached(waiting, prompt(3)) == 3 * BLOCK_TOKENS
    assert slots.kv.will_be_cached(waiting, prompt(3, extra=0)) == 2 * BLOCK_TOKENS
    slots.kv.publish(0, HashChain(b"root"), prompt(3), 3 * BLOCK_TOKENS)
    assert slots.kv.will_be_cached(waiting, prompt(3)) == 0
    assert slots.open(prompt(3)) == (1, 3 * BLOCK_TOKENS)


def test_usage_counts_slots_or_bytes_whichever_is_scarcer() -> None:
    slots = Slots(slots=4, blocks=4)
    slots.open(prompt(1))
    assert slots.kv.usage == 0.5
    slots.open([1])
    assert slots.kv.usage == 0.75
    slots.kv.close(0, sound=True)
    slots.kv.close(1, sound=True)
    assert slots.kv.usage == 0.0


def test_slots_beside_a_request_come_with_it_or_not_at_all() -> None:
    slots = Slots(4, blocks=9)
    kept = slots.run(prompt(2, extra=0))
    long = slots.run(prompt(6, extra=0, start=500))
    asked = prompt(2)  # three blocks, of which two are kept

    def open_with(num_beside: int, headroom: int = 0) -> Opened | None:
        return slots.kv.open(HashChain(b"root"), asked, 0, headroom=headroom, num_beside=num_beside)

    assert open_with(num_beside=4) is None, "there are four slots"
    assert open_with(num_beside=3) is None, "there is room for nine blocks"
    assert open_with(num_beside=2, headroom=1) is None
    assert slots.kv.num_free_slots == 4
    opened = open_with(num_beside=2)
    assert opened is not None
    assert (opened.slot, opened.num_cached) == (kept, 2 * BLOCK_TOKENS)
    assert len({opened.slot, *opened.beside}) == 3
    assert slots.budget.used_bytes == 9 * BLOCK
    assert slots.kv.idle_bytes == 0, "the long prompt had to go"
    assert long in slots.storage.cleared
    for slot in (opened.slot, *opened.beside):
        assert slots.kv.grow(slot, 3 * BLOCK_TOKENS)
        assert not slots.kv.grow(slot, 3 * BLOCK_TOKENS + 1)


def test_a_chain_ends_where_tokens_may_change() -> None:
    slots = Slots(2)
    chain, tokens = HashChain(b"root", num_fixed=2 * BLOCK_TOKENS + 3), prompt(4)
    opened = slots.kv.open(chain, tokens, 0, headroom=0)
    assert opened is not None
    slots.kv.publish(opened.slot, chain, tokens, len(tokens))
    assert slots.open(tokens) == (1, 2 * BLOCK_TOKENS)
