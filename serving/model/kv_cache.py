"""KV storage in contiguous slots, and attention of a ragged batch over it.

One slot a request: K and V are [num_slots, kv_heads, max_len, D] per layer, reserved whole and committed by the
operating system page by page, so reserving costs no memory. A delta's own keys and values are copied to the front of
the slot on admission. Pools start zeroed: garbage under a mask is 0 * NaN.
Legend: T tokens of the batch, B decode rows, H query heads, K kv heads, G = H / K, D head width, L cached length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DENSE_SHARE = 0.5
"""Batched decode reads every slot up to the highest used one; below this share of useful cells, go row by row."""


class RowSpan(NamedTuple):
    """Tokens [start, stop) of the batch are appended to `slot`, which already holds `past` entries."""

    start: int
    stop: int
    slot: int
    past: int


class SlotKVCache:
    """Keys and values of `num_slots` requests of up to `max_len` entries each. Entries include virtual tokens."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        num_heads: int,
        head_dim: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Half-precision attention with one query per key head runs at 2 GB/s on CPU; fp32 storage is faster there.
        slow_half = device.type == "cpu" and num_heads == num_kv_heads
        self.dtype = torch.float32 if slow_half else dtype
        self.device = device
        self.num_slots = num_slots
        self.max_len = max_len
        self.groups = num_heads // num_kv_heads
        shape = (num_slots, num_kv_heads, max_len, head_dim)
        self.keys = [self._reserve(shape) for _ in range(num_layers)]
        self.values = [self._reserve(shape) for _ in range(num_layers)]

    def _reserve(self, shape: tuple[int, ...]) -> Tensor:
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        width = torch.empty((), dtype=self.dtype).element_size()
        raw = np.zeros(int(np.prod(shape)) * width, dtype=np.uint8)  # lazily committed, unlike torch.zeros
        return torch.from_numpy(raw).view(self.dtype).view(shape)

    def write_prefix(self, slot: int, prefix: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy a delta's keys and values, [l, K, D] per layer, to the front of `slot`."""
        for layer, (key, value) in enumerate(prefix):
            length = key.shape[0]
            self.keys[layer][slot, :, :length] = key.transpose(0, 1)
            self.values[layer][slot, :, :length] = value.transpose(0, 1)

    def clear(self, slot: int) -> None:
        """Zero `slot`."""
        for pool in (*self.keys, *self.values):
            pool[slot].zero_()

    def read(self, slot: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Copies of the first `length` entries of `slot`, [length, K, D] per layer."""
        return [
            (key[slot, :, :length].transpose(0, 1).clone(), value[slot, :, :length].transpose(0, 1).clone())
            for key, value in zip(self.keys, self.values, strict=True)
        ]

    def plan(self, rows: Sequence[RowSpan]) -> SlotAttention:
        """The attention plan of one step."""
        return SlotAttention(self, rows)


class SlotAttention:
    """`AttentionPlan` over a `SlotKVCache`: masks and indices are made once and shared by all layers."""

    def __init__(self, cache: SlotKVCache, rows: Sequence[RowSpan]) -> None:
        self.cache = cache
        self.num_attended = 0
        self.prefills = [row for row in rows if row.stop - row.start > 1]
        self.decodes = [row for row in rows if row.stop - row.start == 1]
        self.only_decodes = not self.prefills
        self.masks = [self._prefill_mask(row) for row in self.prefills]
        if self.decodes:
            self._plan_decodes()

    def _prefill_mask(self, row: RowSpan) -> Tensor | None:
        if row.past == 0:
            return None
        count = row.stop - row.start
        mask = torch.full(
            (count, row.past + count), -torch.inf, dtype=self.cache.dtype, device=self.cache.device
        )
        return mask.triu_(row.past + 1)

    def _plan_decodes(self) -> None:
        device = self.cache.device
        lengths = [row.past + 1 for row in self.decodes]
        slots = [row.slot for row in self.decodes]
        self.tokens_B = torch.tensor([row.start for row in self.decodes], device=device)
        self.slots_B = torch.tensor(slots, device=device)
        self.past_B = torch.tensor([row.past for row in self.decodes], device=device)
        self.used_slots, self.longest = max(slots) + 1, max(lengths)
        self.batched = sum(lengths) >= DENSE_SHARE * self.used_slots * self.longest
        if self.batched:
            # idle slots attend to one entry: a row that is masked whole would be NaN
            visible = torch.ones(self.used_slots, dtype=torch.long, device=device)
            visible[self.slots_B] = self.past_B + 1
            hidden = torch.arange(self.longest, device=device)[None] >= visible[:, None]
            mask = torch.zeros(self.used_slots, 1, 1, self.longest, dtype=self.cache.dtype, device=device)
            self.decode_mask = mask.masked_fill_(hidden[:, None, None], -torch.inf)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """See `AttentionPlan.attend`. The result does not depend on the other rows beyond rounding."""
        cache = self.cache
        self.num_attended += 1
        query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1).to(cache.dtype) for x in (query, key, value))
        out = query_THD.new_empty(query_THD.shape)
        keys, values = cache.keys[layer], cache.values[layer]
        for row, mask in zip(self.prefills, self.masks, strict=True):
            out[row.start : row.stop] = self._prefill(
                row, mask, query_THD, key_TKD, value_TKD, keys, values, scaling
            )
        if self.decodes:
            chosen = slice(None) if self.only_decodes else self.tokens_B
            keys[self.slots_B, :, self.past_B] = key_TKD[chosen]
            values[self.slots_B, :, self.past_B] = value_TKD[chosen]
            decode = self._decode_batched if self.batched else self._decode_each
            out[chosen] = decode(query_THD[chosen], keys, values, scaling)
        return out.to(query.dtype)[None]

    def _prefill(
        self,
        row: RowSpan,
        mask: Tensor | None,
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
    ) -> Tensor:
        tokens, end = slice(row.start, row.stop), row.past + row.stop - row.start
        keys[row.slot, :, row.past : end] = key_TKD[tokens].transpose(0, 1)
        values[row.slot, :, row.past : end] = value_TKD[tokens].transpose(0, 1)
        attended = F.scaled_dot_product_attention(
            query_THD[tokens].transpose(0, 1)[None],
            keys[row.slot : row.slot + 1, :, :end],
            values[row.slot : row.slot + 1, :, :end],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=self.cache.groups > 1,
        )
        return attended[0].transpose(0, 1)

    def _decode_batched(self, query_BHD: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        # Heads that share a key head are packed as that head's queries: one read of the cache serves them all.
        count, heads, width = query_BHD.shape
        packed = query_BHD.new_zeros(self.used_slots, heads // self.cache.groups, self.cache.groups, width)
        packed[self.slots_B] = query_BHD.view(count, -1, self.cache.groups, width)
        attended = F.scaled_dot_product_attention(
            packed,
            keys[: self.used_slots, :, : self.longest],
            values[: self.used_slots, :, : self.longest],
            attn_mask=self.decode_mask,
            scale=scaling,
        )
        return attended[self.slots_B].view(count, heads, width)

    def _decode_each(self, query_BHD: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        _, heads, width = query_BHD.shape
        out = torch.empty_like(query_BHD)
        for index, row in enumerate(self.decodes):
            end = row.past + 1
            attended = F.scaled_dot_product_attention(
                query_BHD[index].view(1, -1, self.cache.groups, width),
                keys[row.slot : row.slot + 1, :, :end],
                values[row.slot : row.slot + 1, :, :end],
                scale=scaling,
            )
            out[index] = attended.view(heads, width)
        return out
