"""The reference library as this process sees it: a job goes to the worker, tensors come back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from adapters.errors import InvalidDelta, Unavailable
from serving.offline.job import RESULT, STAGE, Job, Result

WORKER = "serving.offline.worker"
REMEDY = "Install it: pip install 'deltamux[convert]'."


def is_installed() -> bool:
    """True where PEFT can be run here."""
    return find_spec("peft") is not None


def run_job(job: Job, report: Callable[[str], object]) -> Result:
    """Run `job` in a process of its own; `report` is told what it is doing.

    Raises InvalidDelta with what is wrong with the adapter, Unavailable where PEFT is not installed or crashed.
    """
    if not is_installed():
        raise Unavailable("The reference library, PEFT, is not installed.", param="peft", remedy=REMEDY)
    directory = Path(job.directory)
    file = directory / "job.json"
    file.write_text(json.dumps(asdict(job)))
    command = [sys.executable, "-m", WORKER, str(file)]
    with (
        (directory / "stderr").open("w+") as log,
        subprocess.Popen(  # noqa: S603  our own module
            command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(STAGE):
                report(line.removeprefix(STAGE).strip())
        code = process.wait()
        log.seek(0)
        said = log.read().strip().splitlines()
    answer = directory / RESULT
    if code or not answer.exists():
        raise Unavailable(
            f"The process that runs PEFT ended with {code}: {said[-1] if said else 'it said nothing'}",
            param="peft",
            remedy="Check that the backbone fits into memory, and that PEFT and transformers work together.",
        )
    result = Result(**json.loads(answer.read_text()))
    if result.problems:
        raise InvalidDelta(result.problems, param="adapter", remedy=result.remedy)
    return result
