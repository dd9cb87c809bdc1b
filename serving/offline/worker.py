"""The process that runs the reference library: `python -m serving.offline.worker JOB`, JOB a JSON file of `Job`.

It answers in files of the job's directory: `result.json` always, `adapter/` where something was unpickled,
`logits.safetensors`, `changes.safetensors`. Lines on stdout that begin with STAGE say what it is doing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from adapters.errors import InvalidDelta
from serving.offline import peft_source
from serving.offline.job import CHANGES, LOGITS, RESULT, STAGE, UNPICKLED, Job, Result


def run(job: Job) -> Result:
    """Do `job`. Raises InvalidDelta."""
    directory, source = Path(job.directory), Path(job.source)
    result = Result(torch=torch.__version__, library_version=peft_source.VERSION)
    if job.unpickle:
        (directory / UNPICKLED).mkdir()
        peft_source.unpickle(source, directory / UNPICKLED)
    if not job.backbone:
        return result
    _stage("loading the backbone and the adapter with PEFT")
    model = AutoModelForCausalLM.from_pretrained(
        job.backbone, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    adapted, result.notes = peft_source.load_adapter(model, source)
    result.method = peft_source.method_of(adapted)
    logits = {}
    for index, prompt in enumerate(job.prompts):
        _stage(f"PEFT runs prompt {index + 1} of {len(job.prompts)}")
        sequence, logits[str(index)] = peft_source.greedy(adapted, prompt, job.new_tokens)
        result.sequences.append(sequence)
    save_file(logits, directory / LOGITS)
    if job.probe:
        pristine = AutoModelForCausalLM.from_pretrained(job.backbone, dtype="auto")
        changes = peft_source.changes_of(
            adapted, pristine, quota_bytes=job.quota_bytes, on_module=lambda path: _stage(f"probing {path}")
        )
        save_file(
            {f"{path}:{name}": t for path, change in changes.items() for name, t in change.tensors().items()},
            directory / CHANGES,
        )
    return result


def _stage(text: str) -> None:
    print(STAGE + text, flush=True)


def main() -> None:
    """The process."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        result = run(job)
    except InvalidDelta as error:
        result = Result(problems=list(error.problems), remedy=error.remedy)
    (Path(job.directory) / RESULT).write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
