"""The engine against the reference library: the same tokens, teacher-forced, every position's logits compared.

The reference runs each prompt and a few greedy tokens without a cache; the engine prefills the prompt and decodes
those tokens one by one. Where its most likely token is the reference's at every position, its own greedy text would
be the same. Ties are no errors: positions where the reference's two best logits are within MARGIN of its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from adapters.canonical import from_canonical, to_canonical
from adapters.errors import BackboneRefused, InvalidRequest
from adapters.formats import read_directory
from adapters.normal_form import Delta, Rows
from adapters.parity import MAX_PROBES, ParityProbe, ParityRecord
from adapters.tasks import Task
from serving.core import Request, SamplingParams
from serving.engine.runner import Runner
from serving.engine.sequence import ScheduledRow
from serving.engine.sequence import Sequence as EngineSequence
from serving.model.backbone import Backbone, load_backbone
from serving.model.placement import place
from serving.offline.job import LOGITS, Job, Result
from serving.offline.reference import run_job

LENGTHS = (1, 6, 17, 40)
"""Tokens of the random prompts."""

NEW_TOKENS = 8
MARGIN = 2e-3

CANONICAL, ADAPTERHUB = "manifest.json", "adapter.safetensors"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to compare on, and where they are from."""

    source: Literal["random", "file"]
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The record, and per probe the greedy tokens of the reference and of the engine."""

    record: ParityRecord
    expected: list[list[int]]
    got: list[list[int]]


def load(backbone: str) -> Backbone:
    """The backbone as the engine runs it, on the CPU and in fp32, as the reference does. Raises BackboneRefused."""
    loaded = load_backbone(backbone, device="cpu", dtype="float32")
    if loaded.spec.kind == "encoder-decoder":
        raise BackboneRefused(
            f"{loaded.spec.name} is an encoder-decoder: its adapters are not converted or verified yet.",
            param="backbone",
            remedy="Upload the adapter as it is: the server's reader and admission probe check it.",
        )
    return loaded


def verify(
    directory: Path,
    backbone_path: str,
    *,
    reference: Path | None = None,
    prompts_file: Path | None = None,
    report: Callable[[str], object] = lambda _: None,
) -> tuple[Comparison, Backbone]:
    """Compare the delta in `directory` with what PEFT computes from `reference` (the same directory without one).

    Raises InvalidDelta for a delta that can't be read or loaded, InvalidRequest where there is no reference for it,
    BackboneRefused, Unavailable.
    """
    source = reference or directory
    if any((source / name).exists() for name in (CANONICAL, ADAPTERHUB)):
        raise InvalidRequest(
            f"{source}: PEFT can't load this format, so there is nothing to compare with.",
            param="reference",
            remedy="If it was converted, name the directory that PEFT saved with --reference.",
        )
    report("loading the backbone")
    backbone = load(backbone_path)
    delta = read_directory(directory, backbone.spec, backbone_digest=backbone.spec.digest)
    require_generating(delta)
    prompts = random_prompts(backbone, delta)
    if prompts_file is not None:
        prompts += prompts_of(prompts_file, backbone)
    with TemporaryDirectory() as scratch:
        job = Job(
            str(source), scratch, backbone_path, prompts=[p.ids for p in prompts], new_tokens=NEW_TOKENS
        )
        result = run_job(job, report)
        report("the engine runs the same prompts")
        return compare(backbone, delta, prompts, result, Path(scratch)), backbone


def require_generating(delta: Delta) -> None:
    """Raises InvalidRequest for a delta with a task head: logits are compared."""
    if delta.task != Task.CAUSAL_LM:
        raise InvalidRequest(
            f"The delta is for {delta.task}: only deltas of language models are compared with PEFT.",
            param="DIR",
            remedy="Upload it as it is.",
        )


def random_prompts(backbone: Backbone, delta: Delta | None = None) -> list[Prompt]:
    """Seeded random prompts, with the tokens in them whose rows `delta` replaces."""
    spec, draw = backbone.spec, torch.Generator().manual_seed(0)
    room = spec.max_positions - NEW_TOKENS - (delta.num_virtual_tokens if delta else 0)
    replaced = [op.ids for op in delta.ops if isinstance(op, Rows)] if delta else []
    prompts = []
    for length in (min(length, room) for length in LENGTHS):
        ids = torch.randint(0, spec.vocab_size, (length,), generator=draw)
        for rows in replaced:
            ids[::2] = rows.long()[torch.arange(len(ids[::2])) % len(rows)]
        prompts.append(Prompt("random", ids.tolist()))
    return prompts


def prompts_of(file: Path, backbone: Backbone) -> list[Prompt]:
    """One prompt a line. Raises InvalidRequest for a file that can't be read, and for too many or too long lines."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{file}: {error}", param="prompts") from None
    most = MAX_PROBES - len(LENGTHS)
    if backbone.tokenizer is None or len(lines) > most:
        raise InvalidRequest(
            f"{file}: {len(lines)} prompts; expected at most {most}, and a backbone with a tokenizer.",
            param="prompts",
        )
    prompts = [Prompt("file", list(backbone.tokenizer(line)["input_ids"])) for line in lines]
    limit = backbone.spec.max_positions - NEW_TOKENS
    for number, prompt in enumerate(prompts, start=1):
        if not 1 <= len(prompt.ids) <= limit:
            raise InvalidRequest(
                f"{file}: prompt {number} has {len(prompt.ids)} tokens, expected 1 to {limit}.",
                param="prompts",
            )
    return prompts


