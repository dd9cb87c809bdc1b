"""Concurrent histories of one alias, and whether one order of their calls explains all results (linearizability).

Herlihy and Wing, "Linearizability: a correctness condition for concurrent objects"; the search is that of Wing and
Gong, "Testing and verifying concurrent objects", with visited states left out.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from adapters.errors import Conflict
from adapters.registry import DEFAULT_TENANT, Registry

State = tuple[int, int]
"""Revision and version of the alias; (0, 0) where it is not set."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call between two readings of one clock. `result`: (revision, version) seen or made; None: Conflict."""

    began: int
    ended: int
    kind: Literal["read", "swap"]
    expected: int
    version: int
    result: State | None

    def after(self, state: State) -> State | None:
        """The state after this call in `state`, None where its result would have been another."""
        if self.kind == "read":
            return state if self.result == state else None
        if state[0] != self.expected:
            return state if self.result is None else None
        made = (state[0] + 1, self.version)
        return made if self.result == made else None


def is_linearizable(history: Sequence[Call], initial: State) -> bool:
    """Whether the calls can be ordered so that each has its result, none before one that ended before it began."""
    visited: set[tuple[frozenset[int], State]] = set()
    pending = [(frozenset(range(len(history))), initial)]
    while pending:
        left, state = pending.pop()
        if not left:
            return True
        if (left, state) in visited:
            continue
        visited.add((left, state))
        first_end = min(history[index].ended for index in left)
        pending += [
            (left - {index}, after)
            for index in left
            if history[index].began <= first_end and (after := history[index].after(state)) is not None
        ]
    return False


class Recorder:
    """Makes histories on one alias of an adapter with several versions."""

    def __init__(self, url: str, *, clients: int = 4, calls: int = 4) -> None:
        self._calls = calls
        self._registries = [Registry(url) for _ in range(clients)]
        self._pool = ThreadPoolExecutor(clients)
        for index in range(3):
            self._registries[0].publish(
                DEFAULT_TENANT, "sql", f"{index:064x}", method="LORA", backbone_digest="", task="causal-lm",
                size_bytes=1, labels={}, proof={},
            )  # fmt: skip

    def close(self) -> None:
        """End the clients."""
        self._pool.shutdown()
        for registry in self._registries:
            registry.close()

    def record(self, seed: int) -> tuple[State, list[Call]]:
        """The alias's state before, and what the clients did and saw, all at once."""
        initial = self._read(self._registries[0])
        start = threading.Barrier(len(self._registries))

        def client(index: int) -> list[Call]:
            chooser, registry, made, seen = (
                random.Random(f"{seed}:{index}"),
                self._registries[index],
                [],
                initial[0],
            )
            start.wait()
            for _ in range(self._calls):
                kind: Literal["read", "swap"] = chooser.choice(("read", "swap", "swap"))
                expected, version = max(0, seen + chooser.choice((0, 0, 0, 1, -1))), chooser.randint(1, 3)
                began = time.monotonic_ns()
                result = self._read(registry) if kind == "read" else self._swap(registry, expected, version)
                made.append(Call(began, time.monotonic_ns(), kind, expected, version, result))
                seen = result[0] if result else self._read(registry)[0]
            return made

        return initial, [
            call for calls in self._pool.map(client, range(len(self._registries))) for call in calls
        ]

    @staticmethod
    def _read(registry: Registry) -> State:
        aliases = registry.get_adapter(DEFAULT_TENANT, "sql").aliases
        return next(((alias.revision, alias.version) for alias in aliases if alias.alias == "prod"), (0, 0))

    @staticmethod
    def _swap(registry: Registry, expected: int, version: int) -> State | None:
        try:
            moved = registry.set_alias(DEFAULT_TENANT, "sql", "prod", version, expected_revision=expected)
        except Conflict:
            return None
        return moved.revision, moved.version
