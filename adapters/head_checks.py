"""Checking a delta's task, and the task head that belongs to it: its stages one after the other, and what they mean.

Fields may hold anything (the canonical manifest is user input too), so types are checked before they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from torch import Tensor

from adapters.backbone_spec import MASKED_HEAD_SITES, BackboneSpec
from adapters.cloze import Cloze, cloze_problems
from adapters.normal_form import Affine, Delta, Head, LinearMap, LowRank, Op, Rows, Site, WeightDelta
from adapters.op_checks import ACTIVATIONS, OpChecker
from adapters.tasks import LABELLED, PER_TOKEN, HeadSpec, Pooling, ProblemType, Task

TASKS: tuple[str, ...] = tuple(task.value for task in Task)
POOLINGS: tuple[str, ...] = get_args(Pooling)
PROBLEM_TYPES: tuple[str, ...] = get_args(ProblemType)

MAX_STAGES = 8
MAX_LABELS = 10_000
MAX_LABEL_CHARS = 256
SPAN_SCORES = 2
"""Scores of a token in extractive question answering: to begin the answer, and to end it."""


def check_task(delta: Delta, checker: OpChecker) -> None:
    """Note what is wrong with the task of `delta` and with its head."""
    if delta.task not in TASKS:
        checker.add(f"task: not served yet; expected {', '.join(TASKS)}.")
        return
    task, stages = Task(delta.task), delta.head_stages
    if task is not Task.CAUSAL_LM and checker.spec.kind == "encoder-decoder":
        checker.add(f"task: {task.value} is not served on an encoder-decoder.")
    if task is Task.CAUSAL_LM:
        if delta.head is not None or stages:
            checker.add(f"task: a {task.value} delta has no task head.")
        return
    if not isinstance(delta.head, HeadSpec):
        checker.add(f"head: a {task.value} delta says how its head is read.")
        return
    masked = delta.head.cloze is not None or task is Task.EMBEDDING  # which are asked to fill masks, too
    if not (masked and checker.spec.kind == "encoder") and any(map(_changes_language_model, delta.ops)):
        checker.add(
            f"the language model head is never run for {task.value}, so replacing it changes nothing."
        )
    if delta.head.base_head is True and _changes_own_head(delta, checker.spec):
        checker.add(
            "base_head: the adapter also changes the backbone's own head, which is not served beside a head of its "
            "own. Train with modules_to_save naming the head."
        )
    check_stages = _check_stages if delta.head.cloze is None else _check_statistics_alone
    width = check_stages(stages, checker)
    checker.where = "head"
    _check_meaning(task, delta.head, stages, width, checker)


def _changes_own_head(delta: Delta, spec: BackboneSpec) -> bool:
    """True where an op acts in the dense layer that `base_head` takes as the backbone has it."""
    sites = {getattr(op, "write", getattr(op, "site", None)) for op in delta.ops}
    return any(site in sites and m.path.startswith("head.") for site, (m, _) in spec.writer.items())


def _changes_language_model(op: Op) -> bool:
    """True for an op that only the logits of a language model show."""
    match op:
        case Head() | Rows():
            return op.site.name in (*MASKED_HEAD_SITES, "logits")
        case LowRank():
            return op.write.name in MASKED_HEAD_SITES
        case Affine() | LinearMap() | WeightDelta():
            return op.site.name in MASKED_HEAD_SITES
        case _:
            return False


def _check_statistics_alone(stages: Sequence[Head], checker: OpChecker) -> int | None:
    """Check what a cloze has at scores: class statistics, or nothing. Its labels are known by its words."""
    for stage in stages:
        checker.where = "stage of a cloze"
        others = ("weight", "bias", "activation", "norm_weight", "norm_bias", "norm_eps")
        if len(stages) > 1 or any(getattr(stage, name) is not None for name in others):
            checker.add(
                "its scores are those of words; expected class_means and precision alone, once at most."
            )
        if stage.class_means is None:
            checker.add("class_means: expected a tensor.")
        _check_statistics(0, stage, checker.spec.hidden_size, checker)
    return None


def _check_stages(stages: Sequence[Head], checker: OpChecker) -> int | None:
    """Check the chain; the width of its scores, None where it is not known."""
    if len(stages) > MAX_STAGES:
        checker.add(f"{len(stages)} stages at scores, expected at most {MAX_STAGES}.")
    width: int | None = checker.spec.hidden_size
    for index, stage in enumerate(stages):
        checker.where = f"stage {index} of the head"
        out = stage.weight.shape[0] if isinstance(stage.weight, Tensor) and stage.weight.dim() else None
        checker.tensor("weight", stage.weight, (out, width))
        if out == 0:
            checker.add("weight: expected at least one row.")
        for name in ("bias", "norm_weight", "norm_bias"):
            if (vector := getattr(stage, name)) is not None:
                checker.tensor(name, vector, (out,))
        if stage.activation is not None and stage.activation not in ACTIVATIONS:
            checker.add(f"activation: expected one of {', '.join(ACTIVATIONS)}.")
        if (stage.norm_weight is None) != (stage.norm_eps is None) or (
            stage.norm_weight is None and stage.norm_bias is not None
        ):
            checker.add("norm_weight, norm_eps: a norm has both, and norm_bias only beside them.")
        elif stage.norm_eps is not None and not (type(stage.norm_eps) is float and 0 < stage.norm_eps < 1):
            checker.add("norm_eps: expected a number between 0 and 1.")
        _check_statistics(index, stage, width, checker)
        width = out
    return width


def _check_statistics(index: int, stage: Head, width: int | None, checker: OpChecker) -> None:
    if stage.class_means is None and stage.precision is None:
        return
    if index or stage.class_means is None:
        checker.add("class_means, precision: the first stage has both, or the means alone.")
        return
    checker.tensor("class_means", stage.class_means, (None, width))
    if stage.precision is not None:
        checker.tensor("precision", stage.precision, (width, width))


def _check_meaning(
    task: Task, head: HeadSpec, stages: Sequence[Head], width: int | None, checker: OpChecker
) -> None:
    if head.pooling not in POOLINGS:
        checker.add(f"pooling: expected one of {', '.join(POOLINGS)}.")
    elif (head.pooling == "tokens") != (task in PER_TOKEN):
        which = "each token by itself" if task in PER_TOKEN else "one vector of the whole input"
        checker.add(f"pooling: got {head.pooling}, but {task.value} scores {which}.")
    elif (head.pooling == "mask") != (head.cloze is not None):
        checker.add(f"pooling: got {head.pooling}; mask belongs to a cloze, and a cloze to mask.")
    elif head.pooling == "pooler" and Site("pooled") not in checker.spec.writer:
        checker.add("pooling: the backbone has no pooler; the head was trained over another pooling.")
    if type(head.normalize) is not bool or (head.normalize and task is not Task.EMBEDDING):
        checker.add("normalize: expected true or false, and true for embeddings only.")
    if head.pad_token_id is not None and not (
        type(head.pad_token_id) is int and head.pad_token_id >= 0 and head.pooling == "last_not_pad"
    ):
        checker.add("pad_token_id: expected a token id, and one only beside the pooling last_not_pad.")
    if type(head.base_head) is not bool or (
        head.base_head and (task not in (*LABELLED, *PER_TOKEN) or head.cloze is not None)
    ):
        checker.add("base_head: expected true or false, and true for task heads only.")
    elif head.base_head and not (checker.spec.head_style is not None and checker.spec.head_style.is_own):
        checker.add("base_head: the backbone has no dense layer that task heads start from.")
    if head.cloze is not None:
        _check_cloze(task, head, head.cloze, checker)
    elif task is not Task.EMBEDDING and not stages:
        checker.add(f"a {task.value} head has at least one stage at scores.")
    if task is Task.QUESTION_ANSWERING and stages and width != SPAN_SCORES:
        checker.add(
            f"it gives {width} scores a token, expected {SPAN_SCORES}: where the answer begins and ends."
        )
    if task in LABELLED:
        _check_labels(task, head, width, checker)
    elif head.labels or head.problem_type is not None:
        checker.add(f"labels, problem_type: {task.value} has none.")
    if task is not Task.SEQUENCE_CLASSIFICATION and any(s.class_means is not None for s in stages):
        checker.add(f"class_means: {task.value} has no classes of whole inputs.")


def _check_cloze(task: Task, head: HeadSpec, cloze: Cloze, checker: OpChecker) -> None:
    if checker.spec.kind != "encoder" or Site("logits") not in checker.spec.writer:
        checker.add("cloze: the backbone has no masked language model head that could fill the mask.")
    if task is not Task.SEQUENCE_CLASSIFICATION or head.problem_type != "single_label":
        checker.add("cloze: it is for sequence-classification with the problem_type single_label.")
    for text in cloze_problems(cloze, head.labels):
        checker.add(f"cloze: {text}")


def _check_labels(task: Task, head: HeadSpec, width: int | None, checker: OpChecker) -> None:
    names = head.labels
    if width is not None and len(names) != width:
        checker.add(f"labels: {len(names)} labels for a head with {width} scores.")
    if not 1 <= len(names) <= MAX_LABELS:
        checker.add(f"labels: {len(names)}, expected 1 to {MAX_LABELS}.")
    if any(not isinstance(name, str) or not 0 < len(name) <= MAX_LABEL_CHARS for name in names):
        checker.add(f"labels: expected strings of 1 to {MAX_LABEL_CHARS} characters.")
    elif len(set(names)) != len(names):
        checker.add("labels: two labels have the same name.")
    allowed = PROBLEM_TYPES if task is Task.SEQUENCE_CLASSIFICATION else ("single_label",)
    if head.problem_type not in allowed:
        checker.add(f"problem_type: expected {' or '.join(allowed)} for {task.value}.")
