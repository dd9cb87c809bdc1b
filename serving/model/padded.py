"""The padded fallback: models whose own code attends, in batches [B, Q] of rows with pads on their left.

Their attention can't be replaced, so their cache is: a transformers `Cache` that appends the new tokens to the KV cache
of the engine and hands back all entries of every row, aligned to the right like the tokens, so that the model sees what
it sees of a left-padded batch under `generate`. Pads are masked, write nothing, and belong to no delta.
Legend: B rows, Q new tokens of the longest, T tokens of all rows, L entries of the longest row, R wanted logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from serving.model.context import AttentionPlan, ForwardContext, forward_context
from serving.model.layout import as_input, takes
from serving.model.programs import MergedModule, Program

MAX_PADDED = 2
"""Rows run together while they take at most so many times their tokens."""


class Padded:
    """Rows side by side, [B, Q]; attention is the model's own, in eager mode."""

    name = "padded"
    sees_queries = False
    attends_by_plan = True

    def __init__(self, model: PreTrainedModel, logit_modules: frozenset[int]) -> None:
        self.free_positions = takes(model, "position_ids")
        self._slices_logits = takes(model, "logits_to_keep")
        self._logit_modules = logit_modules

    def adopt(self, model: PreTrainedModel) -> None:
        model.set_attn_implementation("eager")

    def groups(self, counts: Sequence[int]) -> list[list[int]]:
        return by_length(counts)

    def forward(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        positions: Tensor,
        context: ForwardContext,
        logits_rows: Tensor | None,
    ) -> Tensor:
        plan, device = context.attention, tokens.device
        counts = [row.stop - row.start for row in plan.rows]
        batch, width = len(counts), max(counts)
        starts = [width * (row + 1) - count for row, count in enumerate(counts)]
        places = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        places_T = torch.cat(places).to(device)
        wanted_R = places_T[:0] if logits_rows is None else places_T[logits_rows]
        kept = 1 if len(wanted_R) == 0 else width - int((wanted_R % width).min())
        if not self._slices_logits:
            kept = width
        logits_R = wanted_R // width * kept + wanted_R % width - (width - kept)
        context.padding = Padding(places_T, logits_R, self._logit_modules)
        inputs: dict[str, Any] = as_input(spread(tokens, places_T, batch, width))
        if self.free_positions:
            inputs["position_ids"] = spread(positions, places_T, batch, width)
        if self._slices_logits:
            inputs["logits_to_keep"] = kept
        with forward_context(context):
            out = model(
                **inputs,
                attention_mask=_mask(plan, device),
                past_key_values=Cache([RowsLayer(plan, i, places_T, width) for i in range(_layers(model))]),
                use_cache=True,
            )
        logits: Tensor = out.logits.flatten(0, 1)
        return logits[:1] if logits_rows is None else logits[logits_R]


def by_length(counts: Sequence[int]) -> list[list[int]]:
    """Groups of rows that pad little, shortest rows first: one long row must not pad all others to its length."""
    groups: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(counts)), key=counts.__getitem__):
        count = counts[index]
        if groups and count * (len(groups[-1]) + 1) <= MAX_PADDED * (tokens + count):
            groups[-1].append(index)
            tokens += count
        else:
            groups.append([index])
            tokens = count
    return groups


def _layers(model: PreTrainedModel) -> int:
    count: int = model.config.num_hidden_layers
    return count


def _mask(plan: AttentionPlan, device: torch.device) -> Tensor:
    """[B, L], 1 where a row has an entry."""
    lengths = torch.tensor([row.past + row.stop - row.start for row in plan.rows], device=device)
    return (torch.arange(plan.longest, device=device) >= plan.longest - lengths[:, None]).long()


def spread(values: Tensor, places_T: Tensor, batch: int, width: int) -> Tensor:
    """[T, ...] -> [B, Q, ...], zeros at the pads."""
    out = values.new_zeros(batch * width, *values.shape[1:])
    out[places_T] = values
    return out.view(batch, width, *values.shape[1:])


class RowsLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer of the engine's KV cache, as the model sees it for one step."""

    def __init__(self, plan: AttentionPlan, layer: int, places_T: Tensor, width: int) -> None:
        super().__init__()
        self._plan = plan
        self._layer = layer
        self._places_T = places_T
        self._seen = plan.longest - width

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the entries are the engine's."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Shapes: [B, kv_heads, Q, D] of the new tokens and pads -> [B, kv_heads, L, D] of all entries."""
        key, value = (x.transpose(1, 2).flatten(0, 1)[self._places_T] for x in (key_states, value_states))
        self._seen = self._plan.longest
        return self._plan.extend(self._layer, key, value)

    def get_seq_length(self) -> int:
        """Columns before the new tokens; after the update, all."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Columns of the keys, and the first one's index."""
        return self._plan.longest, 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1


@dataclass(frozen=True, slots=True)
class Padding:
    """Which rows of a padded batch are tokens: `tokens` [T] of B * Q, and of the kept ones `logits` [R].

    Delta programs run on the tokens alone, the base modules on all rows.
    """

    tokens: Tensor
    logits: Tensor
    logit_modules: frozenset[int]

    def run(
        self,
        index: int,
        program: Program,
        context: ForwardContext,
        base: Callable[..., Any],
        x: Tensor,
        args: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        """What `program` makes of module `index`: the base's output, in a tuple where the base gives one."""
        if isinstance(program, MergedModule):  # what it makes of pads goes nowhere
            return program.run(context, base, x, args, kwargs)
        places = self.logits if index in self.logit_modules else self.tokens
        packed = _pack(x, places)
        whole: Any = None
        plain: Tensor | None = None

        def packed_base(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal whole, plain
            whole = base(x if given is packed else _unpack(given, x, places), *args, **kwargs)
            plain = _pack(whole[0] if isinstance(whole, tuple) else whole, places)
            return plain

        out = program.run(context, packed_base, packed, args, kwargs)
        if out is plain:  # nothing acts after the module's input
            return whole
        if isinstance(whole, tuple):
            return (_unpack(out, whole[0], places), *whole[1:])
        return _unpack(out, whole, places)


def _pack(x: Tensor, places: Tensor) -> Tensor:
    """The rows at `places`, [1, n, I]; of token ids [1, n]."""
    rows = x.flatten(0, -2) if x.is_floating_point() else x.flatten()
    return rows[places][None]


def _unpack(packed: Tensor, padded: Tensor, places: Tensor) -> Tensor:
    """`padded` with `packed` in the rows at `places`."""
    rows = padded.flatten(0, -2) if padded.is_floating_point() else padded.flatten()
    return rows.index_copy(0, places, packed[0]).view(padded.shape)
