"""Text from tokens as they come: incomplete characters and possible stop strings are held back."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT_TOKENS = 8
"""Prompt tokens that prime the decoder, so that the first word keeps its leading space."""


class TextStream:
    """Incremental decoding of one request. After a stop string is found, `stopped` is True and no text follows."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt_token_ids[-CONTEXT_TOKENS:]), skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self._undecoded: list[int] = []  # tokens since the last text: an incomplete character, special tokens
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; the stop string itself is never part of it."""
        chunk = self._stream.step(self._tokenizer, token_id)
        if chunk is None:
            self._undecoded.append(token_id)
            return ""
        self._undecoded.clear()
        if not self._stop:
            return str(chunk)
        self._held += chunk
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = _longest_stop_start(self._held, self._stop)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def flush(self) -> str:
        """What was held back, at the end of a request that no stop string ended.

        A character that stays incomplete becomes U+FFFD, as in a decoding of the whole answer.
        """
        text = self._held + self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        self._held = ""
        self._undecoded.clear()
        return text


def _longest_stop_start(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins some stop string."""
    longest = max(len(item) for item in stop) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(item.startswith(text[-size:]) for item in stop):
            return size
    return 0
