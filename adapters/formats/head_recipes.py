"""Where PEFT's task models keep their heads, and what these read: data by task type and architecture.

Source: the `...ForSequenceClassification`, `...ForTokenClassification` and `...ForQuestionAnswering` classes of
transformers 5, whose dropout does nothing when served; the `PeftModelFor*` classes of PEFT 0.21.2, which save the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapters.normal_form import Activation
from adapters.tasks import Pooling, Task

TASKS: Mapping[str, Task] = {
    "CAUSAL_LM": Task.CAUSAL_LM,
    "SEQ_2_SEQ_LM": Task.CAUSAL_LM,
    "SEQ_CLS": Task.SEQUENCE_CLASSIFICATION,
    "TOKEN_CLS": Task.TOKEN_CLASSIFICATION,
    "QUESTION_ANS": Task.QUESTION_ANSWERING,
    "FEATURE_EXTRACTION": Task.EMBEDDING,
}
"""PEFT's task types; without one, an adapter is for a language model."""

SAVED_BY_DEFAULT: Mapping[Task, tuple[str, ...]] = {
    Task.SEQUENCE_CLASSIFICATION: ("classifier", "score"),
    Task.TOKEN_CLASSIFICATION: ("classifier", "score"),
    Task.QUESTION_ANSWERING: ("qa_outputs",),
}
"""What PEFT adds to `modules_to_save`, whether the model has it or not."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A linear module of the head and what follows it."""

    path: str
    activation: Activation | None = None
    has_bias: bool = True


@dataclass(frozen=True, slots=True)
class Recipe:
    """One task of one architecture. `body`: the body's name in the task's model where it is not the backbone's own."""

    stages: tuple[Stage, ...]
    pooling: Pooling
    body: str | None = None


_SCORE = Recipe((Stage("score", has_bias=False),), "last_not_pad")
_TAGS = Recipe((Stage("classifier"),), "tokens")
_SPANS = Recipe((Stage("qa_outputs"),), "tokens")

_GENERIC: Mapping[Task, Recipe] = {
    Task.SEQUENCE_CLASSIFICATION: _SCORE,
    Task.TOKEN_CLASSIFICATION: Recipe((Stage("score"),), "tokens"),
}
_SPANS_RENAMED = {Task.QUESTION_ANSWERING: Recipe(_SPANS.stages, "tokens", body="transformer")}
_EARLY: Mapping[Task, Recipe] = {
    Task.SEQUENCE_CLASSIFICATION: _SCORE,
    Task.TOKEN_CLASSIFICATION: _TAGS,
    Task.QUESTION_ANSWERING: _SPANS,
}
_ROBERTA: Mapping[Task, Recipe] = {
    Task.SEQUENCE_CLASSIFICATION: Recipe(
        (Stage("classifier.dense", "tanh"), Stage("classifier.out_proj")), "cls"
    ),
    Task.TOKEN_CLASSIFICATION: _TAGS,
    Task.QUESTION_ANSWERING: _SPANS,
}
_POOLER: Mapping[Task, Recipe] = {
    Task.SEQUENCE_CLASSIFICATION: Recipe((Stage("classifier"),), "pooler"),
    Task.TOKEN_CLASSIFICATION: _TAGS,
    Task.QUESTION_ANSWERING: _SPANS,
}

RECIPES: Mapping[str, Mapping[Task, Recipe]] = {
    "llama": {**_GENERIC, **_SPANS_RENAMED},
    "mistral": {**_GENERIC, Task.QUESTION_ANSWERING: _SPANS},
    "mixtral": {**_GENERIC, Task.QUESTION_ANSWERING: _SPANS},
    "qwen2": {**_GENERIC, **_SPANS_RENAMED},
    "qwen3": {**_GENERIC, **_SPANS_RENAMED},
    "qwen3_moe": {**_GENERIC, **_SPANS_RENAMED},
    "gemma": _GENERIC,
    "gemma2": _GENERIC,
    "gemma3_text": {Task.SEQUENCE_CLASSIFICATION: _SCORE},
    "phi3": _GENERIC,
    "starcoder2": _GENERIC,
    "gpt2": _EARLY,
    "gpt_neo": _EARLY,
    "gpt_neox": _EARLY,
    "bloom": _EARLY,
    "falcon": _EARLY,
    "mpt": _EARLY,
    "opt": {Task.SEQUENCE_CLASSIFICATION: _SCORE, Task.QUESTION_ANSWERING: _SPANS},
    "gptj": {Task.SEQUENCE_CLASSIFICATION: _SCORE, Task.QUESTION_ANSWERING: _SPANS},
    "bert": _POOLER,
    "albert": _POOLER,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": {
        **_ROBERTA,
        Task.SEQUENCE_CLASSIFICATION: Recipe(
            (Stage("classifier.dense", "gelu"), Stage("classifier.out_proj")), "cls"
        ),
    },
    "distilbert": {
        **_ROBERTA,
        Task.SEQUENCE_CLASSIFICATION: Recipe((Stage("pre_classifier", "relu"), Stage("classifier")), "cls"),
    },
}