def compare(
    backbone: Backbone, delta: Delta, prompts: Sequence[Prompt], result: Result, answer: Path
) -> Comparison:
    """The engine's numbers for `result.sequences` against the reference's logits, which are in the folder `answer`."""
    stored = to_canonical(delta)
    served = from_canonical(stored.manifest, stored.tensors)
    placed = place(served, stored.digest, backbone)
    longest = max(map(len, result.sequences))
    runner = Runner(backbone, num_slots=1, max_len=placed.prefix_len + longest)
    references = load_file(answer / LOGITS)
    probes, expected, got = [], [], []
    for index, (prompt, tokens) in enumerate(zip(prompts, result.sequences, strict=True)):
        reference, start = references[str(index)], len(prompt.ids)
        request = Request(
            request_id=str(index),
            prompt_token_ids=tuple(tokens),
            sampling=SamplingParams(prompt_logprobs=0),  # logits of every token are wanted
            adapter_digest=stored.digest,
        )
        sequence = EngineSequence(
            request, list(tokens), state=None, slot=0, delta=placed, max_len=len(tokens)
        )
        ours = forced_logits(runner, sequence, start)
        scale = float(reference.abs().max())
        choices = ours.argmax(dim=-1)
        best = reference.topk(2).values
        decided = (best[:, 0] - best[:, 1]) > MARGIN * max(1.0, scale)
        probes.append(
            ParityProbe(
                source=prompt.source,
                prompt_tokens=start,
                new_tokens=len(tokens) - start,
                error=float((ours - reference).abs().max()) / max(1.0, scale),
                scale=scale,
                greedy_equal=bool((choices == reference.argmax(dim=-1))[decided].all()),
            )
        )
        expected.append(tokens[start:])
        got.append(choices[start - 1 : -1].tolist())
    record = ParityRecord(
        library="peft",
        library_version=result.library_version,
        torch=result.torch,
        delta_digest=stored.digest,
        backbone_digest=backbone.spec.digest,
        probes=tuple(probes),
    )
    return Comparison(record, expected, got)


def forced_logits(runner: Runner, sequence: EngineSequence, num_prefill: int) -> Tensor:
    """Logits [T, V] of all tokens of `sequence`: the first `num_prefill` in one step, the others one by one."""
    found = []
    for count in (num_prefill, *([1] * (len(sequence.tokens) - num_prefill))):
        ((_, logits, _),) = runner.run([ScheduledRow(sequence, count)])
        found.append(logits)
        sequence.num_computed += count
    return torch.cat(found)
