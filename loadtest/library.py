"""The libraries that the engine is compared with: transformers' `generate`, and PEFT's mixed batch in it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


class _Clock(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Notes when each step of `generate` ends; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    output_tokens: int,
    *,
    adapter_names: Sequence[str | None] | None = None,
) -> float:
    """Greedy static batch, left-padded; returns the mean seconds of its decode steps.

    `adapter_names`: PEFT's mixed batch, None for a bare row; where all are None, PEFT's adapters are switched off.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    clock = _Clock()
    bare = adapter_names is not None and not any(adapter_names)
    names = (
        {} if adapter_names is None or bare else {"adapter_names": [n or "__base__" for n in adapter_names]}
    )
    with warnings.catch_warnings(), model.disable_adapter() if bare else nullcontext():
        warnings.simplefilter("ignore")
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
            **names,
        )
    assert out.shape[1] == longest + output_tokens, out.shape
    return (clock.times[-1] - clock.times[0]) / max(1, len(clock.times) - 1)
