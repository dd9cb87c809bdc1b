"""Deltas in device memory: digest -> placed weights, with counted leases.

A request holds a lease from admission to its last token. Leased memory is never evicted or rewritten; a digest that is
being released takes no new lease and is freed when the last one ends. Used by the engine thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from adapters.errors import NotFound


class Placed(Protocol):
    """What residency needs to know of placed weights."""

    digest: str
    device_bytes: int


P = TypeVar("P", bound=Placed)


@dataclass(slots=True, eq=False)
class _Resident(Generic[P]):
    placed: P
    leases: int = 0
    draining: bool = False


class Residency(Generic[P]):
    """A byte budget of placed deltas, least recently used first out."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.num_evictions = 0
        self._residents: OrderedDict[str, _Resident[P]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._residents)

    def __contains__(self, digest: str) -> bool:
        return digest in self._residents

    def lease(self, digest: str) -> P | None:
        """Lease the placed delta, or None while it is not resident. Raises NotFound while it is being released."""
        resident = self._residents.get(digest)
        if resident is None:
            return None
        if resident.draining:
            raise NotFound("The delta is being unloaded.", param="model", remedy="Use another version.")
        resident.leases += 1
        self._residents.move_to_end(digest)
        return resident.placed

    def end_lease(self, digest: str) -> None:
        """Give one lease back."""
        resident = self._residents[digest]
        assert resident.leases > 0, digest
        resident.leases -= 1

    def make_room(self, size_bytes: int) -> bool:
        """Evict unleased deltas until `size_bytes` fit; False when leased ones stand in the way."""
        idle = [digest for digest, resident in self._residents.items() if resident.leases == 0]
        reclaimable = sum(self._residents[digest].placed.device_bytes for digest in idle)
        if self.used_bytes - reclaimable + size_bytes > self.capacity_bytes:
            return False
        while self.used_bytes + size_bytes > self.capacity_bytes:
            self._remove(idle.pop(0))
            self.num_evictions += 1
        return True

    def insert(self, placed: P) -> None:
        """Take over freshly placed weights; room was made before."""
        assert placed.digest not in self._residents, placed.digest
        self._residents[placed.digest] = _Resident(placed)
        self.used_bytes += placed.device_bytes

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
        self.used_bytes -= resident.placed.device_bytes
        return resident.placed.device_bytes
