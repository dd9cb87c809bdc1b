"""Requests that wait for a place in the batch: what every policy gives, and the policy of plain arrival."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Protocol

from serving.engine.sequence import Sequence

LOOK_AHEAD = 16
"""Requests that one step looks at without admitting them: its cost does not grow with the queue."""


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
