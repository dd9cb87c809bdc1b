"""Requests that wait for a place in the batch: what every policy gives, and the policy of plain arrival."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Protocol

from serving.engine.sequence import Sequence

LOOK_AHEAD = 16
"""Requests that one step looks at without admitting them: its cost does not grow with the queue."""


RATE_MEMORY_S = 60.0
"""Over how many seconds, in which requests waited, the rate of their admission is counted."""

LEAST_ADMITTED = 8.0
"""Admissions in that time below which the rate is not known."""


class AdmissionRate:
    """How many waiting requests are admitted in a second, so how long a new one will wait.

    Only time in which requests wait counts, so a pause is not taken for slowness; older time counts less and less.
    """

    def __init__(self) -> None:
        self._waited_s = 0.0
        self._admitted = 0.0
        self._waiting_since_s: float | None = None

    def note(self, now_s: float, num_admitted: int, num_waiting: int) -> None:
        """One step has admitted so many and left so many."""
        if self._waiting_since_s is not None:
            passed_s = now_s - self._waiting_since_s
            kept = math.exp(-passed_s / RATE_MEMORY_S)
            self._waited_s = self._waited_s * kept + passed_s
            self._admitted = self._admitted * kept + num_admitted
        self._waiting_since_s = now_s if num_waiting else None

    def wait_s(self, num_ahead: float) -> float:
        """Seconds until `num_ahead` waiting requests are admitted; 0 while the rate is not known."""
        if self._admitted < LEAST_ADMITTED:
            return 0.0
        return num_ahead * self._waited_s / self._admitted


class Batch(Protocol):
    """The running requests, and how many more there could be."""

    running: list[Sequence]

    @property
    def num_free(self) -> int:
        """Free places."""
        ...


class WaitingQueue(Protocol):
    """An order among waiting requests."""

    def __len__(self) -> int: ...

    def __contains__(self, seq: Sequence) -> bool: ...

    def add(self, seq: Sequence) -> None:
        """Take in a new request."""
        ...

    def num_ahead(self, seq: Sequence) -> float:
        """About how many of those that wait will be admitted before `seq`, which is not among them yet."""
        ...

    def put_back(self, seq: Sequence) -> None:
        """Take back a request that ran already, before those that did not."""
        ...

    def remove(self, seq: Sequence) -> None:
        """Let go of a request that is admitted or ended."""
        ...

    def candidates(self, now_s: float, batch: Batch | None = None) -> Iterator[Sequence]:
        """Whom to admit next, each request once; the caller may remove what it was given, and charge, meanwhile.

        `batch`: what runs, as it is at each moment; without one there is room for everybody.
        """
        ...

    def charge(self, seq: Sequence, cost: float) -> None:
        """Count service that `seq` gets, waiting or running."""
        ...

    def should_yield(self, running: Sequence, to: Sequence) -> bool:
        """Whether `running` should give up its place to a waiting request."""
        ...

    def expired(self, arrived_before_s: float) -> list[Sequence]:
        """Requests that came before then and never ran."""
        ...


class FirstComeQueue:
    """In order of arrival, whoever asks."""

    def __init__(self) -> None:
        self._line: OrderedDict[Sequence, None] = OrderedDict()
        self._returned: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._line)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._line

    def add(self, seq: Sequence) -> None:
        """See `WaitingQueue`."""
        self._line[seq] = None

    def num_ahead(self, seq: Sequence) -> float:  # noqa: ARG002
        """See `WaitingQueue`."""
        return float(len(self._line))

    def put_back(self, seq: Sequence) -> None:
        """See `WaitingQueue`."""
        self._line[seq] = None
        self._line.move_to_end(seq, last=False)
        self._returned.add(seq)

    def remove(self, seq: Sequence) -> None:
        """See `WaitingQueue`."""
        del self._line[seq]
        self._returned.discard(seq)

    def candidates(self, now_s: float, batch: Batch | None = None) -> Iterator[Sequence]:  # noqa: ARG002  (the protocol's)
        """See `WaitingQueue`."""
        passed = 0
        while passed < LOOK_AHEAD and (seq := next(islice(self._line, passed, None), None)) is not None:
            yield seq
            passed += seq in self._line

    def charge(self, seq: Sequence, cost: float) -> None:
        """See `WaitingQueue`. Nobody is charged here."""

    def should_yield(self, running: Sequence, to: Sequence) -> bool:  # noqa: ARG002
        """See `WaitingQueue`. Nobody yields here."""
        return False

    def expired(self, arrived_before_s: float) -> list[Sequence]:
        """See `WaitingQueue`."""
        found = []
        for seq in self._line:
            if seq in self._returned:
                continue
            if seq.arrival_s >= arrived_before_s:
                break
            found.append(seq)
        return found
