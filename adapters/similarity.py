"""How alike two prompts are: by their tokens, and by the neurons that they activate.

Sources: Vu et al., "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer" (cosine of mean tokens); Su et
al., "On Transferability of Prompt Tuning for Natural Language Processing" (mean cosine token by token, overlap of
activated neurons); Zhong et al., "PANDA" (prompt transfer). Each measure is symmetric, and 1 for a prompt and itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.diff import StoredDelta

PROMPTS = ("virtual_tokens", "attn_prefix")
"""Kinds of the ops that are prompts."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The tokens of a prompt, [l, width]: embeddings, or keys and values of every layer side by side.

    `form` says what the columns are; prompts of different forms can't be compared.
    """

    form: tuple[tuple[Any, ...], ...]
    tokens: Tensor


def read_prompt(delta: StoredDelta) -> Prompt | None:
    """The prompt that `delta` is, None where it has none or its layers have prompts of different lengths."""
    form: list[tuple[Any, ...]] = []
    parts: list[Tensor] = []
    ops = [op for op in delta.manifest["ops"] if op["kind"] in PROMPTS]
    for op in sorted(ops, key=lambda op: (op["kind"], op.get("layer", -1))):
        for field in ("embeddings", "key", "value"):
            if field in op:
                rows = delta.tensor(op[field]).flatten(start_dim=1)
                parts.append(rows)
                settings = (op.get("layer"), op.get("merge"), op.get("projected"))
                form.append((op["kind"], field, *settings, rows.shape[1]))
    if not parts or len({len(rows) for rows in parts}) > 1:
        return None
    return Prompt(tuple(form), torch.cat(parts, dim=1))


def mean_cosine(first: Prompt, second: Prompt) -> float:
    """The cosine between the means of both prompts' tokens."""
    return _cosine(first.tokens.mean(dim=0), second.tokens.mean(dim=0))


def token_cosine(first: Prompt, second: Prompt) -> float | None:
    """The mean of the cosines between tokens at the same place; None for prompts of different lengths."""
    if first.tokens.shape != second.tokens.shape:
        return None
    pairs = zip(first.tokens, second.tokens, strict=True)
    return float(np.mean([_cosine(mine, theirs) for mine, theirs in pairs]))


def overlap(first: bytes, second: bytes) -> float | None:
    """Neurons that both activate over neurons that either does (Jaccard); None where that can't be said."""
    if len(first) != len(second) or not first:
        return None
    mine, theirs = (np.unpackbits(np.frombuffer(bits, dtype=np.uint8)) for bits in (first, second))
    either = int((mine | theirs).sum())
    return float((mine & theirs).sum()) / either if either else 1.0


def _cosine(first: Tensor, second: Tensor) -> float:
    if torch.equal(first, second):
        return 1.0
    # one order of operations for (a, b) and (b, a), and never above 1 by rounding
    norm = float(torch.linalg.vector_norm(first)) * float(torch.linalg.vector_norm(second))
    return max(-1.0, min(1.0, float((first * second).sum()) / norm)) if norm else 0.0
