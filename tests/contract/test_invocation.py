"""aLoRA acts from the last invocation in the prompt on: against PEFT, however the tokens are cut into steps."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from peft import PeftModel
from prometheus_client import CollectorRegistry
from torch import Tensor

from adapters.formats import read_directory
from adapters.normal_form import Delta
from adapters.positions import FromInvocation
from serving.config import Engine as EngineSettings
from serving.core import Event, Request, SamplingParams, TokenEvent
from serving.engine.engine import Engine
from serving.engine.runner import Runner
from serving.engine.sequence import ScheduledRow
from serving.engine.sequence import Sequence as EngineSequence
from serving.metrics import EngineMetrics
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.merge import mergeable_modules
from serving.model.placement import place
from tests.cases import PEFT_CASES, case_id, quiet, tiny_backbone

CASE = next(case for case in PEFT_CASES if case_id(case) == "llama-alora")
INVOCATION = [91, 7]
PROMPTS = {
    "in the middle": [5, 17, 3, *INVOCATION, 88, 41, 9],
    "twice": [5, *INVOCATION, 3, 12, *INVOCATION, 88],
    "absent": [5, 17, 3, 91, 8, 7, 88],
    "at the end": [60, 2, 33, 91, 91, *INVOCATION],
    "alone": INVOCATION,
    "half of it at the end": [4, 44, 14, 91],
}


@lru_cache
def trained() -> tuple[PeftModel, Backbone, Delta]:
    directory = Path(mkdtemp())
    adapted = CASE.save(directory)
    backbone = adopt_backbone(tiny_backbone("llama"), name="tiny", device="cpu", dtype="float32")
    return adapted, backbone, read_directory(directory, backbone.spec)


@torch.no_grad()
def peft_outputs(tokens: list[int], prompt: list[int]) -> Tensor:
    """[T, V] of the whole row at once, invoked where PEFT's `generate` finds the invocation in the prompt."""
    at, _ = FromInvocation(tuple(INVOCATION)).span(tuple(prompt))
    offset = len(tokens) - at if at < len(tokens) else None
    with quiet():
        adapted = trained()[0]
        logits: Tensor = adapted(
            input_ids=torch.tensor([tokens]), use_cache=False, alora_offsets=[offset]
        ).logits[0]
    return logits


def step(runner: Runner, seq: EngineSequence, bare: EngineSequence, count: int) -> Tensor:
    """Run `count` tokens of `seq` beside another row; logits [n, V] of the last ones."""
    outputs = runner.run([ScheduledRow(bare, 1), ScheduledRow(seq, count)])
    seq.num_computed += count
    return next(logits for row, logits, _ in outputs if row.seq is seq)


def sequence(name: str, prompt: list[int]) -> EngineSequence:
    request = Request(request_id=name, prompt_token_ids=tuple(prompt), sampling=SamplingParams())
    return EngineSequence(request, list(prompt), None)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 99])
def test_logits_do_not_depend_on_steps_or_preemption(name: str, chunk: int) -> None:
    """Generated tokens spell the invocation, which moves nothing; then all runs again, as after a preemption."""
    _, backbone, delta = trained()
    prompt, generated = PROMPTS[name], [7, 30, *INVOCATION, 12]
    expected = peft_outputs([*prompt, *generated], prompt)
    limit = 2e-5 * max(1.0, float(expected.abs().max()))
    runner = Runner(backbone, num_slots=2, max_len=32)
    seq, bare = sequence("delta", prompt), sequence("bare", [3])
    seq.admit(0, place(delta, "d", backbone))
    bare.admit(1, None)
    while (left := len(prompt) - seq.num_computed) > 0:
        logits = step(runner, seq, bare, min(chunk, left))
    for token in generated:
        assert float((logits[-1] - expected[seq.num_computed - 1]).abs().max()) <= limit
        seq.tokens.append(token)
        logits = step(runner, seq, bare, 1)
    seq.num_computed = 0
    again = step(runner, seq, bare, len(seq.tokens))
    assert float((again[-1] - expected[-1]).abs().max()) <= limit
    assert float((logits[-1] - expected[-1]).abs().max()) <= limit


def test_tokens_before_the_invocation_never_meet_merged_weights() -> None:
    _, backbone, delta = trained()
    assert mergeable_modules(place(delta, "d", backbone), backbone) == []


class Served:
    """An engine that serves the delta under "d"; tokens by request."""

    def __init__(self, budget: int) -> None:
        _, backbone, delta = trained()
        self.events: list[tuple[str, Event]] = []
        self.engine = Engine(
            backbone,
            lambda _: delta,
            self.events.extend,
            metrics=EngineMetrics(CollectorRegistry()),
            settings=EngineSettings(max_num_batched_tokens=budget),
        )

    def submit(self, name: str, prompt: list[int], digest: str | None) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
        request = Request(
            request_id=name, prompt_token_ids=tuple(prompt), sampling=params, adapter_digest=digest
        )
        self.engine.submit(request)

    def finish(self) -> dict[str, list[int]]:
        while self.engine.step() or self.engine._live:
            pass
        found: dict[str, list[int]] = {}
        for name, event in self.events:
            if isinstance(event, TokenEvent):
                found.setdefault(name, []).extend(event.token_ids)
        return found


@pytest.mark.parametrize("budget", [256, 5], ids=["whole prompts", "chunks of 5"])
def test_greedy_tokens_equal_pefts_generate(budget: int) -> None:
    adapted, _, _ = trained()
    expected = {}
    with quiet(), torch.no_grad():
        for name, prompt in PROMPTS.items():
            ids = torch.tensor([prompt])
            out = adapted.generate(
                input_ids=ids,
                max_new_tokens=9,
                min_new_tokens=9,
                do_sample=False,
                attention_mask=torch.ones_like(ids),
            )
            expected[name] = out[0, len(prompt) :].tolist()
    together, alone = Served(budget), {}
    for name in sorted(PROMPTS, key=len):
        together.submit(name, PROMPTS[name], "d")
        together.submit(f"{name}, bare", PROMPTS[name], None)
        single = Served(budget)
        single.submit(name, PROMPTS[name], "d")
        alone |= single.finish()
    mixed = together.finish()
    assert {name: mixed[name] for name in PROMPTS} == expected
    assert alone == expected
    assert mixed["absent"] == mixed["absent, bare"]
    assert sum(mixed[name] != mixed[f"{name}, bare"] for name in PROMPTS) >= 3, "it hardly changes the output"


@pytest.mark.parametrize(
    ("wanted", "tokens", "at"),
    [
        ((1,), (1, 2, 1), 2),
        ((1, 1), (1, 1, 1, 2), 1),
        ((1, 2), (1, 2), 0),
        ((2, 1), (1, 2), None),
    ],
)
def test_the_last_occurrence_counts(wanted: tuple[int, ...], tokens: tuple[int, ...], at: int | None) -> None:
    found, _ = FromInvocation(wanted).span(tokens)
    assert found == at if at is not None else found >= len(tokens)
