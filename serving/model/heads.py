"""Task heads in device memory: from pooled final hidden states to scores, in fp32, and what the scores tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.activations import FUNCTIONS
from adapters.normal_form import Delta, Head
from adapters.tasks import MEAN_EMBEDDING, HeadSpec, Task
from serving.model.place_matrices import Copy


@dataclass(frozen=True, slots=True, eq=False)
class PlacedStage:
    """One stage of a head, on the device. Shapes: weight [n, d], bias, norm_weight and norm_bias [n]."""

    weight: Tensor
    bias: Tensor | None
    activation: Callable[[Tensor], Tensor] | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    norm_eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[N, d] -> [N, n]."""
        y = F.linear(x, self.weight, self.bias)
        if self.activation is not None:
            y = self.activation(y)
        if self.norm_weight is not None:
            y = F.layer_norm(y, y.shape[-1:], self.norm_weight, self.norm_bias, self.norm_eps)
        return y


@dataclass(frozen=True, slots=True, eq=False)
class PlacedHead:
    """How pooled final hidden states become the answer to `task`.

    Shapes: class_means [C, d], precision [d, d], as the first stage reads.
    """

    task: Task
    spec: HeadSpec
    stages: tuple[PlacedStage, ...] = ()
    class_means: Tensor | None = None
    precision: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, pooled: Tensor) -> Tensor:
        """[N, d] pooled hidden states, fp32 -> [N, n] scores, or [N, n] vectors for embeddings."""
        out = pooled
        for stage in self.stages:
            out = stage(out)
        return F.normalize(out, dim=-1) if self.spec.normalize else out

    def probabilities(self, scores: Tensor) -> Tensor | None:
        """Of each label, where the scores are logits. Shapes: [..., n] -> [..., n]."""
        match self.spec.problem_type:
            case "single_label":
                return scores.softmax(dim=-1)
            case "multi_label":
                return scores.sigmoid()
            case _:
                return None

    @torch.inference_mode()
    def out_of_distribution(self, pooled: Tensor, scores: Tensor) -> dict[str, float]:
        """How foreign one input is to what the head was trained on; every score grows with it, but for `cosine`.

        `max_softmax`: one less the largest probability; `energy`: -log of the summed exponentials of the logits;
        `mahalanobis`: squared distance to the nearest class mean; `cosine`: similarity to the nearest one. Shapes:
        pooled [d], scores [n]. Source: Hendrycks and Gimpel "A Baseline for Detecting Misclassified and
        Out-of-Distribution Examples"; Liu et al. "Energy-based Out-of-distribution Detection"; Lee et al. section 2.
        """
        found: dict[str, float] = {}
        if self.spec.problem_type == "single_label":
            found["max_softmax"] = 1.0 - float(scores.softmax(dim=-1).max())
            found["energy"] = -float(scores.logsumexp(dim=-1))
        if self.class_means is not None:
            vector, means = pooled.double(), self.class_means.double()
            found["cosine"] = float(F.cosine_similarity(vector[None], means).max())
            if self.precision is not None:
                away = vector - means
                found["mahalanobis"] = float(((away @ self.precision.double()) * away).sum(-1).min())
        return found


BARE_EMBEDDING = PlacedHead(Task.EMBEDDING, MEAN_EMBEDDING)
"""Embeddings of the bare backbone, and through deltas that have no head."""


def place_head_of(delta: Delta, to_device: Copy, own: Callable[[], PlacedStage]) -> PlacedHead | None:
    """The task head of `delta` on the device, None for one that generates. `own`: the backbone's own dense layer."""
    if delta.head is None:
        return None
    ops = delta.head_stages
    before = (own(),) if delta.head.base_head else ()
    return PlacedHead(
        Task(delta.task),
        delta.head,
        (*before, *(_stage(op, op.weight, to_device) for op in ops if op.weight is not None)),
        class_means=_optional(ops[0].class_means if ops else None, to_device),
        precision=_optional(ops[0].precision if ops else None, to_device),
    )


def _stage(op: Head, weight: Tensor, to_device: Copy) -> PlacedStage:
    return PlacedStage(
        to_device(weight),
        _optional(op.bias, to_device),
        None if op.activation is None else FUNCTIONS[op.activation],
        _optional(op.norm_weight, to_device),
        _optional(op.norm_bias, to_device),
        op.norm_eps or 0.0,
    )


def _optional(tensor: Tensor | None, to_device: Copy) -> Tensor | None:
    return None if tensor is None else to_device(tensor)
