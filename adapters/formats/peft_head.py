"""The head of PEFT's task models -> `Head` ops at `scores` and a `HeadSpec`; a language model has neither.

Format: PEFT 0.21.2: the head's modules are saved whole, as `modules_to_save` are, under `base_model.model.`, beside
prompts under `base_model.`. The body of a task's model may have another name than in the backbone, and models of
`FEATURE_EXTRACTION` are bodies alone; their keys are read as if they were the backbone's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.formats.head_recipes import RECIPES, SAVED_BY_DEFAULT, TASKS, Recipe
from adapters.formats.peft_keys import PREFIX, SHARED_PREFIX, Placed, check_shape
from adapters.formats.problems import Problems, quoted
from adapters.normal_form import SCORES, Head, Op, VirtualTokens
from adapters.tasks import MEAN_EMBEDDING, HeadSpec, ProblemType, Task


class Split(NamedTuple):
    """An adapter without its head: `stages` of the head and how it is read, and the config and tensors of the rest."""

    task: Task
    stages: tuple[Head, ...]
    spec: HeadSpec | None
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def task_of(config: Mapping[str, Any], said: Task | None, backbone: BackboneSpec, problems: Problems) -> Task:
    """The adapter's task; `said` by the uploader, which the config may leave open. An unknown one is refused later.

    Where nobody says, a decoder generates and an encoder embeds.
    """
    stated = config.get("task_type")
    if (reason := _other_kind(stated, backbone)) is not None:
        problems.add(f"adapter_config.json: task_type: got {stated!r}: {reason}.", param="task_type")
        return Task.CAUSAL_LM
    if stated is None:
        return said or (Task.EMBEDDING if backbone.kind == "encoder" else Task.CAUSAL_LM)
    return TASKS.get(stated, Task.CAUSAL_LM) if isinstance(stated, str) else Task.CAUSAL_LM


def _other_kind(stated: object, backbone: BackboneSpec) -> str | None:
    """Why a stated task, if it is one, is none of backbones of this kind."""
    if backbone.kind == "encoder-decoder":
        if stated in (None, "SEQ_2_SEQ_LM") or stated not in TASKS:
            return None
        return f"{backbone.model_type} has an encoder and a decoder, and is served for SEQ_2_SEQ_LM"
    if stated == "SEQ_2_SEQ_LM":
        return f"it adapts a model with an encoder and a decoder, and {backbone.model_type} is none"
    if stated == "CAUSAL_LM" and backbone.kind == "encoder":
        return f"{backbone.model_type} is an encoder and does not generate"
    return None


def split_head(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    task: Task,
    backbone: BackboneSpec,
    problems: Problems,
) -> Split:
    """Take the head of `task` off an adapter; what does not fit is added to `problems`."""
    if task is Task.CAUSAL_LM:
        return Split(task, (), None, config, tensors)
    if task is Task.EMBEDDING:
        return Split(task, (), MEAN_EMBEDDING, config, tensors)
    recipe = RECIPES.get(backbone.model_type, {}).get(task)
    if recipe is None:
        problems.add(
            f"adapter_config.json: task_type: transformers has no {task.value} model of {backbone.model_type} whose "
            "head could be read.",
            param="task_type",
        )
        return Split(task, (), None, config, tensors)
    stages, rest = _take_stages(recipe, tensors, backbone, problems)
    config = {**config, "modules_to_save": _without_head(config.get("modules_to_save"), recipe, task)}
    spec = None
    if not stages:  # refused already: whatever else is wrong is not the head's
        task = Task.CAUSAL_LM
    else:
        labels = _default_labels(task, len(stages[-1].weight))
        spec = HeadSpec(
            pooling=recipe.pooling, labels=labels, problem_type=_default_problem(task, len(labels))
        )
    return Split(task, stages, spec, config, _renamed(rest, recipe.body, backbone))


def pooled_as_trained(spec: HeadSpec | None, ops: tuple[Op, ...], backbone: BackboneSpec) -> HeadSpec | None:
    """`spec` where the head was trained over a prompt.

    PEFT then hands over embeddings, which show no pads; on an encoder the first of them is a virtual token.
    """
    if spec is None or not any(isinstance(op, VirtualTokens) for op in ops):
        return spec
    if spec.pooling == "last_not_pad":
        return replace(spec, pooling="last")
    if backbone.kind == "encoder" and spec.pooling == "cls":
        return replace(spec, pooling="first")
    return spec


def _take_stages(
    recipe: Recipe, tensors: Mapping[str, Tensor], backbone: BackboneSpec, problems: Problems
) -> tuple[tuple[Head, ...], dict[str, Tensor]]:
    rest = dict(tensors)
    stages: list[Head] = []
    width = backbone.hidden_size
    for stage in recipe.stages:
        found: dict[str, Placed] = {}
        for name in ("weight", "bias") if stage.has_bias else ("weight",):
            keys = [f"{prefix}{stage.path}.{name}" for prefix in (PREFIX, SHARED_PREFIX)]
            present = [key for key in keys if key in rest]
            if present:
                found[name] = Placed(present[0], rest.pop(present[0]))
            else:
                problems.add(
                    f"A site without a tensor: the head has no {quoted(f'{stage.path}.{name}')}; PEFT saves the head "
                    "where modules_to_save names it.",
                    param="modules_to_save",
                )
        if "weight" not in found:
            continue
        out = found["weight"].tensor.shape[0] if found["weight"].tensor.dim() else 0
        shapes = {"weight": (out, width), "bias": (out,)}
        checked = [check_shape(placed, shapes[name], problems) for name, placed in found.items()]
        if all(checked):
            bias = found["bias"].tensor if "bias" in found else None
            stages.append(
                Head(site=SCORES, weight=found["weight"].tensor, bias=bias, activation=stage.activation)
            )
        width = out
    whole = len(stages) == len(recipe.stages)
    return tuple(stages) if whole else (), rest


def _without_head(names: object, recipe: Recipe, task: Task) -> object:
    """What `modules_to_save` names beside the head; anything but a list of names is left for the schema to refuse."""
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return names
    paths = [stage.path for stage in recipe.stages]
    head = {name for name in names if any(_covers(name, path) for path in paths)} | {*SAVED_BY_DEFAULT[task]}
    return [name for name in dict.fromkeys(names) if name not in head] or None


def _covers(name: str, path: str) -> bool:
    return path.endswith(name) or path.partition(".")[0].endswith(name)


def _renamed(tensors: Mapping[str, Tensor], old: str | None, backbone: BackboneSpec) -> Mapping[str, Tensor]:
    """`tensors` with the body under the backbone's own name for it."""
    if old is None:
        return tensors
    start, own = f"{PREFIX}{old}.", f"{PREFIX}{backbone.modules[0].path.partition('.')[0]}."
    return {
        own + key.removeprefix(start) if key.startswith(start) else key: tensor
        for key, tensor in tensors.items()
    }


def _default_labels(task: Task, count: int) -> tuple[str, ...]:
    return () if task is Task.QUESTION_ANSWERING else tuple(f"LABEL_{index}" for index in range(count))


def _default_problem(task: Task, count: int) -> ProblemType | None:
    """As transformers infers it from the number of labels."""
    if task is Task.QUESTION_ANSWERING:
        return None
    return "regression" if task is Task.SEQUENCE_CLASSIFICATION and count == 1 else "single_label"
