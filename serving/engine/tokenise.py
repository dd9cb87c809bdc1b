"""From what a call brings to token ids, and back from tokens to the characters that they came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import BatchEncoding, PreTrainedTokenizerBase

from adapters.errors import InvalidRequest
from serving.core import ChatMessage, GenerateCall, PoolingParams


class Tokens(NamedTuple):
    """Token ids; of text, per token its characters, its word and which text of a pair it is from.

    `types`: what the tokenizer says of the parts, for models that tell them apart.
    """

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...] = ()
    words: tuple[int | None, ...] = ()
    sequences: tuple[int | None, ...] = ()
    types: tuple[int, ...] = ()

    def only(self, kept: list[int]) -> Tokens:
        """The tokens at these places."""
        return Tokens(
            tuple(self.ids[at] for at in kept),
            tuple(self.offsets[at] for at in kept if self.offsets),
            tuple(self.words[at] for at in kept if self.words),
            tuple(self.sequences[at] for at in kept if self.sequences),
            tuple(self.types[at] for at in kept if self.types),
        )


def tokenise(
    call: GenerateCall, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int, room: int
) -> Tokens:
    """The prompt of `call`. `room`: tokens that fit the backbone.

    Raises InvalidRequest for what the tokenizer or the vocabulary can't take.
    """
    tokens = _tokens(call, tokenizer)
    if call.pooling is not None and call.pooling.truncate_prompt_tokens is not None:
        tokens = _truncated(tokens, room_for(call.pooling, room), getattr(tokenizer, "mask_token_id", None))
    if not tokens.ids:
        raise InvalidRequest("The prompt is empty.", param="prompt", remedy="Send at least one token.")
    for field, ids in (("prompt", tokens.ids), ("logit_bias", call.sampling.logit_bias)):
        if outside := [token for token in ids if not 0 <= token < vocab_size]:
            raise InvalidRequest(
                f"{field}: token id {outside[0]} is outside the vocabulary of {vocab_size}.", param=field
            )
    return tokens


def _tokens(call: GenerateCall, tokenizer: PreTrainedTokenizerBase | None) -> Tokens:
    prompt = call.prompt
    if isinstance(prompt, str):
        if call.pooling is None:
            return Tokens(tuple(_need(tokenizer)(prompt)["input_ids"]))
        if not prompt:  # a tokenizer would add its special tokens to nothing
            raise InvalidRequest("The input is empty.", param="input", remedy="Send at least one character.")
        return aligned(_need(tokenizer)(prompt, call.pooling.text_pair))
    if all(isinstance(token, int) for token in prompt):
        return Tokens(tuple(token for token in prompt if isinstance(token, int)))
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequest(
            "This backbone has no chat template.", param="messages", remedy="Use /v1/completions."
        )
    turns = [{"role": m.role, "content": m.content} for m in prompt if isinstance(m, ChatMessage)]
    try:
        text = _need(tokenizer).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:  # templates refuse roles and orders that they do not know
        raise InvalidRequest(f"The chat template refuses these messages: {error}", param="messages") from None
    return Tokens(tuple(_need(tokenizer)(text, add_special_tokens=False)["input_ids"]))


def aligned(encoded: BatchEncoding) -> Tokens:
    """The tokens of one text, or two, with their places in it as far as the tokenizer says."""
    ids, types = tuple(encoded["input_ids"]), tuple(encoded.get("token_type_ids", ()))
    if not encoded.encodings:  # a tokenizer in Python knows no characters
        return Tokens(ids, types=types)
    found = encoded.encodings[0]
    return Tokens(ids, tuple(found.offsets), tuple(found.word_ids), tuple(found.sequence_ids), types)


def masks_of(tokens: Tokens, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Where the mask token stands. Raises InvalidRequest where it does not."""
    mask = None if tokenizer is None else tokenizer.mask_token_id
    if mask is None:
        raise InvalidRequest("This backbone has no mask token.", param="model")
    found = tuple(at for at, token in enumerate(tokens.ids) if token == mask)
    if not found:
        raise InvalidRequest(
            f"The input has no mask; expected at least one {_need(tokenizer).mask_token}.",
            param="input",
            remedy="Put it where a token is to be found.",
        )
    return found


def targets_of(pooling: PoolingParams, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """The token ids of `pooling.targets`. Raises InvalidRequest for a text that is not one token."""
    found = []
    for text in pooling.targets:
        ids = _need(tokenizer)(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InvalidRequest(
                f"targets: a text of {len(ids)} tokens, expected one token each.",
                param="targets",
                remedy="Some tokenizers have a word as one token only with a space before it.",
            )
        found.append(ids[0])
    return tuple(dict.fromkeys(found))


def room_for(pooling: PoolingParams, room: int) -> int:
    """The tokens that are left of an input that is to be truncated; `room`: those that fit the backbone."""
    wanted = pooling.truncate_prompt_tokens
    assert wanted is not None
    return room if wanted == -1 else min(wanted, room)


def _truncated(tokens: Tokens, wanted: int, mask: int | None) -> Tokens:
    """The first `wanted` tokens; of text, special tokens and masks stay and the longer text of a pair is cut first.

    Here and not in the tokenizer, whose truncation is a setting that all threads share.
    """
    if len(tokens.ids) <= wanted:
        return tokens
    if not tokens.sequences:
        return tokens.only(list(range(wanted)))
    masks = {at for at, token in enumerate(tokens.ids) if token == mask}
    texts = [
        [at for at, s in enumerate(tokens.sequences) if s == text and at not in masks] for text in (0, 1)
    ]
    return tokens.only(cut(len(tokens.ids), texts, wanted, "special tokens and masks"))


def cut(num_tokens: int, texts: Sequence[Sequence[int]], wanted: int, rest: str) -> list[int]:
    """The places that are kept of so many tokens: at most `wanted`, with the ends of `texts` cut, the longer's first.

    `rest` names what belongs to no text. Raises InvalidRequest where there is no room beside that.
    """
    if num_tokens <= wanted:
        return list(range(num_tokens))
    left = [list(places) for places in texts]
    special = num_tokens - sum(map(len, left))
    if special >= wanted:
        raise InvalidRequest(
            f"truncate_prompt_tokens: {wanted} tokens, of which {special} are {rest}.",
            param="truncate_prompt_tokens",
            remedy="Keep more tokens.",
        )
    for _ in range(num_tokens - wanted):
        max(left, key=len).pop()
    dropped = {at for places in texts for at in places} - {at for places in left for at in places}
    return [at for at in range(num_tokens) if at not in dropped]


def _need(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InvalidRequest("This backbone has no tokenizer.", param="prompt", remedy="Send token ids.")
    return tokenizer
