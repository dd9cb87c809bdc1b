"""Tables and JSON of a benchmark: every figure with its median and spread, the machine and the command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

T = TypeVar("T")

MIN_ROUNDS = 5
"""A published figure is the median of at least so many rounds; fewer are for trying a command out."""

MAX_TRANSPOSED = 2
"""So many records stand in columns, so that their many figures fit."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def ratio(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """The spread of the ratios, each within one round."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    def text(self) -> str:
        """`median (low-high)`, three digits each; the median alone where there is no spread."""
        if self.low == self.high:
            return _digits(self.median)
        return f"{_digits(self.median)} ({_digits(self.low)}-{_digits(self.high)})"


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a table: what was measured, its figures by name (the unit in the name), and plain facts."""

    label: str
    values: Mapping[str, Spread]
    facts: Mapping[str, Any] = field(default_factory=dict)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of `values` do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(percent * 10) // 1000) - 1)]


def alternate(cases: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each case returns, round by round, after one unmeasured round.

    Each round runs all cases in turn, so that ratios compare neighbours in time.
    """
    for run in cases.values():
        run()
    found: dict[str, list[T]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, run in cases.items():
            found[case].append(run())
    return found


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def make_parser(command: str, doc: str | None, *, rounds: int = MIN_ROUNDS) -> argparse.ArgumentParser:
    """The options that every benchmark has, and its module's docstring for help."""
    parser = argparse.ArgumentParser(
        prog=f"python -m loadtest {command}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds to measure (default {rounds})")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="compute threads (default: all cores)"
    )
    parser.add_argument("--json", type=Path, help="write the figures, machine and versions here")
    return parser


def environment(command: str) -> dict[str, Any]:
    """Machine, versions and command, as every result file states them."""
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "command": f"python -m loadtest {command}",
    }


def publish(title: str, command: str, records: Sequence[Record], path: Path | None) -> None:
    """Print one table, a line a record or, where they are few, a column; write all of it to `path`, where given."""
    lines = [
        {name: spread.text() for name, spread in record.values.items()}
        | {name: _fact(fact) for name, fact in record.facts.items()}
        for record in records
    ]
    names = list(dict.fromkeys(name for line in lines for name in line))
    table = Table(title=title)
    if len(records) <= MAX_TRANSPOSED:
        for column in ("figure", *(record.label for record in records)):
            table.add_column(column)
        for name in names:
            table.add_row(name, *(line.get(name, "") for line in lines))
    else:
        table.add_column("case")
        for name in names:
            table.add_column(name, justify="right")
        for record, line in zip(records, lines, strict=True):
            table.add_row(record.label, *(line.get(name, "") for name in names))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "title": title,
            "environment": environment(command),
            "records": [asdict(record) for record in records],
        }
        path.write_text(json.dumps(result, indent=1) + "\n")


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return _digits(value)
    return str(value)


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
