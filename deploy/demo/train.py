"""Train everything the demo ships: tokenizer, backbone, three deltas, and their scores on held-out cases.

    python deploy/demo/train.py

in this project's environment (its `test` extra brings peft). The bottleneck adapter needs AdapterHub's library in an
environment of its own, which the first run makes from PyPI at --adapterhub-venv. Measured: nine minutes of CPU time,
twelve and sixteen minutes by the clock on two cores that other work was using as well. Everything is seeded: two
runs with the same versions on the same machine wrote the same bytes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from backbone import train_backbone, train_tokenizer
from peft_deltas import LORA, PREFIX, load_backbone, train_and_score
from tasks import DATES, SENTIMENT, TASKS, TICKETS, Task, evaluate
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
ADAPTERHUB_REQUIREMENTS = ("torch==2.13.0", "adapters==1.3.0", "transformers==4.57.6")
TOKENIZER_SEED, BACKBONE_SEED, NUM_BACKBONE_STEPS = 11, 21, 1600


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)  # noqa: S603 - an interpreter and a script of ours


def adapterhub_python(venv: Path) -> Path:
    """The interpreter of AdapterHub's environment, made if it is not there."""
    python = venv / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(venv)])
        run([str(python), "-m", "pip", "install", "-q", *ADAPTERHUB_REQUIREMENTS])
    return python


def train_bottleneck(python: Path, backbone: Path, directory: Path, num_threads: int) -> dict[str, Any]:
    """Run bottleneck.py in AdapterHub's environment and return the scores it measured."""
    with tempfile.TemporaryDirectory() as scratch:
        scores = Path(scratch) / "scores.json"
        script = HERE / "bottleneck.py"
        run([str(python), str(script), str(backbone), str(directory), str(scores), str(num_threads)])
        return json.loads(scores.read_text())


def base_accuracy(backbone: Path, tokenizer: PreTrainedTokenizerFast, task: Task) -> float:
    """How often the bare backbone already gives the expected answer."""
    return evaluate(load_backbone(backbone), tokenizer, task)["offline_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where backbone/, deltas/ and heldout.json go")
    parser.add_argument(
        "--adapterhub-venv", type=Path, default=Path(tempfile.gettempdir()) / "deltamux-adapterhub"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()
    started = time.monotonic()
    python = adapterhub_python(args.adapterhub_venv)
    backbone, deltas = args.out / "backbone", args.out / "deltas"
    for directory in (backbone, deltas):
        shutil.rmtree(directory, ignore_errors=True)

    tokenizer = train_tokenizer(backbone, TOKENIZER_SEED)
    loss = train_backbone(backbone, tokenizer, BACKBONE_SEED, NUM_BACKBONE_STEPS)
    print(f"backbone: loss {loss:.3f} after {time.monotonic() - started:.0f} s", flush=True)

    scores = {
        SENTIMENT.delta: train_and_score(backbone, tokenizer, SENTIMENT, LORA, deltas / SENTIMENT.delta),
        TICKETS.delta: train_and_score(backbone, tokenizer, TICKETS, PREFIX, deltas / TICKETS.delta),
        DATES.delta: train_bottleneck(python, backbone, deltas / DATES.delta, args.threads),
    }
    heldout = {}
    for task in TASKS:
        heldout[task.delta] = {
            "method": task.method,
            "model_dir": f"deltas/{task.delta}",
            "max_tokens": task.max_tokens,
            "base_accuracy": base_accuracy(backbone, tokenizer, task),
            **scores[task.delta],
        }
        entry = heldout[task.delta]
        print(
            f"{task.delta}: {entry['offline_correct']}/{len(entry['prompts'])} correct,"
            f" bare backbone {entry['base_accuracy']:.2f}, least margin {entry['least_margin']}"
        )
    (args.out / "heldout.json").write_text(json.dumps({"deltas": heldout}, indent=1) + "\n")
    print(f"done after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
