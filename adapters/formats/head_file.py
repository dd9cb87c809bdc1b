"""What an uploader says of a task head beside the library's files: `head.json`, and `ood.safetensors`.

Formats. head.json: an object of any of `task` (PEFT's config may leave it open), `labels` (a list of names, or an
object of indices to names as in transformers' `id2label`), `problem_type` (`single_label`, `multi_label` or
`regression`, or transformers' longer words), `pooling`, `normalize`, `pad_token_id`: see `adapters.tasks`; or of a
`cloze`, an object of `patterns`, `verbalizer` (label -> its words) and maybe `weights`: see `adapters.cloze`. Beside a
cloze there is no other head; `labels` then says no more than their order.
ood.safetensors: `class_means` [C, d] and `precision` [d, d] of what the head reads, as `deltamux adapters fit-ood`
writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from adapters.cloze import MAX_PATTERNS, MAX_WORDS, Cloze
from adapters.formats.problems import Problems, quoted
from adapters.head_checks import MAX_LABEL_CHARS, MAX_LABELS
from adapters.normal_form import SCORES, Delta, Head
from adapters.tasks import HeadSpec, Pooling, ProblemType, Task

HEAD_FILE, STATISTICS_FILE = "head.json", "ood.safetensors"

_Name = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)]
_PROBLEM_TYPES: Mapping[str, ProblemType] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
}
_STATISTICS = frozenset({"class_means", "precision"})


class ClozeFile(BaseModel):
    """What head.json says of a cloze; its content is checked with the delta."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    patterns: list[str] = Field(max_length=MAX_PATTERNS)
    verbalizer: dict[_Name, Annotated[list[str], Field(max_length=MAX_WORDS)]] = Field(max_length=MAX_LABELS)
    weights: list[int | float] | None = None


class HeadFile(BaseModel):
    """The checked content of head.json; None where it says nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    task: Annotated[Task | None, Field(strict=False)] = None
    labels: list[_Name] | dict[str, _Name] | None = Field(default=None, max_length=MAX_LABELS)
    problem_type: (
        ProblemType | Literal["single_label_classification", "multi_label_classification"] | None
    ) = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    pad_token_id: int | None = Field(default=None, ge=0)
    cloze: ClozeFile | None = None

    @property
    def problem_kind(self) -> ProblemType | None:
        """`problem_type` in our own word."""
        said = self.problem_type
        return None if said is None else _PROBLEM_TYPES.get(said, said)  # type: ignore[arg-type]

    def label_names(self, problems: Problems) -> tuple[str, ...]:
        """The labels in their order; empty, with the problem noted, where the indices have gaps."""
        if not isinstance(self.labels, dict):
            return tuple(self.labels or ())
        indices = [str(index) for index in range(len(self.labels))]
        if set(self.labels) != set(indices):
            problems.add(
                f"{HEAD_FILE}: labels: expected the indices 0 to {len(indices) - 1}, each once.",
                param="labels",
            )
            return ()
        return tuple(self.labels[index] for index in indices)


def read_head_file(raw: Mapping[str, Any], problems: Problems) -> HeadFile | None:
    """The content of head.json, None, with every problem noted, where it is not what it should be."""
    try:
        return HeadFile.model_validate(dict(raw))
    except ValidationError as error:
        for found in error.errors(include_input=False, include_url=False):
            where = ".".join(
                str(part) for part in found["loc"] if not str(part).startswith(("list[", "dict["))
            )
            problems.add(f"{HEAD_FILE}: {quoted(where)[1:-1]}: {found['msg']}.", param=HEAD_FILE)
        return None


def with_head_file(delta: Delta, said: HeadFile, problems: Problems) -> Delta:
    """`delta` with its head read as the uploader says; what does not fit is left to validation or noted."""
    labels = said.label_names(problems)
    if said.cloze is not None:
        return _with_cloze(delta, said, said.cloze, labels, problems)
    if delta.head is None:
        if not problems.texts:  # one that can't be read is not said to be missing
            problems.add(f"{HEAD_FILE}: the adapter has no task head ({delta.task}).", param=HEAD_FILE)
        return delta
    if said.task is not None and said.task != delta.task:
        problems.add(
            f"{HEAD_FILE}: task: {said.task.value}, but the adapter itself says {delta.task}.", param="task"
        )
    changes: dict[str, Any] = {
        name: value
        for name in ("pooling", "normalize", "pad_token_id")
        if (value := getattr(said, name)) is not None
    }
    if said.problem_type is not None:
        changes["problem_type"] = said.problem_kind
    if labels:
        changes["labels"] = labels
    return replace(delta, head=replace(delta.head, **changes))


def _with_cloze(
    delta: Delta, said: HeadFile, cloze: ClozeFile, labels: tuple[str, ...], problems: Problems
) -> Delta:
    if delta.head_stages:
        problems.add(f"{HEAD_FILE}: cloze: the adapter has a {delta.task} head of its own.", param="cloze")
        return delta
    task = Task.SEQUENCE_CLASSIFICATION
    if said.task not in (None, task):
        problems.add(f"{HEAD_FILE}: task: {said.task}, but a cloze is for {task.value}.", param="task")
    for name in ("pooling", "normalize", "pad_token_id"):
        if getattr(said, name) is not None:
            problems.add(f"{HEAD_FILE}: {name}: a cloze reads what stands at its mask.", param=name)
    names = labels or tuple(cloze.verbalizer)
    if set(names) != set(cloze.verbalizer):
        odd = sorted(set(names) ^ set(cloze.verbalizer))
        problems.add(
            f"{HEAD_FILE}: cloze: verbalizer: its labels and those of `labels` differ in {quoted(odd[0])}.",
            param="cloze",
        )
    found = Cloze(
        patterns=tuple(cloze.patterns),
        words=tuple(tuple(cloze.verbalizer.get(name, ())) for name in names),
        weights=tuple(float(weight) for weight in cloze.weights or ()),
    )
    head = HeadSpec(
        pooling="mask", labels=names, problem_type=said.problem_kind or "single_label", cloze=found
    )
    return replace(delta, task=task.value, head=head)


def with_statistics(delta: Delta, tensors: Mapping[str, Tensor], problems: Problems) -> Delta:
    """`delta` with the class statistics of its head's input."""
    for key in sorted(tensors.keys() - _STATISTICS):
        problems.add(
            f"{STATISTICS_FILE}: {quoted(key)} is not known; expected {', '.join(sorted(_STATISTICS))}."
        )
    stages = delta.head_stages
    if not stages and delta.head is not None and delta.head.cloze is not None:
        stages = (Head(site=SCORES),)
        delta = replace(delta, ops=(*delta.ops, *stages))
    if not stages or "class_means" not in tensors:
        why = "it has no class_means" if stages else "the adapter has no head to read them"
        problems.add(f"{STATISTICS_FILE}: {why}.", param=STATISTICS_FILE)
        return delta
    first = replace(stages[0], class_means=tensors["class_means"], precision=tensors.get("precision"))
    at = next(i for i, op in enumerate(delta.ops) if isinstance(op, Head) and op.site == SCORES)
    return replace(delta, ops=(*delta.ops[:at], first, *delta.ops[at + 1 :]))
