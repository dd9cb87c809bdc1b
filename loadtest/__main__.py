"""`python -m loadtest COMMAND [options]`; each command's --help says what it measures and how long it takes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "budget": ("loadtest.budget", "one row of the performance budgets, by name"),
    "kernels": ("loadtest.kernels", "compiled kernels against plain torch and the bandwidth floor"),
    "engine": ("loadtest.engine", "tokens/s in process against PEFT's mixed batch; --profile: where a step goes"),
    "residency": ("loadtest.residency", "thousands of deltas over little room, drawn by Zipf"),
    "popularity": ("loadtest.popularity", "S-LoRA's workload: popularity by power law, arrivals in bursts"),
    "starvation": ("loadtest.starvation", "six deltas, room for three: p90 of the latency over its median, by policy"),
    "prefill": ("loadtest.prefill", "prefill tokens/s by chunk size, alone and beside decoding rows"),
    "scale": ("loadtest.scale", "1 to 10,000 registered deltas: resolve, list, generate"),
    "pooling": ("loadtest.pooling", "ten tasks of one encoder against PEFT, one by one and in processes"),
    "soak": ("loadtest.soak", "churn over residency with deltas that sign every token"),
    "isolation": ("loadtest.isolation", "tenants over one server, every token signed, replicas killed"),
    "abuse": ("loadtest.abuse", "one tenant at ten times its share: what the others wait, by policy"),
    "upload": ("loadtest.upload", "streams' gaps while deltas are uploaded, against without"),
    "http": ("loadtest.http", "any OpenAI-compatible server, streaming"),
    "compare": ("loadtest.compare", "result files of `http` side by side, ratios to the first"),
    "report": ("loadtest.page", "one HTML page of tables and plots from result files"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. A command imports only what it needs: `http` none of the server's packages."""
    given = list(sys.argv[1:] if argv is None else argv)
    lines = "\n".join(f"  {name:10} {about}" for name, (_, about) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m loadtest",
        description=f"{__doc__}\n\ncommands:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = parser.parse_args(given[:1]).command
    if (
        command != "http"
    ):  # threads wait as a replica's do, unless the caller says otherwise; read when torch is loaded
        for name, value in import_module("serving.deployments.environment").WAITING_THREADS.items():
            os.environ.setdefault(name, value)
    import_module(COMMANDS[command][0]).main(given[1:])


if __name__ == "__main__":
    main()
