"""What one forward pass needs beside its input: the delta programs and the attention plan of this batch.

The engine thread enters `forward_context` around the unmodified model; hooked modules and the attention function read
it. A thread-local rather than keyword arguments, which some transformers blocks drop.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from adapters.normal_form import Site

if TYPE_CHECKING:
    from serving.model.distance_bias import DistanceBias
    from serving.model.kv_cache import RowSpan
    from serving.model.padded import Padding
    from serving.model.programs import Program


class AttentionPlan(Protocol):
    """Attention of one step over the KV cache; built by the cache for the rows of the batch.

    `attended` lists the calls as (layer, window): a layer that went another way shows. `rows` are in the order of their
    tokens; `longest` counts the entries of the longest, its new tokens included.
    """

    attended: list[tuple[int, int | None]]
    rows: Sequence[RowSpan]
    longest: int

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
        bias: DistanceBias | None = None,
    ) -> Tensor:
        """Append key and value to the cache and attend.

        Shapes: query [1, heads, T, D], key and value [1, kv_heads, T, D] -> [1, T, heads, D].
        `window`: a token sees the last `window` entries, itself included. `softcap` bounds scores by its tanh. `bias`
        is added to the scores by distance in entries.
        """
        ...

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value to the cache and give all entries of every row, for a model that attends by itself.

        Shapes: key and value [T, kv_heads, D] -> [B, kv_heads, longest, D] each, rows aligned to the right. What stands
        to the left of a row is finite and must be masked.
        """
        ...


@dataclass(slots=True, eq=False)
class SharedGroup:
    """What rows [first, stop) of the batch see of the rows that all share (`BackboneSpec.shared`).

    Their deltas run there through `programs`; `table` [n, d] is filled with the shared rows that come of it.
    """

    first: int
    stop: int
    programs: Sequence[Program | None]
    table: Tensor | None = None


class CrossPlan(Protocol):
    """Attention of a decoder's tokens over what the encoder made of their rows. `attended` lists the layers' calls."""

    attended: list[int]

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """Shapes: query [1, heads, T, D] -> [1, T, heads, D]."""
        ...


@dataclass(slots=True)
class ForwardContext:
    """One batch's view. `programs[i]` is what module i does beside its base forward, None for nothing.

    `captured` holds the sites that other modules read, filled by the modules that see them. `query` [heads, T, D]
    after rotary and `scaling` are those of the attention that ran last, filled by the attention function. `padding`
    says which of the rows that modules see are tokens, None where all are. `hidden_rows` [R] are the tokens whose
    final hidden states are wanted, which are then in `hidden` [R, d] fp32. Encoders only: `token_types` [T] where a
    row has two parts, `inserted` the virtual tokens [l, d] that stand at a token index, `replayed` [R, d] the states
    that the model's head runs on alone, `shared` the rows of the batch by what they see of shared rows, empty where all
    see the base model's, `prefix_gates` what prefixes are multiplied by in the coming attention, keys and values [2],
    by the first token of their row. Encoder-decoders only: `positions` [T] of the tokens, `cross` the attention of the
    decoder's tokens over the encoder's, None in a pass of the encoder, `logits_rows` [R] the tokens that the head runs
    on.
    """

    programs: Sequence[Program | None]
    attention: AttentionPlan
    captured: dict[Site, Tensor] = field(default_factory=dict)
    query: Tensor | None = None
    scaling: float = 1.0
    padding: Padding | None = None
    hidden_rows: Tensor | None = None
    hidden: Tensor | None = None
    token_types: Tensor | None = None
    inserted: Sequence[tuple[int, Tensor]] = ()
    replayed: Tensor | None = None
    shared: Sequence[SharedGroup] = ()
    prefix_gates: dict[int, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None
    cross: CrossPlan | None = None
    logits_rows: Tensor | None = None

    def keep_hidden(self, states: Tensor) -> None:
        """Take the wanted rows of the final hidden states [..., d], which the model hands over."""
        if self.hidden_rows is None:
            return
        tokens = states.flatten(0, -2)
        if self.padding is not None:
            tokens = tokens[self.padding.tokens]
        self.hidden = tokens[self.hidden_rows].float()

    def insert(self, embedded: Tensor) -> None:
        """Put the virtual tokens into the embedded batch [1, T, d], or padded [B, Q, d], in place."""
        tokens = embedded.view(-1, embedded.shape[-1])
        for start, rows in self.inserted:
            places = torch.arange(start, start + len(rows), device=embedded.device)
            if self.padding is not None:
                places = self.padding.tokens[places]
            tokens[places] = rows.to(embedded.dtype)


class _Active(threading.local):
    context: ForwardContext | None = None


_ACTIVE = _Active()


def active_context() -> ForwardContext | None:
    """The context of the forward pass that runs on this thread, None outside one."""
    return _ACTIVE.context


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` the active one for this thread; contexts do not nest."""
    assert _ACTIVE.context is None, "a forward pass is already running on this thread"
    _ACTIVE.context = context
    try:
        yield
    finally:
        _ACTIVE.context = None


@contextmanager
def inner_context(context: ForwardContext | None) -> Iterator[None]:
    """`context` in the place of the active one, for modules that run on other rows than the batch's tokens."""
    outer, _ACTIVE.context = _ACTIVE.context, context
    try:
        yield
    finally:
        _ACTIVE.context = outer
