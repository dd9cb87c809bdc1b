"""The demo's held-out set: sending all of it at once, and comparing what comes back with the offline scores."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from serving.cli.client import body_of

BASE = ""
"""The model of a result that came from the bare backbone."""

MAX_BASE_ACCURACY = 0.3
"""Above this the bare backbone could do the task itself, and the demo would show nothing."""

_SHUFFLE_SEED = 7


@dataclass(frozen=True, slots=True)
class HeldoutPrompt:
    """One case. `reference`: what the reference library gave for it."""

    prompt: str
    expected: str
    reference: str


@dataclass(frozen=True, slots=True)
class Task:
    """One delta, its cases and how it did offline."""

    delta: str
    method: str
    library: str
    max_tokens: int
    offline_correct: int
    prompts: tuple[HeldoutPrompt, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """One answer of the server. `model`: the delta, or BASE."""

    task: Task
    model: str
    prompt: HeldoutPrompt
    text: str

    @property
    def is_correct(self) -> bool:
        """Exact match after stripping, as offline."""
        return self.text.strip() == self.prompt.expected


@dataclass(frozen=True, slots=True)
class Batch:
    """All results, in the order of the tasks, and how long all of them took together."""

    results: list[Result]
    duration_s: float


@dataclass(frozen=True, slots=True)
class Score:
    """How one delta did on this server. `num_identical`: texts equal to the reference library's."""

    task: Task
    served_correct: int
    base_correct: int
    num_identical: int

    @property
    def is_equal(self) -> bool:
        """Whether the delta reaches its offline accuracy here."""
        return self.served_correct == self.task.offline_correct

    @property
    def passes(self) -> bool:
        """Whether it is equal and the bare backbone alone could not have done it."""
        return self.is_equal and self.base_correct < MAX_BASE_ACCURACY * len(self.task.prompts)


def read_tasks(data: Mapping[str, Any]) -> list[Task]:
    """The tasks in `heldout.json`."""
    return [
        Task(
            delta=name,
            method=entry["method"],
            library=entry["library"],
            max_tokens=entry["max_tokens"],
            offline_correct=entry["offline_correct"],
            prompts=tuple(
                HeldoutPrompt(p["prompt"], p["expected"], p["reference"]) for p in entry["prompts"]
            ),
        )
        for name, entry in data["deltas"].items()
    ]


def run(url: str, tasks: Sequence[Task], backbone: str, *, on_result: Callable[[], object]) -> Batch:
    """Send every prompt twice, to its delta and to `backbone`, all in flight together in a shuffled order.

    Raises DeltamuxError with what the server says where it refuses one.
    """
    cases = [
        (task, model, prompt) for task in tasks for prompt in task.prompts for model in (task.delta, BASE)
    ]

    async def send_all() -> list[Result]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=600.0) as http:

            async def send(task: Task, model: str, prompt: HeldoutPrompt) -> Result:
                body = {
                    "model": model or backbone,
                    "prompt": prompt.prompt,
                    "max_tokens": task.max_tokens,
                    "temperature": 0,
                }
                answer = body_of(await http.post("/v1/completions", json=body))
                on_result()
                return Result(task, model, prompt, answer["choices"][0]["text"])

            shuffled = random.Random(_SHUFFLE_SEED).sample(range(len(cases)), len(cases))  # noqa: S311
            done = await asyncio.gather(*(send(*cases[place]) for place in shuffled))
        return [result for _, result in sorted(zip(shuffled, done, strict=True), key=lambda pair: pair[0])]

    started = time.monotonic()
    results = asyncio.run(send_all())
    return Batch(results, time.monotonic() - started)


def scores(tasks: Sequence[Task], results: Sequence[Result]) -> list[Score]:
    """One score per task."""
    found = []
    for task in tasks:
        served = [result for result in results if result.task is task and result.model != BASE]
        bare = [result for result in results if result.task is task and result.model == BASE]
        found.append(
            Score(
                task=task,
                served_correct=sum(result.is_correct for result in served),
                base_correct=sum(result.is_correct for result in bare),
                num_identical=sum(result.text == result.prompt.reference for result in served),
            )
        )
    return found
