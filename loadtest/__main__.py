"""`python -m loadtest engine [options]`: see each benchmark's own help."""

from __future__ import annotations

import argparse
from pathlib import Path

from loadtest import engine
from loadtest.backbones import SIZES


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    run = commands.add_parser(
        "engine", help="tokens/s in process, bare and with distinct LoRAs, against PEFT"
    )
    run.add_argument("--size", choices=sorted(SIZES), default="60m")
    run.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    run.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    run.add_argument("--output-tokens", type=int, default=64)
    run.add_argument("--rounds", type=int, default=5)
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--json", type=Path, help="write the figures, machine and versions here")
    args = parser.parse_args()
    engine.run(
        size=args.size,
        dtype=args.dtype,
        row_counts=args.rows,
        output_tokens=args.output_tokens,
        rounds=args.rounds,
        threads=args.threads,
        json_path=args.json,
    )


if __name__ == "__main__":
    main()
