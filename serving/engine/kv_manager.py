"""Accounting of the KV cache: which request owns which slot, and which slots hold prefixes that others can use.

No torch; the tensors live in `serving.model.kv_cache`. `KVManager` is the interface behind which block tables stand
where a device has paged attention; contiguous slots are the layout of the CPU.

A slot's memory is reserved whole but committed by use, so it counts against the budget by what was written since it
was last cleared, rounded up to blocks. A free slot keeps its contents and its bytes until someone needs either.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from serving.engine.prefix_cache import BLOCK_TOKENS, HashChain, PrefixIndex
from serving.memory.budget import MemoryBudget

CONSUMER = "kv"

COPY_S_PER_BYTE = 2e-9
"""Worth of a prefix that nobody came back for: that of a delta read from host memory. Each hit adds as much."""

EMPTY_WORTH = 0.0
"""Worth of committed memory without contents: it is only spared the operating system's work."""


class KVStorage(Protocol):
    """The tensors behind the accounting."""

    def copy(self, source: int, target: int, stop: int, start: int = 0) -> None:
        """Copy entries [start, stop) of one slot to the same places of another."""
        ...

    def clear(self, slot: int) -> None:
        """Zero `slot` and give its memory back."""
        ...


class Opened(NamedTuple):
    """A slot for a request; its first `num_cached` tokens, and the virtual ones before them, are there already.

    `beside`: slots with as much room and nothing in them.
    """

    slot: int
    num_cached: int
    beside: tuple[int, ...] = ()


