"""Encoders: rows run whole, flattened to [1, T], and attend in both directions; nothing is kept between steps.

The body of the transformers model runs alone; its pooler and its masked language model head then run on the rows of the
final hidden states that are asked for, as many as there are requests or masks instead of one per token.
Legend: T tokens of the batch, R wanted rows, H query heads, K kv heads, D head width, d hidden width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from adapters.errors import BackboneRefused
from serving.model.attention import ATTENTION_NAME
from serving.model.context import ForwardContext, active_context, forward_context
from serving.model.distance_bias import DistanceBias
from serving.model.kv_cache import RowSpan
from serving.model.layout import as_input, require_positions, takes

Prefix = Sequence[tuple[Tensor, Tensor]]
"""A delta's keys and values per layer, each [l, K, D]."""


class BareEncoder(nn.Module):
    """A body without a head, under the name that it has inside models with one: adapters are saved from those."""

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.config = body.config
        self._name: str = body.base_model_prefix
        setattr(self, self._name, body)

    @property
    def base_model(self) -> PreTrainedModel:
        """The body."""
        body: PreTrainedModel = getattr(self, self._name)
        return body

    def set_attn_implementation(self, name: str) -> None:
        """As transformers' own method."""
        self.base_model.set_attn_implementation(name)


def load_encoder(source: str, config: PreTrainedConfig) -> PreTrainedModel | BareEncoder:
    """The encoder at `source` with what its checkpoint has of pooler and masked language model head.

    Raises OSError and ValueError as transformers does.
    """
    options: dict[str, Any] = {"dtype": "auto", "attn_implementation": "eager"}
    body, found = AutoModel.from_pretrained(source, output_loading_info=True, **options)
    missing = set(found["missing_keys"])
    if any(key.startswith("pooler.") for key in missing):
        body.pooler = None
    if others := sorted(key for key in missing if not key.startswith("pooler.")):
        raise ValueError(f"the checkpoint lacks {others[0]} and {len(others) - 1} other tensors")
    kinds = config.architectures or ()
    if any(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in kinds):
        model, found = AutoModelForMaskedLM.from_pretrained(source, output_loading_info=True, **options)
        if not found["missing_keys"]:
            setattr(model, model.base_model_prefix, body)
            model.tie_weights()
            return model
    return BareEncoder(body)


