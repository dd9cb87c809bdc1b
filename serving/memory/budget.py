"""One budget of device memory that deltas and the KV cache share. Policy only: no tensors.

A consumer reserves bytes before it takes them. What nobody uses at the moment (deltas without a lease, KV of finished
requests) stays as long as there is room; when there is none, the idle piece of least worth goes first, whoever's it is.

Worth is GreedyDual-Size (Cao and Irani, 1997): what it costs to have a piece again, per byte, on top of a clock that
rises to the worth of whatever is dropped. Pieces that are cheap to restore go before dear ones of the same age, and no
piece outlives its use for ever.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

AUTO_SHARE = 0.25
"""Share of the machine's memory that `auto_capacity` takes: the model, the host cache and Ray need the rest."""

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Consumer(Protocol):
    """Someone who holds bytes of the budget."""

    @property
    def idle_bytes(self) -> int:
        """Bytes that `drop` would free in the end."""
        ...

    def least_worth(self) -> float:
        """Worth of the piece that `drop` takes next. Asked only while something is idle."""
        ...

    def drop(self) -> None:
        """Give up the idle piece of least worth and free its bytes."""
        ...


class MemoryBudget:
    """`capacity_bytes` shared by named consumers. Used by the engine thread only."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.clock = 0.0
        self._consumers: list[Consumer] = []
        self._used: dict[str, int] = {}

    def register(self, name: str, consumer: Consumer | None = None) -> None:
        """Let someone reserve as `name`. A `consumer` is asked for what it does not use; without one, nothing."""
        assert name not in self._used, name
        self._used[name] = 0
        if consumer is not None:
            self._consumers.append(consumer)

    @property
    def used_bytes(self) -> int:
        """Bytes reserved by all."""
        return sum(self._used.values())

    def used_by(self, name: str) -> int:
        """Bytes that `name` holds, idle ones included."""
        return self._used[name]

    def fits(self, size_bytes: int) -> bool:
        """Whether `reserve` would succeed."""
        idle = sum(consumer.idle_bytes for consumer in self._consumers)
        return self.used_bytes - idle + size_bytes <= self.capacity_bytes

    def reserve(self, name: str, size_bytes: int) -> bool:
        """Take bytes for `name`, dropping idle pieces as needed; False, with nothing dropped, where that can't do."""
        if self.used_bytes + size_bytes > self.capacity_bytes:
            if not self.fits(size_bytes):
                return False
            while self.used_bytes + size_bytes > self.capacity_bytes:
                self._drop_one()
        self._used[name] += size_bytes
        return True

    def free(self, name: str, size_bytes: int) -> None:
        """Give bytes back."""
        self._used[name] -= size_bytes
        assert self._used[name] >= 0, (name, self._used[name])

    def worth(self, cost_s: float, size_bytes: int) -> float:
        """Worth of a piece that is used now: seconds to have it again, per byte, from the clock on."""
        return self.clock + cost_s / max(1, size_bytes)

    def _drop_one(self) -> None:
        victim = min(
            (consumer for consumer in self._consumers if consumer.idle_bytes),
            key=lambda consumer: consumer.least_worth(),
        )
        self.clock = max(self.clock, victim.least_worth())
        victim.drop()


def auto_capacity() -> int:
    """A share of the memory that this process may use: the machine's, or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if _CGROUP_LIMIT.exists():
        limit = _CGROUP_LIMIT.read_text().strip()
        if limit.isdigit():  # "max" where there is none
            total = min(total, int(limit))
    return int(total * AUTO_SHARE)
