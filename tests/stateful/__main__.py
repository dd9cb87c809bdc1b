"""The registry against its model for many steps, and its aliases under concurrent clients.

python -m tests.stateful [--steps 100000] [--histories 10000] [--database sqlite|postgresql] [--seed N]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test

from adapters.registry import Registry
from tests import postgres
from tests.stateful.histories import Recorder, is_linearizable
from tests.stateful.machine import RegistryMachine

STEPS = 50
"""Of one example of the state machine."""


def check_model(
    make_url: Callable[[], str], steps: int, *, seed: int | None = None, shrink: bool = True
) -> None:
    """Run the state machine for about so many steps. Raises where the registry and its model differ."""

    class Machine(RegistryMachine):
        pass

    Machine.make_url = staticmethod(make_url)  # type: ignore[assignment]
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine if seed is None else seeded(seed)(Machine),
        settings=settings(
            max_examples=max(1, steps // STEPS),
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def check_histories(url: str, histories: int, *, seed: int = 0) -> int:
    """Record and check so many histories; how many of their calls overlapped. Raises AssertionError."""
    recorder = Recorder(url)
    overlapping = 0
    try:
        for number in range(histories):
            initial, history = recorder.record(seed + number)
            assert is_linearizable(history, initial), f"from {initial}: {history}"
            overlapping += sum(
                any(
                    other.began < call.ended and call.began < other.ended
                    for other in history
                    if other is not call
                )
                for call in history
            )
    finally:
        recorder.close()
    return overlapping


@contextmanager
def databases(kind: str) -> Iterator[Callable[[], str]]:
    """What makes an empty database per call."""
    if kind == "postgresql":
        binaries = postgres.find_binaries()
        assert binaries is not None, "PostgreSQL is not installed (apt-get install postgresql)"
        with postgres.running(binaries) as server:
            Registry(server.make_database("shared")).close()
            yield lambda: server.clear("shared")
        return
    numbers = count()
    with tempfile.TemporaryDirectory() as directory:
        empty = Path(directory) / "empty.db"
        Registry(
            f"sqlite:///{empty}"
        ).close()  # migrated once: that takes longer than an example's fifty steps

        def copied() -> str:
            return f"sqlite:///{shutil.copyfile(empty, empty.with_name(f'{next(numbers)}.db'))}"

        yield copied


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.stateful", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--histories", type=int, default=10_000)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    with databases(given.database) as make_url:
        began = time.monotonic()
        if given.steps:
            check_model(make_url, given.steps, seed=given.seed)
            print(f"{given.steps} steps, 0 divergences ({time.monotonic() - began:.0f} s)")
        began = time.monotonic()
        overlapping = check_histories(make_url(), given.histories, seed=given.seed)
        print(
            f"{given.histories} histories, all linearizable, {overlapping} of {16 * given.histories} calls overlapped "
            f"another ({time.monotonic() - began:.0f} s)"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