class RowAttention:
    """`AttentionPlan` of whole rows, each with the prefix of its delta; rows of one length attend together."""

    def __init__(self, rows: Sequence[RowSpan], prefixes: Sequence[Prefix | None]) -> None:
        self.rows = rows
        self.attended: list[tuple[int, int | None]] = []
        self.longest = max((row.past + row.stop - row.start for row in rows), default=0)
        by_length: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            by_length[row.stop - row.start, row.past].append(index)
        self._groups = [
            _Group(
                torch.stack([torch.arange(rows[i].start, rows[i].stop) for i in members]),
                [found for i in members if (found := prefixes[i]) is not None and past],
            )
            for (_, past), members in by_length.items()
        ]

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
        """See `AttentionPlan.attend`; a token sees those less than `window` away. Raises BackboneRefused."""
        if softcap is not None:
            raise BackboneRefused("Encoders with bounded scores are not served.", param="backbone")
        self.attended.append((layer, window))
        query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
        out = query_THD.new_empty(query_THD.shape)
        for places, prefixes in self._groups:
            keys, values = (x[places].transpose(1, 2) for x in (key_TKD, value_TKD))
            if prefixes:
                keys = torch.cat([_stacked(prefixes, layer, 0).to(keys.dtype), keys], dim=2)
                values = torch.cat([_stacked(prefixes, layer, 1).to(values.dtype), values], dim=2)
            attended = F.scaled_dot_product_attention(
                query_THD[places].transpose(1, 2),
                keys,
                values,
                attn_mask=_near(places.shape[1], keys.shape[2], window, query)
                if bias is None
                else bias.between(places[0], torch.arange(keys.shape[2], device=keys.device)).to(query.dtype),
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            out[places] = attended.transpose(1, 2)
        return out[None]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `AttentionPlan.extend`: only models that keep keys and values do."""
        raise NotImplementedError("encoders have no cache")


class _Group(NamedTuple):
    """Rows of one length: their tokens [rows, n], and their prefixes, of one length too, or none."""

    places: Tensor
    prefixes: list[Prefix]


def _stacked(prefixes: Sequence[Prefix], layer: int, which: int) -> Tensor:
    """[rows, K, l, D]."""
    return torch.stack([prefix[layer][which] for prefix in prefixes]).transpose(1, 2)


def _near(count: int, length: int, window: int | None, like: Tensor) -> Tensor | None:
    """The mask [count, length] of a window in entries, as transformers counts them; None where all are in sight."""
    if window is None or window >= length:
        return None
    past = length - count
    distance = torch.arange(length)[None] - torch.arange(past, length)[:, None]
    return (distance.abs() < window).to(like.device)


class RowStore:
    """What takes the place of a KV cache: the prefixes of the rows of the coming step, and nothing after it."""

    entry_bytes = 0

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self._prefixes: dict[int, Prefix] = {}

    def write_prefix(self, slot: int, prefix: Prefix) -> None:
        """The row in `slot` attends to `prefix`."""
        self._prefixes[slot] = prefix

    def clear(self, slot: int) -> None:
        """Forget the row in `slot`."""
        self._prefixes.pop(slot, None)

    def copy(self, source: int, target: int, length: int) -> None:
        """Nothing is kept that could be copied."""
        raise NotImplementedError("encoders have no cache")

    def plan(self, rows: Sequence[RowSpan]) -> RowAttention:
        """The attention plan of one step; a row with `past` entries has a prefix of that many.

        Prefixes are handed over: what is evicted after the step must not be held on to here.
        """
        return RowAttention(rows, [self._prefixes.pop(row.slot) if row.past else None for row in rows])


class WholeRows:
    """All tokens in one row, [1, T], positions given; attention is ours."""

    name = "whole rows"
    sees_queries = True
    free_positions = True

    def __init__(self) -> None:
        self._takes_types = False

    def adopt(self, model: PreTrainedModel | BareEncoder) -> None:
        """Set `model` up. Raises BackboneRefused where its body takes no positions."""
        require_positions(model.base_model)
        self._takes_types = takes(model.base_model, "token_type_ids")
        model.set_attn_implementation(ATTENTION_NAME)

    def groups(self, counts: Sequence[int]) -> list[list[int]]:
        """All rows run together."""
        return [list(range(len(counts)))]

    def forward(
        self,
        model: PreTrainedModel | BareEncoder,
        tokens: Tensor,
        positions: Tensor,
        context: ForwardContext,
        logits_rows: Tensor | None,
    ) -> Tensor:
        """The final hidden states [T, d] of the body. `logits_rows` must be None: `masked_logits` makes logits."""
        assert logits_rows is None, "an encoder's logits are made of wanted rows"
        inputs = as_input(tokens[None])
        if context.token_types is not None and self._takes_types:
            inputs["token_type_ids"] = context.token_types[None]
        with forward_context(context):
            states: Tensor = model.base_model(**inputs, position_ids=positions[None]).last_hidden_state
        context.hidden = None  # a model with a final norm filled it there
        context.keep_hidden(states)
        return states[0]


def install_replay(model: PreTrainedModel | BareEncoder) -> None:
    """Let the body answer with the states of `ForwardContext.replayed` where there are some: the head runs on them."""
    body = model.base_model
    base = body.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        context = active_context()
        if context is not None and context.replayed is not None:
            return BaseModelOutput(last_hidden_state=context.replayed[None])
        return base(*args, **kwargs)

    body.forward = forward


def masked_logits(model: PreTrainedModel, states: Tensor, context: ForwardContext) -> Tensor:
    """Logits [R, V] of the masked language model head for final hidden states [R, d], in the model's dtype."""
    context.replayed = states
    with forward_context(context):
        logits: Tensor = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=states.device)).logits
    return logits[0]


def pooled(model: PreTrainedModel | BareEncoder, states: Tensor, context: ForwardContext) -> Tensor:
    """What the body's pooler makes of the first states of R rows, [R, d] -> [R, d]."""
    pooler: Any = model.base_model.pooler
    with forward_context(context):
        out: Tensor = pooler(states[:, None])
    return out
