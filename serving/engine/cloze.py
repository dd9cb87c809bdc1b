"""Cloze heads at work: from a text to the rows that are run for it, and from the scores of their words to the labels'.

Every pattern is one row for each number of tokens that a word has, because so many masks stand in it; the engine runs
them like any rows. What a score is, `adapters.cloze` says.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adapters.cloze import MASK, PAIR, TEXT, pieces
from adapters.errors import InvalidDelta, InvalidRequest
from serving.core import Pooled, PoolingParams
from serving.engine.pooling import scored
from serving.engine.tokenise import Tokens, aligned, cut, room_for
from serving.model.heads import PlacedHead

MAX_WORD_TOKENS = 8
"""Tokens of one word: so many masks stand in a row."""

Span = tuple[int, int]


class ClozeRow(NamedTuple):
    """One row: a pattern around the text. `words`: the ids, one a mask, of each word that is scored there."""

    tokens: Tokens
    masks: tuple[int, ...]
    words: tuple[tuple[int, ...], ...]


class _Word(NamedTuple):
    label: int
    ids: tuple[int, ...]


class ClozePlan:
    """The cloze of one head, tokenised. `head` is in host memory.

    Raises InvalidDelta, with every problem, where the tokenizer can't fill its patterns or has no tokens for its words.
    """

    def __init__(self, head: PlacedHead, tokenizer: PreTrainedTokenizerBase | None) -> None:
        assert head.spec.cloze is not None
        mask_id = None if tokenizer is None else tokenizer.mask_token_id
        if tokenizer is None or not tokenizer.is_fast or mask_id is None:
            raise InvalidDelta(
                [
                    "cloze: the backbone has no tokenizer that knows a mask and where its tokens stand in the text."
                ],
                param="cloze",
            )
        self._tokenizer, self._mask_id = tokenizer, mask_id
        self._head, self._cloze, self._labels = head, head.spec.cloze, head.spec.labels
        self._patterns = [pieces(pattern) for pattern in self._cloze.patterns]
        problems = list[str]()
        self._rows = [self._words_of(index, problems) for index in range(len(self._patterns))]
        if not problems:
            problems += self._trial()
        if problems:
            raise InvalidDelta(list(dict.fromkeys(problems)), param="cloze")

    def _words_of(self, pattern: int, problems: list[str]) -> Mapping[int, list[_Word]]:
        """The words in a pattern, by their number of tokens: as written, behind a space if the mask is."""
        parts = self._patterns[pattern]
        before = "".join(parts[: parts.index(MASK)])
        space = " " if before[-1:].isspace() else ""
        found: defaultdict[int, list[_Word]] = defaultdict(list)
        owners: dict[tuple[int, ...], int] = {}
        for label, words in enumerate(self._cloze.words):
            for text in words:
                ids = tuple(self._tokenizer(space + text, add_special_tokens=False)["input_ids"])
                where = f"cloze: verbalizer: {text!a} of {self._labels[label]!a}"
                if not ids or set(ids) & set(self._tokenizer.all_special_ids):
                    problems.append(f"{where} has no tokens of its own in the backbone's vocabulary.")
                elif len(ids) > MAX_WORD_TOKENS:
                    problems.append(f"{where} is {len(ids)} tokens, expected at most {MAX_WORD_TOKENS}.")
                elif owners.setdefault(ids, label) != label:
                    other = ascii(self._labels[owners[ids]])
                    problems.append(f"{where} is the same tokens as a word of {other}.")
                found[len(ids)].append(_Word(label, ids))
        return found

    def _trial(self) -> Iterator[str]:
        for index, groups in enumerate(self._rows):
            for count in groups:
                tokens, masks, _ = self._filled(index, count, "a", "a")
                if len(masks) != count:
                    yield f"cloze: patterns[{index}]: the tokenizer finds {len(masks)} masks where {count} stand."
                if len(tokens.ids) == count:
                    yield f"cloze: patterns[{index}]: the tokenizer finds no text beside the mask."

    def rows(self, text: object, pooling: PoolingParams, room: int) -> list[ClozeRow]:
        """The rows of one text, or two; pattern by pattern. `room`: tokens that fit the backbone.

        Only the texts are cut, at their ends, the longer one first. Raises InvalidRequest.
        """
        pair = pooling.text_pair
        if not isinstance(text, str):
            raise InvalidRequest(
                "input: the delta's patterns are put around text; got token ids.",
                param="input",
                remedy="Send a string.",
            )
        if not text:
            raise InvalidRequest("The input is empty.", param="input", remedy="Send at least one character.")
        if (pair is not None) != self._cloze.takes_pairs:
            needed = "two texts" if self._cloze.takes_pairs else "one text"
            raise InvalidRequest(
                f"text_pair: the delta's patterns take {needed}.",
                param="text_pair",
                remedy="Send text_pair." if self._cloze.takes_pairs else "Leave text_pair out.",
            )
        return [
            self._cut(index, count, text, pair or "", pooling, room)
            for index, groups in enumerate(self._rows)
            for count in groups
        ]

    def _cut(
        self, pattern: int, count: int, text: str, pair: str, pooling: PoolingParams, room: int
    ) -> ClozeRow:
        tokens, masks, texts = self._filled(pattern, count, text, pair)
        if pooling.truncate_prompt_tokens is not None:
            kept = cut(
                len(tokens.ids), texts, room_for(pooling, room), "special tokens, masks and the pattern"
            )
            tokens, masks = tokens.only(kept), tuple(at for at, old in enumerate(kept) if old in masks)
        return ClozeRow(tokens, masks, tuple(word.ids for word in self._rows[pattern][count]))

    def _filled(
        self, pattern: int, count: int, text: str, pair: str
    ) -> tuple[Tokens, tuple[int, ...], list[list[int]]]:
        """The tokens of a filled pattern, the places of its own masks, and those of either text."""
        filled, spans = "", dict[str, Span]()
        contents = {TEXT: text, PAIR: pair, MASK: str(self._tokenizer.mask_token) * count}
        for part in self._patterns[pattern]:
            start = len(filled)
            filled += contents.get(part, part)
            if part in contents:
                spans[part] = (start, len(filled))
        tokens = aligned(self._tokenizer(filled))
        places = [at for at, sequence in enumerate(tokens.sequences) if sequence is not None]
        low, high = spans[MASK]
        masks = tuple(
            at
            for at in places
            if tokens.ids[at] == self._mask_id
            and tokens.offsets[at][0] < high
            and low < tokens.offsets[at][1]
        )
        texts = [
            [at for at in places if at not in masks and _inside(tokens.offsets[at], spans[slot], filled)]
            for slot in (TEXT, PAIR)
            if slot in spans
        ]
        return tokens, masks, texts

    def answer(self, found: Sequence[Pooled]) -> Pooled:
        """What the head answers, from what came of each of `rows`."""
        scores = self.scores([one.numbers() for one in found])
        vectors = [
            torch.frombuffer(bytearray(one.features), dtype=torch.float32) for one in found if one.features
        ]
        pooled = self.features(vectors) if vectors else scores[:0]
        return scored(self._head, scores, self._head.out_of_distribution(pooled, scores))

    def features(self, vectors: Sequence[Tensor]) -> Tensor:
        """What class statistics are of, [d]: the mean over the patterns of those of their rows [d] each."""
        given = iter(vectors)
        of_pattern = [torch.stack([next(given) for _ in groups]).mean(dim=0) for groups in self._rows]
        shares = torch.tensor(self._cloze.shares, dtype=torch.float64)
        return (shares[:, None] * torch.stack(of_pattern).double()).sum(dim=0).float()

    def scores(self, found: Sequence[Sequence[float]]) -> Tensor:
        """The labels' scores [C], fp32, from those of the words of `rows`, row by row."""
        given, shares = iter(found), self._cloze.shares
        logarithms, mass = [], torch.zeros((), dtype=torch.float64)
        for groups, share in zip(self._rows, shares, strict=True):
            of_label: list[list[float]] = [[] for _ in self._labels]
            for words in groups.values():
                for word, value in zip(words, next(given), strict=True):
                    of_label[word.label].append(value)
            scores = torch.tensor([sum(v) / len(v) for v in of_label], dtype=torch.float64)
            logarithms.append(math.log(share) + scores.log_softmax(dim=0))
            mass += share * scores.logsumexp(dim=0)
        return (torch.stack(logarithms).logsumexp(dim=0) + mass).float()


def _inside(token: Span, text: Span, filled: str) -> bool:
    """True where a token is of the text: some tokenizers count the space before a word to it."""
    start, stop = token
    return text[0] < stop <= text[1] and (start >= text[0] or filled[start : text[0]].isspace())
