"""Cloze classification by its formula, one text at a time: transformers, a tokenizer and numpy, nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast


def word_score(
    model: Any, tokenizer: PreTrainedTokenizerFast, pattern: str, word: str, **texts: str
) -> float:
    """The mean log-probability of the word's tokens, each at a mask of its own, in one pass."""
    before = pattern.split("{mask}", maxsplit=1)[0]
    ids = tokenizer((" " if before.endswith(" ") else "") + word, add_special_tokens=False)["input_ids"]
    # the mask first: texts may hold braces
    filled = pattern.replace("{mask}", tokenizer.mask_token * len(ids))
    for name, text in texts.items():
        filled = filled.replace(f"{{{name}}}", text)
    given = torch.tensor([tokenizer(filled)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=given).logits[0].double()
    at = logits[given[0] == tokenizer.mask_token_id].log_softmax(dim=-1)
    assert len(at) == len(ids)
    return float(np.mean([float(at[place, token]) for place, token in enumerate(ids)]))


def probabilities(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    patterns: Sequence[str],
    verbalizer: Mapping[str, Sequence[str]],
    weights: Sequence[float] | None = None,
    **texts: str,
) -> tuple[np.ndarray[Any, Any], float]:
    """Those of the labels, and the energy: the patterns' mean of the negative log of what all labels get."""
    shares = np.array(weights or [1.0] * len(patterns))
    shares = shares / shares.sum()
    found, energies = [], []
    for pattern in patterns:
        scores = np.array(
            [
                np.mean([word_score(model, tokenizer, pattern, word, **texts) for word in words])
                for words in verbalizer.values()
            ]
        )
        masses = np.exp(scores)
        found.append(masses / masses.sum())
        energies.append(-np.log(masses.sum()))
    return shares @ np.array(found), float(shares @ np.array(energies))
