"""Several servers side by side, from result files that `http` wrote with --server; the first file is what others are
compared with.

  python -m loadtest compare ours.json vllm.json llama.json --json servers.json

The servers ran one after another on the same machine: a ratio is that of the medians, and its minimum and maximum are
what the extremes of both sides allow. `first / other` above 1 is ahead in tokens/s and behind in milliseconds. The
result file goes into `report` like any other. Takes a second.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtest.report import Record, Spread, publish

FIGURES = ("tok/s", "TTFT p50 ms")
MACHINE = ("cpu", "cores", "gpu")


def main(argv: Sequence[str]) -> None:
    """Print and write the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, help="result files, one a server")
    parser.add_argument(
        "--figures", nargs="+", default=FIGURES, help=f"which (default: {', '.join(FIGURES)})"
    )
    parser.add_argument("--json", type=Path, help="write the figures, machine and versions here")
    args = parser.parse_args(argv)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in args.results]
    machines = {tuple(result["environment"][name] for name in MACHINE) for result in results}
    if len(machines) > 1:
        parser.error(f"the files are of different machines: {sorted(map(str, machines))}")
    servers = {
        _server(result, path): _spreads(result) for path, result in zip(args.results, results, strict=True)
    }
    if len(servers) < len(results):
        parser.error("two files have the same server's name")
    title = f"side by side: {', '.join(servers)}"
    publish(title, shlex.join(["compare", *argv]), compare(servers, args.figures), args.json)


def compare(
    servers: Mapping[str, Mapping[str, Mapping[str, Spread]]], figures: Sequence[str]
) -> list[Record]:
    """A record for each case of the first server: each figure of each server that has it, and first / other.

    `servers`: name -> case -> figure -> spread.
    """
    first, cases = next(iter(servers.items()))
    records = []
    for case, ours in cases.items():
        values: dict[str, Spread] = {}
        for figure in figures:
            having = {
                name: found[case][figure] for name, found in servers.items() if figure in found.get(case, {})
            }
            values |= {f"{name} {figure}": spread for name, spread in having.items()}
            values |= {
                f"{first} / {name} {figure}": _ratio(ours[figure], spread)
                for name, spread in having.items()
                if name != first and figure in ours
            }
        records.append(Record(case, values))
    return records


def _ratio(above: Spread, below: Spread) -> Spread:
    return Spread(above.median / below.median, above.low / below.high, above.high / below.low)


def _server(result: Mapping[str, Any], path: Path) -> str:
    return str(result["records"][0]["facts"].get("server", path.stem))


def _spreads(result: Mapping[str, Any]) -> dict[str, dict[str, Spread]]:
    return {
        record["label"]: {name: Spread(**spread) for name, spread in record["values"].items()}
        for record in result["records"]
    }
