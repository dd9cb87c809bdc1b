"""How `/v1/completions` and `/v1/chat/completions` write a choice, whole and in chunks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from serving.core import FinishReason, PromptEvent, TokenEvent
from serving.http.errors import JsonObject
from serving.http.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs

_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def _finish_reason(output: TokenEvent) -> str | None:
    """OpenAI's word. KeyError for cancelled and failed calls, which are errors and never get here."""
    return None if output.finish_reason is None else _FINISH_REASONS[output.finish_reason]


class _Extras:
    """The fields beyond OpenAI's, the same for both endpoints."""

    def __init__(self, return_token_ids: bool) -> None:
        self._return_token_ids = return_token_ids

    def of_prompt(self, prompt: PromptEvent) -> JsonObject:
        """What a choice says of its prompt; empty where nothing was asked for."""
        found: JsonObject = {}
        if self._return_token_ids:
            found["prompt_token_ids"] = list(prompt.prompt_token_ids)
        if prompt.logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(prompt.logprobs)
        return found

    def of_tokens(self, output: TokenEvent) -> JsonObject:
        """What a choice says of its tokens beside their text."""
        return {"token_ids": list(output.token_ids)} if self._return_token_ids else {}

    def worth_a_chunk(self, output: TokenEvent) -> bool:
        """Whether tokens whose text is still incomplete have something to say already."""
        return bool(output.text or output.logprobs or (self._return_token_ids and output.token_ids))


class CompletionStyle:
    """`text_completion` objects; a chunk is a choice with less text."""

    object_name = chunk_object_name = "text_completion"

    def __init__(self, *, return_token_ids: bool) -> None:
        self._extras = _Extras(return_token_ids)
        self._num_chars: defaultdict[int, int] = defaultdict(int)  # by choice, of its tokens written so far

    def whole(self, index: int, prompt: PromptEvent, output: TokenEvent) -> JsonObject:
        """See `Style`."""
        return {**self._choice(index, output), **self._extras.of_prompt(prompt)}

    def opening(self, index: int, prompt: PromptEvent) -> JsonObject | None:
        """See `Style`."""
        extras = self._extras.of_prompt(prompt)
        empty = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
        return {**empty, **extras} if extras else None

    def parts(self, index: int, output: TokenEvent) -> Sequence[JsonObject]:
        """See `Style`."""
        if output.finish_reason is None and not self._extras.worth_a_chunk(output):
            return []
        return [self._choice(index, output)]

    def _choice(self, index: int, output: TokenEvent) -> JsonObject:
        logprobs = completion_logprobs(output.logprobs, self._num_chars[index]) if output.logprobs else None
        self._num_chars[index] += sum(len(token.chosen.text) for token in output.logprobs)
        return {
            "index": index,
            "text": output.text,
            "logprobs": logprobs,
            "finish_reason": _finish_reason(output),
            **self._extras.of_tokens(output),
        }


class ChatStyle:
    """`chat.completion` objects; the first chunk of a choice gives the role, the last the finish reason."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, *, return_token_ids: bool) -> None:
        self._extras = _Extras(return_token_ids)

    def whole(self, index: int, prompt: PromptEvent, output: TokenEvent) -> JsonObject:
        """See `Style`."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text},
            "logprobs": self._logprobs(output),
            "finish_reason": _finish_reason(output),
            **self._extras.of_prompt(prompt),
            **self._extras.of_tokens(output),
        }

    def opening(self, index: int, prompt: PromptEvent) -> JsonObject | None:
        """See `Style`."""
        begun = self._delta(index, {"role": "assistant", "content": ""})
        return {**begun, **self._extras.of_prompt(prompt)}

    def parts(self, index: int, output: TokenEvent) -> Sequence[JsonObject]:
        """See `Style`."""
        found = []
        if self._extras.worth_a_chunk(output):
            part = self._delta(index, {"content": output.text})
            found.append({**part, "logprobs": self._logprobs(output), **self._extras.of_tokens(output)})
        if output.finish_reason is not None:
            found.append({**self._delta(index, {}), "finish_reason": _finish_reason(output)})
        return found

    @staticmethod
    def _delta(index: int, delta: JsonObject) -> JsonObject:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    @staticmethod
    def _logprobs(output: TokenEvent) -> JsonObject | None:
        return chat_logprobs(output.logprobs) if output.logprobs else None
