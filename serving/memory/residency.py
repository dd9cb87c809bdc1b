"""Deltas in device memory: digest -> placed weights, with counted leases.

A request holds a lease from admission to its last token. Leased memory is never evicted or rewritten; a digest that is
being released takes no new lease and is freed when the last one ends. Used by the engine thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from adapters.errors import NotFound
from serving.memory.budget import MemoryBudget

CONSUMER = "deltas"


class Placed(Protocol):
    """What residency needs to know of placed weights."""

    digest: str
    device_bytes: int


P = TypeVar("P", bound=Placed)


@dataclass(slots=True, eq=False)
class _Resident(Generic[P]):
    placed: P
    load_s: float
    worth: float
    leases: int = 0
    draining: bool = False


class Residency(Generic[P]):
    """Placed deltas within a shared budget; among idle ones, the one that is cheapest to have again goes first.

    `on_evicted` hears of every delta that leaves to make room.
    """

    def __init__(self, budget: MemoryBudget, on_evicted: Callable[[str], None] = lambda _: None) -> None:
        self.budget = budget
        self.idle_bytes = 0
        self.num_evictions = 0
        self._on_evicted = on_evicted
        self._residents: OrderedDict[str, _Resident[P]] = OrderedDict()
        budget.register(CONSUMER, self)

    def __len__(self) -> int:
        return len(self._residents)

    def __contains__(self, digest: str) -> bool:
        return digest in self._residents

    @property
    def used_bytes(self) -> int:
        """Bytes of placed deltas, and of those that room was reserved for."""
        return self.budget.used_by(CONSUMER)

    def lease(self, digest: str) -> P | None:
        """Lease the placed delta, or None while it is not resident. Raises NotFound while it is being released."""
        resident = self._residents.get(digest)
        if resident is None:
            return None
        if resident.draining:
            raise NotFound("The delta is being unloaded.", param="model", remedy="Use another version.")
        if resident.leases == 0:
            self.idle_bytes -= resident.placed.device_bytes
        resident.leases += 1
        resident.worth = self.budget.worth(resident.load_s, resident.placed.device_bytes)
        self._residents.move_to_end(digest)
        return resident.placed

    def end_lease(self, digest: str) -> None:
        """Give one lease back."""
        resident = self._residents[digest]
        assert resident.leases > 0, digest
        resident.leases -= 1
        if resident.leases == 0:
            self.idle_bytes += resident.placed.device_bytes

    def reserve(self, size_bytes: int) -> bool:
        """Make room for a delta that will be inserted; False while what is in use stands in the way."""
        return self.budget.reserve(CONSUMER, size_bytes)

    def cancel(self, size_bytes: int) -> None:
        """Give a reservation back that came to nothing."""
        self.budget.free(CONSUMER, size_bytes)

    def insert(self, placed: P, *, reserved_bytes: int, load_s: float) -> None:
        """Take over freshly placed weights, which may be smaller than what was reserved for them."""
        assert placed.digest not in self._residents, placed.digest
        assert placed.device_bytes <= reserved_bytes, (placed.device_bytes, reserved_bytes)
        self.budget.free(CONSUMER, reserved_bytes - placed.device_bytes)
        worth = self.budget.worth(load_s, placed.device_bytes)
        self._residents[placed.digest] = _Resident(placed, load_s, worth)
        self.idle_bytes += placed.device_bytes

    def least_worth(self) -> float:
        """See `Consumer`."""
        return self._residents[self._victim()].worth

    def drop(self) -> None:
        """See `Consumer`."""
        digest = self._victim()
        self._remove(digest)
        self.num_evictions += 1
        self._on_evicted(digest)

    def _victim(self) -> str:
        """The idle delta of least worth, among equals the one that was leased longest ago."""
        idle = [digest for digest, resident in self._residents.items() if resident.leases == 0]
        return min(idle, key=lambda digest: self._residents[digest].worth)

    def start_release(self, digest: str) -> None:
        """Take no new leases on `digest`."""
        if digest in self._residents:
            self._residents[digest].draining = True

    def draining(self, digest: str) -> bool:
        """True from `start_release` until `digest` is gone."""
        resident = self._residents.get(digest)
        return resident is not None and resident.draining

    def finish_release(self, digest: str) -> int | None:
        """Free `digest` and return its bytes; None while leases are open. 0 when it is not resident."""
        resident = self._residents.get(digest)
        if resident is None:
            return 0
        return None if resident.leases else self._remove(digest)

    def leases(self, digest: str) -> int:
        """Open leases on `digest`."""
        resident = self._residents.get(digest)
        return 0 if resident is None else resident.leases

    def _remove(self, digest: str) -> int:
        resident = self._residents.pop(digest)
        assert resident.leases == 0, (digest, resident.leases)
        size = resident.placed.device_bytes
        self.idle_bytes -= size
        self.budget.free(CONSUMER, size)
        return size
