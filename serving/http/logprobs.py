"""Log-probabilities in the two shapes that OpenAI has, and prompt log-probabilities in vLLM's."""

from __future__ import annotations

from collections.abc import Sequence

from serving.core import Alternative, TokenLogprobs
from serving.http.errors import JsonObject

LOWEST_LOGPROB = -9999.0
"""What OpenAI writes for a token of probability zero; JSON has no minus infinity."""


def completion_logprobs(tokens: Sequence[TokenLogprobs], start: int) -> JsonObject:
    """Parallel lists, one entry a token. `start`: characters of the choice's text before these tokens."""
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token.chosen.text)
    return {
        "tokens": [_name(token.chosen) for token in tokens],
        "token_logprobs": [_finite(token.chosen.logprob) for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens],
        "text_offset": offsets,
    }


def chat_logprobs(tokens: Sequence[TokenLogprobs]) -> JsonObject:
    """A list of objects, one a token."""
    content = [
        {**_chat_entry(token.chosen), "top_logprobs": [_chat_entry(item) for item in token.top]}
        for token in tokens
    ]
    return {"content": content}


def prompt_logprobs(tokens: Sequence[TokenLogprobs | None]) -> list[JsonObject | None]:
    """Per prompt token, token id -> log-probability and text; None for the first, which nothing precedes."""
    return [
        None
        if token is None
        else {
            str(item.token_id): {"logprob": _finite(item.logprob), "decoded_token": item.text}
            for item in (token.chosen, *token.top)
        }
        for token in tokens
    ]


def _by_text(token: TokenLogprobs) -> dict[str, float]:
    """Text -> log-probability, the chosen token included; of tokens with one text the likeliest counts."""
    found: dict[str, float] = {}
    for item in (*token.top, token.chosen):
        found.setdefault(_name(item), _finite(item.logprob))
    return found


def _chat_entry(item: Alternative) -> JsonObject:
    # part of a character decodes to U+FFFD: its real bytes are not known here, and OpenAI then says null
    known = item.text and "\ufffd" not in item.text
    return {
        "token": _name(item),
        "bytes": list(item.text.encode()) if known else None,
        "logprob": _finite(item.logprob),
    }


def _name(item: Alternative) -> str:
    """The token's text; where it has none, or the backbone no tokenizer, vLLM's way to write an id."""
    return item.text or f"token_id:{item.token_id}"


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
