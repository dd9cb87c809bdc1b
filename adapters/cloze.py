"""Classification by the masked language model head: patterns around the text, and words that stand for the labels.

A pattern is text with `{text}`, `{mask}` and, for two texts, `{text_pair}` in it; other braces are refused, so nothing
of it is ever evaluated. A word of k tokens t is scored in the pattern with k masks side by side, in one pass:

    s_p(w) = 1/k Σ_i log softmax(z_i)[t_i]        z_i: the logits at mask i
    s_p(l) = mean of s_p(w) over the words of label l
    q(l)   = Σ_p a_p softmax_l(s_p)(l)            a_p: the patterns' weights, which sum to 1
    score(l) = log q(l) + Σ_p a_p log Σ_l exp s_p(l)

so that the probabilities of the labels are the softmax of the scores, and their energy the patterns' mean; with one
pattern the scores are s_p.
Source: Schick and Schütze "Exploiting Cloze Questions for Few Shot Text Classification and Natural Language Inference"
section 3 (one mask, where the constant of the softmax cancels); several masks in one pass as in the same authors' "It's
Not Just Size That Matters" section 3.1, but the mean of the logarithms in place of their sum, so that a label is not
less likely for having more tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

TEXT, PAIR, MASK = "{text}", "{text_pair}", "{mask}"
SLOTS = (TEXT, PAIR, MASK)

MAX_PATTERNS = 16
MAX_PATTERN_CHARS = 2048
MAX_WORDS = 64
"""Words of one label."""
MAX_ALL_WORDS = 1024
MAX_WORD_CHARS = 128
MAX_WEIGHT = 1e6

_SLOT = re.compile(r"(\{[^{}]*\})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloze:
    """Patterns, their weights (none: all alike), and per label, in the order of the head's labels, its words."""

    patterns: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    weights: tuple[float, ...] = ()

    @property
    def shares(self) -> tuple[float, ...]:
        """The patterns' weights, which sum to 1."""
        weights = self.weights or (1.0,) * len(self.patterns)
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def takes_pairs(self) -> bool:
        """True where the patterns are around two texts."""
        return PAIR in pieces(self.patterns[0])

    def shown(self, labels: Sequence[str]) -> dict[str, Any]:
        """What the admission proof says of it."""
        words = {label: list(found) for label, found in zip(labels, self.words, strict=True)}
        return {"patterns": list(self.patterns), "weights": list(self.shares), "verbalizer": words}

    def to_json(self) -> dict[str, Any]:
        """As the canonical manifest has it; `cloze_from_json` is the inverse."""
        found = {"patterns": list(self.patterns), "words": [list(words) for words in self.words]}
        return found | ({"weights": list(self.weights)} if self.weights else {})


def cloze_from_json(raw: object) -> Cloze:
    """What `to_json` wrote, its content unchecked. Raises ValueError for another shape."""
    if not isinstance(raw, dict) or not raw.keys() <= {"patterns", "words", "weights"}:
        raise ValueError("head.cloze, expected an object with patterns, words, weights")
    lists = [raw.get("patterns"), raw.get("words"), raw.get("weights", [])]
    if not all(isinstance(item, list) for item in [*lists, *(lists[1] or ())]):
        raise ValueError("head.cloze, expected lists")
    patterns, words, weights = lists
    assert patterns is not None
    assert words is not None
    assert weights is not None
    return Cloze(patterns=tuple(patterns), words=tuple(map(tuple, words)), weights=tuple(weights))


def pieces(pattern: str) -> list[str]:
    """The parts of a pattern in their order: literal text, and what stands in braces; nothing empty."""
    return [part for part in _SLOT.split(pattern) if part]


def cloze_problems(cloze: Cloze, labels: Sequence[str]) -> Iterator[str]:
    """What is wrong with `cloze` whatever the tokenizer; its fields may hold anything."""
    if not 1 <= len(cloze.patterns) <= MAX_PATTERNS:
        yield f"patterns: {len(cloze.patterns)}, expected 1 to {MAX_PATTERNS}."
    for index, pattern in enumerate(cloze.patterns):
        yield from (f"patterns[{index}]: {text}" for text in _pattern_problems(pattern))
    if len({PAIR in p for p in cloze.patterns if isinstance(p, str)}) > 1:
        yield f"patterns: some are around {PAIR} and some are not; one request brings either one text or two."
    if cloze.weights and len(cloze.weights) != len(cloze.patterns):
        yield f"weights: {len(cloze.weights)} for {len(cloze.patterns)} patterns."
    if any(type(w) not in (int, float) or not 0 < w <= MAX_WEIGHT for w in cloze.weights):
        yield f"weights: expected numbers above 0, up to {MAX_WEIGHT:g}."
    if len(cloze.words) != len(labels):
        yield f"verbalizer: words for {len(cloze.words)} labels, the head has {len(labels)}."
        return
    if len(labels) == 1:
        yield "verbalizer: one label; the words of two or more are weighed against each other."
    for index, words in enumerate(cloze.words):
        yield from (f"verbalizer: label {index}: {text}" for text in _word_problems(words))
    if (total := sum(map(len, cloze.words))) > MAX_ALL_WORDS:
        yield f"verbalizer: {total} words in all, expected at most {MAX_ALL_WORDS}."
    texts = ({word for word in words if isinstance(word, str)} for words in cloze.words)
    counts = Counter(word for words in texts for word in words)
    if shared := [word for word, count in counts.items() if count > 1]:
        yield f"verbalizer: {ascii(shared[0])[:80]} stands for two labels."


def _pattern_problems(pattern: object) -> Iterator[str]:
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN_CHARS:
        yield f"expected a text of 1 to {MAX_PATTERN_CHARS} characters."
        return
    parts = pieces(pattern)
    for slot, needed in ((TEXT, True), (PAIR, False), (MASK, True)):
        count = parts.count(slot)
        if count > 1 or (needed and not count):
            yield f"it has {slot} {count} times, expected {'once' if needed else 'once at most'}."
    if any("{" in part or "}" in part for part in parts if part not in SLOTS):
        yield f"braces stand around text, text_pair and mask only: {', '.join(SLOTS)}."


def _word_problems(words: Sequence[object]) -> Iterator[str]:
    if not 1 <= len(words) <= MAX_WORDS:
        yield f"{len(words)} words, expected 1 to {MAX_WORDS}."
    for word in words:
        if not isinstance(word, str) or not 0 < len(word) <= MAX_WORD_CHARS or word != word.strip():
            yield (
                f"expected words of 1 to {MAX_WORD_CHARS} characters without space around them: a space before the "
                "mask in the pattern is the word's too."
            )
            return
    if len(set(words)) != len(words):
        yield "a word comes twice."
