"""What the scheduler asks of deltas in device memory."""

from __future__ import annotations

from enum import Enum, auto
from typing import Protocol

from serving.engine.sequence import LeasedDelta


class NotYet(Enum):
    """Why a delta can't be leased at present: it is under way, or what is in use leaves no room for it."""

    LOADING = auto()
    CROWDED = auto()


class DeltaLeases(Protocol):
    """Grants leases on deltas in device memory."""

    def try_lease(self, digest: str) -> LeasedDelta | NotYet:
        """The delta, leased; where it isn't there, its load is under way. Raises DeltamuxError when it can't be had."""
        ...

    def end_lease(self, digest: str) -> None:
        """Give a lease back."""
        ...

    def is_resident(self, digest: str) -> bool:
        """Whether a lease could be had at once."""
        ...

    def prefetch(self, digest: str) -> None:
        """Somebody will want this delta soon."""
        ...