class KVManager(Protocol):
    """Room for keys and values."""

    def max_entries(self, beside_bytes: int, num_slots: int = 1, num_read: int = 0) -> int:
        """The longest that each of so many slots can become, virtual tokens included, beside a delta of that size.

        `num_read` entries of each, those of an encoder-decoder's prompt, take memory beside it.
        """
        ...

    @property
    def num_free_slots(self) -> int:
        """How many more requests could run, memory aside."""
        ...

    def open(
        self,
        chain: HashChain | None,
        tokens: list[int],
        prefix_len: int,
        *,
        headroom: int,
        num_beside: int = 0,
    ) -> Opened | None:
        """Room for a request's `tokens` so far; None while there is none. A chain means: reuse what is there.

        `headroom`: blocks that must stay obtainable, so that running requests can grow. `num_beside`: how many more
        slots the request needs.
        """
        ...

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Copy entries [start, stop) between two slots of a request; `target` has room for them."""
        ...

    def will_be_cached(self, chain: HashChain, tokens: list[int]) -> int:
        """Tokens that a running request is about to compute, beyond those that could be copied now."""
        ...

    def grow(self, slot: int, num_entries: int) -> bool:
        """Make sure that `slot` can hold `num_entries`; False while there is no room."""
        ...

    def publish(self, slot: int, chain: HashChain, tokens: list[int], num_computed: int) -> None:
        """Let others use the first `num_computed` tokens of `slot`."""
        ...

    def close(self, slot: int, *, sound: bool) -> None:
        """The request in `slot` is gone. Unless its numbers are `sound`, the contents are wiped."""
        ...

    @property
    def usage(self) -> float:
        """Share of the room that live requests take, 0 to 1."""
        ...


@dataclass(slots=True)
class _Slot:
    """`committed` blocks were written since the slot was cleared. `hits`: how often its prefix was used."""

    committed: int = 0
    hits: int = 0
    worth: float = EMPTY_WORTH


class SlotKVManager:
    """`num_slots` slots of `max_len` entries. The lowest empty slot goes first, so that live slots stay dense."""

    def __init__(
        self, num_slots: int, max_len: int, *, entry_bytes: int, budget: MemoryBudget, storage: KVStorage
    ) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self.block_bytes = entry_bytes * BLOCK_TOKENS
        self.budget = budget
        self.index = PrefixIndex()
        self.idle_bytes = 0
        self._storage = storage
        self._slots = [_Slot() for _ in range(num_slots)]
        self._live: set[int] = set()
        self._empty = set(range(num_slots))
        self._retained: OrderedDict[int, None] = OrderedDict()  # those with published blocks, last used last
        budget.register(CONSUMER, self)

    def max_entries(self, beside_bytes: int, num_slots: int = 1, num_read: int = 0) -> int:
        """See `KVManager`."""
        room = self.budget.capacity_bytes - beside_bytes
        if not self.block_bytes:  # nothing is kept of an encoder's rows
            return self.max_len if room >= 0 else 0
        return min(self.max_len, room // (self.block_bytes * num_slots) * BLOCK_TOKENS - num_read)

    @property
    def num_free_slots(self) -> int:
        """See `KVManager`."""
        return self.num_slots - len(self._live)

    @property
    def usage(self) -> float:
        """See `KVManager`."""
        live_bytes = sum(self._slots[slot].committed for slot in self._live) * self.block_bytes
        return max(len(self._live) / self.num_slots, live_bytes / max(1, self.budget.capacity_bytes))

    # -- a request comes, grows and goes ------------------------------------------------------------------------

    def open(
        self,
        chain: HashChain | None,
        tokens: list[int],
        prefix_len: int,
        *,
        headroom: int,
        num_beside: int = 0,
    ) -> Opened | None:
        """See `KVManager`."""
        if self.num_free_slots <= num_beside:
            return None
        blocks: int = 0
        holders: list[int] = []
        if chain is not None:
            blocks, holders = self.index.match(self._reusable(chain, tokens))
        target = self._choose(blocks, holders)
        source = target if target in holders else next(iter(holders), None)
        needed = _num_blocks(prefix_len + len(tokens))
        headroom += num_beside * needed
        if not self._claim(target, source, needed, headroom):
            # a retained slot can't both stay and be copied: continue in it
            if source is None or source in self._live or not self._claim(source, source, needed, headroom):
                return None
            target = source
        self._slots[target].hits = self._slots[target].hits if target == source else 0
        self.index.truncate(target, blocks if target == source else 0)
        if source is not None:
            self._slots[source].hits += 1
            if source != target:
                self._storage.copy(source, target, prefix_len + blocks * BLOCK_TOKENS)
                if source not in self._live:
                    self._leave(source)
        self._live.add(target)
        if chain is not None:
            hashes = chain.blocks(tokens, len(tokens) // BLOCK_TOKENS)
            self.index.publish(target, hashes[:blocks])
            self.index.expect(target, hashes[blocks:])
        beside = tuple(self._open_beside(needed) for _ in range(num_beside))
        return Opened(target, blocks * BLOCK_TOKENS, beside)

    def _open_beside(self, blocks: int) -> int:
        """A slot for as many blocks, for which there is room: it takes no more than these."""
        slot = self._choose(0, [])
        self._take(slot)
        if self._slots[slot].committed > blocks:
            self._wipe(slot)
            self._empty.remove(slot)
        self.index.truncate(slot, 0)
        self._slots[slot].hits = 0
        reserved = self._commit(slot, blocks)
        assert reserved, "room that was promised is gone"
        self._live.add(slot)
        return slot

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """See `KVManager`."""
        self._storage.copy(source, target, stop, start)

    def will_be_cached(self, chain: HashChain, tokens: list[int]) -> int:
        """See `KVManager`."""
        hashes = self._reusable(chain, tokens)
        blocks, _ = self.index.match(hashes)
        return self.index.expected(hashes[blocks:]) * BLOCK_TOKENS

    def grow(self, slot: int, num_entries: int) -> bool:
        """See `KVManager`."""
        return self._commit(slot, _num_blocks(num_entries))

    def publish(self, slot: int, chain: HashChain, tokens: list[int], num_computed: int) -> None:
        """See `KVManager`."""
        count = num_computed // BLOCK_TOKENS
        if count > self.index.num_blocks(slot):
            self.index.publish(slot, chain.blocks(tokens, count))

    def close(self, slot: int, *, sound: bool) -> None:
        """See `KVManager`."""
        self._live.remove(slot)
        if sound:
            self.index.expect_nothing(slot)
            self._leave(slot)
        else:
            self._wipe(slot)

    # -- what nobody uses at the moment -------------------------------------------------------------------------

    def least_worth(self) -> float:
        """See `Consumer`."""
        return self._slots[self._victim()].worth

    def drop(self) -> None:
        """See `Consumer`."""
        victim = self._victim()
        self._take(victim)
        self._wipe(victim)

    def _victim(self) -> int:
        """The free slot of least worth, among equals the one used longest ago."""
        worn = [slot for slot in self._empty if self._slots[slot].committed]
        return max(worn) if worn else min(self._retained, key=lambda slot: self._slots[slot].worth)

    def _choose(self, blocks: int, holders: list[int]) -> int:
        """The slot for a new request: one whose whole prefix it shares, an empty one, the one of least worth."""
        for slot in holders:
            if slot in self._retained and self.index.num_blocks(slot) == blocks:
                return slot
        if self._empty:
            return min(self._empty)
        others = [slot for slot in self._retained if slot not in holders[:1]] or list(self._retained)
        return min(others, key=lambda slot: self._slots[slot].worth)

    def _claim(self, target: int, source: int | None, needed: int, headroom: int) -> bool:
        """Take `target`, with room for `needed` blocks, and `source` out of the free slots; False leaves all as is."""
        claimed = [slot for slot in {target, source} if slot is not None and slot not in self._live]
        for slot in claimed:  # neither may be dropped to make the room
            self._take(slot)
        room = (max(0, needed - self._slots[target].committed) + headroom) * self.block_bytes
        if self.budget.fits(room) and self._commit(target, needed):
            return True
        for slot in claimed:
            self._leave(slot)
        return False

    def _take(self, slot: int) -> None:
        """Out of the free slots: its bytes are not idle any more."""
        if slot in self._retained:
            del self._retained[slot]
        else:
            self._empty.remove(slot)
        self.idle_bytes -= self._slots[slot].committed * self.block_bytes

    def _leave(self, slot: int) -> None:
        """Into the free slots, with whatever it holds."""
        if self.index.num_blocks(slot):
            self._retain(slot)
            return
        self._slots[slot].worth = EMPTY_WORTH
        self._empty.add(slot)
        self.idle_bytes += self._slots[slot].committed * self.block_bytes

    def _retain(self, slot: int) -> None:
        state = self._slots[slot]
        size = state.committed * self.block_bytes
        state.worth = self.budget.worth((1 + state.hits) * COPY_S_PER_BYTE * size, size)
        self._retained[slot] = None
        self.idle_bytes += size

    def _wipe(self, slot: int) -> None:
        """Forget the contents of a slot that is in no list, and give its memory back."""
        self.index.truncate(slot, 0)
        self._storage.clear(slot)
        self.budget.free(CONSUMER, self._slots[slot].committed * self.block_bytes)
        self._slots[slot] = _Slot()
        self._empty.add(slot)

    def _commit(self, slot: int, blocks: int) -> bool:
        state = self._slots[slot]
        if blocks > state.committed:
            if not self.budget.reserve(CONSUMER, (blocks - state.committed) * self.block_bytes):
                return False
            state.committed = blocks
        return True

    def _reusable(self, chain: HashChain, tokens: list[int]) -> list[bytes]:
        """All full blocks but the one of the last token, which is always computed: its logits are wanted."""
        return chain.blocks(tokens, (len(tokens) - 1) // BLOCK_TOKENS)


def _num_blocks(num_entries: int) -> int:
    return -(-num_entries // BLOCK_TOKENS)
