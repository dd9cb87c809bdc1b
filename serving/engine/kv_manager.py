"""Accounting of the KV cache: which request owns which slot. No torch; the tensors live in `serving.model.kv_cache`.

`KVManager` is the interface behind which block tables stand where a device has paged attention; contiguous slots are
the layout of the CPU.
"""

from __future__ import annotations

import heapq
from typing import Protocol


class KVManager(Protocol):
    """Room for keys and values. An allocation holds everything that its request can ever need."""

    max_len: int

    def allocate(self, num_entries: int) -> int | None:
        """A slot with room for `num_entries`, or None while there is none."""
        ...

    def free(self, slot: int) -> None:
        """Give `slot` back."""
        ...

    @property
    def usage(self) -> float:
        """Share of the room that is taken, 0 to 1."""
        ...


class SlotKVManager:
    """`num_slots` slots of `max_len` entries. The lowest free slot goes first, so that live slots stay dense."""

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self._free = list(range(num_slots))
        self._taken: set[int] = set()

    def allocate(self, num_entries: int) -> int | None:
        assert num_entries <= self.max_len, (num_entries, self.max_len)
        if not self._free:
            return None
        slot = heapq.heappop(self._free)
        self._taken.add(slot)
        return slot

    def free(self, slot: int) -> None:
        self._taken.remove(slot)
        heapq.heappush(self._free, slot)

    @property
    def usage(self) -> float:
        return len(self._taken) / self.num_slots
