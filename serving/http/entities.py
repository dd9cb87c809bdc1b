"""From the scores of tokens to spans of text: tagged entities, and answers to questions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from serving.core import Pooled
from serving.http.errors import JsonObject
from serving.http.pooling_schemas import Strategy

OUTSIDE = "O"
MAX_ANSWER_TOKENS = 15


class Tagged(NamedTuple):
    """A run of characters and the likeliest label of it."""

    label: str
    score: float
    start: int
    end: int


def entities(text: str, pooled: Pooled, strategy: Strategy) -> list[JsonObject]:
    """The entities of `text`, in order.

    `none`: each token by itself, but those outside. `simple`: neighbours of one type are one entity, until one begins a
    new one (`B-`). `first`: the same for whole words, each of which is what its first token is. A label without `B-` or
    `I-` is its own type. The score of an entity is the mean of its parts'.
    Source: the aggregation strategies of transformers' TokenClassificationPipeline.
    """
    tokens = list(_tokens(pooled))
    if strategy == "none":
        groups = [[tag] for _, tag in tokens]
    else:
        parts = [tag for _, tag in tokens] if strategy == "simple" else list(_words(tokens))
        groups = list(_grouped(parts))
    found = []
    for group in groups:
        label = group[0].label if strategy == "none" else _split(group[0].label)[1]
        if label == OUTSIDE:
            continue
        start, end = _trimmed(text, group[0].start, group[-1].end)
        score = sum(part.score for part in group) / len(group)
        found.append({"label": label, "score": score, "text": text[start:end], "start": start, "end": end})
    return found


def _tokens(pooled: Pooled) -> Iterator[tuple[int, Tagged]]:
    """(its word, what it is) of every token but special ones."""
    width = pooled.shape[-1]
    probs = pooled.probabilities() or []
    for at, (word, (start, end)) in enumerate(zip(pooled.words, pooled.offsets, strict=True)):
        if word is None:
            continue
        row = probs[at * width : (at + 1) * width]
        best = max(range(width), key=row.__getitem__)
        yield word, Tagged(pooled.labels[best], row[best], start, end)


def _words(tokens: Sequence[tuple[int, Tagged]]) -> Iterator[Tagged]:
    for _, members in groupby(tokens, key=lambda item: item[0]):
        tags = [tag for _, tag in members]
        yield tags[0]._replace(end=tags[-1].end)


def _grouped(parts: Sequence[Tagged]) -> Iterator[list[Tagged]]:
    group: list[Tagged] = []
    for part in parts:
        begins, kind = _split(part.label)
        if group and (begins or kind != _split(group[-1].label)[1]):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _split(label: str) -> tuple[bool, str]:
    """(whether it begins a new entity, its type)."""
    if label[:2] in ("B-", "I-"):
        return label[0] == "B", label[2:]
    return False, label


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Without the white space at its edges, which some tokenizers count to the word behind it."""
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    return start, max(start, start + len(part.strip()))


@dataclass(frozen=True, slots=True)
class Answer:
    """A span of the context, and how likely its two ends are together."""

    score: float
    start: int
    end: int


def answers(context: str, pooled: Pooled, *, count: int, max_tokens: int) -> list[Answer]:
    """The `count` likeliest spans of at most `max_tokens` tokens of the context, the likeliest first."""
    scores = pooled.numbers()
    places = [at for at, sequence in enumerate(pooled.sequences) if sequence == 1]
    begins = _softmax([scores[2 * at] for at in places])
    ends = _softmax([scores[2 * at + 1] for at in places])
    spans = sorted(
        (
            (begin * ends[last], first, last)
            for first, begin in enumerate(begins)
            for last in range(first, min(first + max_tokens, len(places)))
        ),
        key=lambda span: (-span[0], span[1:]),
    )
    found = []
    for score, first, last in spans[:count]:
        start, end = pooled.offsets[places[first]][0], pooled.offsets[places[last]][1]
        found.append(Answer(score, *_trimmed(context, start, end)))
    return found


def _softmax(values: Sequence[float]) -> list[float]:
    if not values:
        return []
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    total = sum(weights)
    return [weight / total for weight in weights]
