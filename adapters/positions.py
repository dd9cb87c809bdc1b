"""On which tokens of a request an op acts, where that is not all of them.

A token is under one of the positions that a delta names, or under none: where two overlap, `LastTokens` wins.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class FromInvocation:
    """The tokens of a request from the last occurrence of `tokens` in its prompt on, that occurrence included.

    None where the prompt does not have them. Generated tokens move nothing, whatever they spell.
    Source: Greenewald et al. "Activated LoRA"; PEFT `calculate_alora_offsets`.
    """

    tokens: tuple[int, ...]

    def span(self, prompt: tuple[int, ...]) -> tuple[int, int]:
        """(first token that is meant, first that is not any more) of a request with this prompt."""
        count = len(self.tokens)
        starts = range(len(prompt) - count, -1, -1)
        return next((at for at in starts if prompt[at : at + count] == self.tokens), sys.maxsize), sys.maxsize


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """The first `count` tokens of a request, generated ones too where its prompt is shorter.

    Source: Wu et al. "ReFT" section 3.2; AdapterHub `ReftModule`.
    """

    count: int

    def span(self, prompt: tuple[int, ...]) -> tuple[int, int]:
        """(first token that is meant, first that is not any more) of a request with this prompt."""
        del prompt
        return 0, self.count


@dataclass(frozen=True, slots=True)
class LastTokens:
    """The last `count` tokens of a request's prompt; no generated token is one. Source: as `FirstTokens`."""

    count: int

    def span(self, prompt: tuple[int, ...]) -> tuple[int, int]:
        """(first token that is meant, first that is not any more) of a request with this prompt."""
        return max(0, len(prompt) - self.count), len(prompt)


Positions = FromInvocation | FirstTokens | LastTokens


class Cut(NamedTuple):
    """The tokens from `start` to the next cut are under `positions`, or under none."""

    start: int
    positions: Positions | None


UNCUT = (Cut(0, None),)


def cuts(positions: Collection[Positions], prompt: tuple[int, ...]) -> tuple[Cut, ...]:
    """A request with this prompt, cut where the positions change; the first cut is at 0."""
    if not positions:
        return UNCUT
    spans = {
        each: each.span(prompt) for each in sorted(positions, key=lambda each: isinstance(each, LastTokens))
    }
    found: list[Cut] = []
    for start in sorted({0, *(bound for span in spans.values() for bound in span)}):
        under = [each for each, (begin, stop) in spans.items() if begin <= start < stop]
        here = under[-1] if under else None
        if not found or found[-1].positions != here:
            found.append(Cut(start, here))
    return tuple(found)
