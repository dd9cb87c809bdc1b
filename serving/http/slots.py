"""The upload semaphore: so many uploads at once, and one more is refused."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from prometheus_client import Gauge

from adapters.errors import Overloaded


class UploadSlots:
    """Counts uploads in progress, shown by `gauge`. Use from one event loop."""

    def __init__(self, most: int, gauge: Gauge) -> None:
        self._most = most
        self._gauge = gauge
        self._taken = 0

    def take(self) -> Slot:
        """Begin one. Raises Overloaded at once: a body that waits is memory held for a caller who may be slow."""
        if self._taken >= self._most:
            raise Overloaded(f"{self._most} uploads are in progress already.", remedy="Try again shortly.")
        self._count(1)
        return Slot(self)

    def _count(self, change: int) -> None:
        self._taken += change
        self._gauge.set(self._taken)


class Slot:
    """One upload in progress, until it is freed or its block is left."""

    def __init__(self, slots: UploadSlots) -> None:
        self._slots: UploadSlots | None = slots

    def free(self) -> None:
        """End it; again is nothing."""
        if self._slots is not None:
            self._slots._count(-1)
            self._slots = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()
