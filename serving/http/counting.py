"""The tokens of one request: what it can come to, and what it has come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from serving.core import PromptEvent, TokenEvent
from serving.http.errors import JsonObject
from serving.tenancy.ledger import Tokens


@dataclass(slots=True)
class Usage:
    """Tokens of one request; a prompt counts once, however many choices it has, and of a beam search every beam's.

    `prompt_bounds`: tokens that each prompt can come to at most. `reserved_tokens`: those of prompts and choices.
    `on_surplus` is told, once all prompts are known, how many tokens less they came to than their bounds; negative
    where a bound was too low.
    """

    num_calls: int
    prompt_bounds: list[int]
    reserved_tokens: int
    on_surplus: Callable[[int], object] = lambda _surplus: None
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    completion_tokens: int = 0

    def add(self, index: int, event: PromptEvent | TokenEvent) -> None:
        """Count one event of call `index`."""
        if isinstance(event, TokenEvent):
            self.completion_tokens += len(event.token_ids) + event.num_searched
            return
        place = index // self.num_calls
        self.prompt_tokens[place] = len(event.prompt_token_ids)
        # the choices of a prompt share its count, so they share the least that was cached for one of them
        known = self.cached_tokens.get(place, event.num_cached_tokens)
        self.cached_tokens[place] = min(known, event.num_cached_tokens)
        if len(self.prompt_tokens) == len(self.prompt_bounds):
            self._correct()

    def _correct(self) -> None:
        """Put what the prompts came to in the place of their bounds; once more changes nothing."""
        counts = [self.prompt_tokens[place] for place in range(len(self.prompt_bounds))]
        surplus = sum(self.prompt_bounds) - sum(counts)
        if surplus:
            self.prompt_bounds = counts
            self.reserved_tokens -= surplus
            self.on_surplus(surplus)

    def spent(self, *, unknown_prompts: bool) -> int:
        """Tokens so far; with `unknown_prompts`, those that did not get to their first token at their bounds."""
        unknown = [b for place, b in enumerate(self.prompt_bounds) if place not in self.prompt_tokens]
        known = sum(self.prompt_tokens.values()) + self.completion_tokens
        return known + sum(unknown) if unknown_prompts else known

    def tokens(self) -> Tokens:
        """The same for the ledger."""
        return Tokens(
            prompt=sum(self.prompt_tokens.values()),
            cached=sum(self.cached_tokens.values()),
            completion=self.completion_tokens,
        )

    def body(self) -> JsonObject:
        """The usage object of a reply."""
        prompt = sum(self.prompt_tokens.values())
        return {
            "prompt_tokens": prompt,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
        }
