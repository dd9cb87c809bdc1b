"""T5's attention: what its tables add to the scores, by how far apart query and key are.

The layer that owns a table makes the bias and hands it to the layers after it. transformers makes one [H, Q, L] for a
whole batch; here it stays a rule, since flattened rows differ in length, and each row asks for its own part.
Legend: H heads, n new tokens of a row, B rows of one token, T tokens of the batch, L entries of the longest row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serving.model.context import active_context

if TYPE_CHECKING:
    from serving.model.context import AttentionPlan


class DistanceBias:
    """The bias that one table gives for one step: by how far a token's position is from the place of an entry.

    A delta's prefix counts among the entries, as in T5 with past keys. Whether it counts in the positions of tokens too
    is the delta's (`Delta.position_offset`): it does under PEFT; under AdapterHub tokens are positioned as without it,
    and so are further from one another than in the backbone. An encoder's tokens never count it.
    """

    def __init__(self, owner: Any, positions: Tensor) -> None:
        self._owner = owner
        self._positions = positions
        self._singles: tuple[Tensor, Tensor] | None = None

    def between(self, tokens: Tensor, places: Tensor) -> Tensor:
        """What tokens [n] of the batch see at `places`, [L] or each at its own, [n, L] -> [H, n, L]."""
        owner = self._owner
        buckets = owner._relative_position_bucket(
            places - self._positions[tokens][:, None],
            bidirectional=not owner.is_decoder,
            num_buckets=owner.relative_attention_num_buckets,
            max_distance=owner.relative_attention_max_distance,
        )
        bias: Tensor = owner.relative_attention_bias(buckets).permute(2, 0, 1)
        return bias

    def attend(
        self, plan: AttentionPlan, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Causal attention over the KV cache; see `AttentionPlan.attend`."""
        keys, values = plan.extend(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
        query_THD = query[0].transpose(0, 1)
        out = torch.empty_like(query_THD)
        singles = [i for i, row in enumerate(plan.rows) if row.stop - row.start == 1]
        if singles:
            if self._singles is None:
                self._singles = self._of_singles(plan, singles)
            mask, tokens = self._singles
            chosen = slice(None) if len(singles) == len(plan.rows) else singles
            attended = F.scaled_dot_product_attention(
                query_THD[tokens][:, :, None],
                keys[chosen],
                values[chosen],
                attn_mask=mask.to(query.dtype),
                scale=scaling,
            )
            out[tokens] = attended[:, :, 0]
        for index, row in enumerate(plan.rows):
            count, length = row.stop - row.start, row.past + row.stop - row.start
            if count == 1:
                continue
            later = torch.full((count, length), -torch.inf, device=query.device).triu(length - count + 1)
            tokens, places = (torch.arange(*ends, device=query.device) for ends in (row[:2], (length,)))
            attended = F.scaled_dot_product_attention(
                query_THD[row.start : row.stop].transpose(0, 1),
                keys[index, :, -length:],
                values[index, :, -length:],
                attn_mask=(self.between(tokens, places) + later).to(query.dtype),
                scale=scaling,
            )
            out[row.start : row.stop] = attended.transpose(0, 1)
        return out[None]

    def _of_singles(self, plan: AttentionPlan, singles: list[int]) -> tuple[Tensor, Tensor]:
        """The mask [B, H, 1, L] of the rows of one token, which are aligned to the right, and these tokens [B]."""
        device, rows = self._positions.device, [plan.rows[index] for index in singles]
        starts = torch.tensor([plan.longest - row.past - 1 for row in rows], device=device)
        tokens = torch.tensor([row.start for row in rows], device=device)
        places = torch.arange(plan.longest, device=device)[None] - starts[:, None]
        mask = self.between(tokens, places).masked_fill(places < 0, -torch.inf)
        return mask.transpose(0, 1)[:, :, None], tokens


def give_rules(model: nn.Module) -> None:
    """Let the layers of `model` that own a table hand on rules in place of tensors."""
    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            _give_rule(module)


def _give_rule(owner: Any) -> None:
    def compute_bias(*_args: Any, **_kwargs: Any) -> DistanceBias:
        context = active_context()
        assert context is not None, "a forward pass outside the engine"
        assert context.positions is not None, "a layout that gives no positions"
        return DistanceBias(owner, context.positions)

    owner.compute_bias = compute_bias
