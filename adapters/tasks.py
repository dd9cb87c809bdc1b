"""What a delta was trained to answer, and how its head reads the final hidden states: stored, never inferred.

A head is a chain of `Head` ops at site `scores`; `HeadSpec` says what goes in (pooling) and what the numbers mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from adapters.cloze import Cloze


class Task(StrEnum):
    """What is asked of a prompt. All but `CAUSAL_LM` are answered from final hidden states, without generating.

    `FILL_MASK` is asked of an encoder's own language model head, through any delta that has no head of its own.
    """

    CAUSAL_LM = "causal-lm"
    SEQUENCE_CLASSIFICATION = "sequence-classification"
    TOKEN_CLASSIFICATION = "token-classification"  # noqa: S105
    QUESTION_ANSWERING = "question-answering"
    EMBEDDING = "embedding"
    FILL_MASK = "fill-mask"


PER_TOKEN = frozenset({Task.TOKEN_CLASSIFICATION, Task.QUESTION_ANSWERING})
"""Tasks that score every token of the prompt; the others score one vector."""

LABELLED = frozenset({Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION})
"""Tasks whose scores belong to labels."""

Pooling = Literal["cls", "first", "last", "last_not_pad", "mean", "tokens", "pooler", "mask"]
ProblemType = Literal["single_label", "multi_label", "regression"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """How a delta's head is fed and read.

    `pooling`: the vectors that go in, those of real tokens. `cls`: the first. `first`: the first, a virtual one where
    the delta has such (prompts on encoders under PEFT). `last`: the
    last. `last_not_pad`: the last that is not a pad, the first where all are. `mean`: their average. `tokens`: each by
    itself. `pooler`: the backbone's own pooler, over the first. `labels`: names of the scores, in their order.
    `mask`: those at the masks of `cloze`, whose logits the backbone's own masked language model head makes.
    `normalize`: the result is divided by its Euclidean norm. `pad_token_id`: what `last_not_pad` takes for a pad;
    without one, what the backbone's configuration says. `base_head`: the backbone's own dense layer stands before the
    stages (ModernBERT's task models start from that of the masked language model).
    Source: the task classes of transformers; PEFT's `PeftModelFor*`.
    """

    pooling: Pooling
    labels: tuple[str, ...] = ()
    problem_type: ProblemType | None = None
    normalize: bool = False
    pad_token_id: int | None = None
    cloze: Cloze | None = None
    base_head: bool = False


MEAN_EMBEDDING = HeadSpec(pooling="mean", normalize=True)
"""How embeddings are made where a delta has no head of its own, and on the bare backbone."""
