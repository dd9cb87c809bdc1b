"""KV storage in contiguous slots, and attention of a ragged batch over it.

One slot a request: K and V are [num_slots, kv_heads, max_len, D] per layer, reserved whole and committed by the
operating system page by page, so reserving costs no memory; a slot that is cleared gives its pages back. A delta's own
keys and values are copied to the front of the slot on admission. Pools start zeroed: garbage under a mask is 0 * NaN.
Legend: T tokens of the batch, B decode rows, H query heads, K kv heads, G = H / K, D head width, L cached length.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels.ops import DecodeAttention, ScoreRule, TokenHeads
from serving.model.distance_bias import DistanceBias

DENSE_SHARE = 0.5
"""Batched decode reads every slot from the lowest used one to the highest; below this share of useful cells, go row by
row."""


class RowSpan(NamedTuple):
    """Tokens [start, stop) of the batch are appended to `slot`, which already holds `past` entries."""

    start: int
    stop: int
    slot: int
    past: int


class KVShape(NamedTuple):
    """What one entry is made of."""

    num_layers: int
    num_kv_heads: int
    num_heads: int
    head_dim: int


class SlotKVCache:
    """Keys and values of `num_slots` requests of up to `max_len` entries each. Entries include virtual tokens."""

    def __init__(
        self,
        shape: KVShape,
        *,
        num_slots: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        decode: DecodeAttention | None,
    ) -> None:
        # torch's half-precision attention with one query per key head runs at 2 GB/s on CPU; fp32 is faster there
        slow_half = device.type == "cpu" and decode is None and shape.num_heads == shape.num_kv_heads
        self.decode = decode
        self.dtype = torch.float32 if slow_half else dtype
        self.device = device
        self.num_slots = num_slots
        self.max_len = max_len
        self.groups = shape.num_heads // shape.num_kv_heads
        self._shape = (num_slots, shape.num_kv_heads, max_len, shape.head_dim)
        self._maps: list[mmap.mmap] = []
        self.keys = [self._reserve() for _ in range(shape.num_layers)]
        self.values = [self._reserve() for _ in range(shape.num_layers)]

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry, over all layers."""
        _, num_kv_heads, _, head_dim = self._shape
        return 2 * len(self.keys) * num_kv_heads * head_dim * self.dtype.itemsize

    @property
    def _slot_bytes(self) -> int:
        return math.prod(self._shape[1:]) * self.dtype.itemsize

    def _reserve(self) -> Tensor:
        size = self.num_slots * self._slot_bytes
        if self.device.type != "cpu" or sys.platform != "linux" or not size:
            return torch.zeros(self._shape, dtype=self.dtype, device=self.device)
        # committed lazily, unlike torch.zeros; pages of a private mapping can be given back
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._maps.append(pages)
        return torch.frombuffer(pages, dtype=self.dtype).view(self._shape)

    def write_prefix(self, slot: int, prefix: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy a delta's keys and values, [l, K, D] per layer, to the front of `slot`."""
        for layer, (key, value) in enumerate(prefix):
            length = key.shape[0]
            self.keys[layer][slot, :, :length] = key.transpose(0, 1)
            self.values[layer][slot, :, :length] = value.transpose(0, 1)

    def clear(self, slot: int) -> None:
        """Zero `slot`, giving whole pages back to the operating system where that is possible."""
        if not self._maps:
            for pool in (*self.keys, *self.values):
                pool[slot].zero_()
            return
        size = self._slot_bytes
        begin, end = slot * size, (slot + 1) * size
        first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        for pages in self._maps:
            if first >= last:
                pages[begin:end] = bytes(size)
                continue
            pages.madvise(mmap.MADV_DONTNEED, first, last - first)  # reads as zero from now on
            pages[begin:first] = bytes(first - begin)
            pages[last:end] = bytes(end - last)

    def copy(self, source: int, target: int, stop: int, start: int = 0) -> None:
        """Copy entries [start, stop) of slot `source` to the same places of slot `target`."""
        for pool in (*self.keys, *self.values):
            pool[target, :, start:stop] = pool[source, :, start:stop]

    def read(self, slot: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """Copies of the first `length` entries of `slot`, [length, K, D] per layer."""
        return [
            (key[slot, :, :length].transpose(0, 1).clone(), value[slot, :, :length].transpose(0, 1).clone())
            for key, value in zip(self.keys, self.values, strict=True)
        ]

    def plan(self, rows: Sequence[RowSpan]) -> SlotAttention:
        """The attention plan of one step."""
        return SlotAttention(self, rows)


@dataclass(slots=True)
class View:
    """What the rows of one step see through one window; made once and shared by the layers that have it.

    `prefills`: per row the first visible entry and the mask from there on, None for plain causal.
    """

    window: int | None
    prefills: list[tuple[int, Tensor | None]]
    batched: bool
    decode_mask: Tensor | None


class Entries(NamedTuple):
    """Where the tokens of one step go, and where all entries of its rows are, rows aligned to the right.

    Shapes: token_slots, token_entries [T], row_slots [B, 1], row_entries [B, L].
    """

    token_slots: Tensor
    token_entries: Tensor
    row_slots: Tensor
    row_entries: Tensor


class SlotAttention:
    """`AttentionPlan` over a `SlotKVCache`: masks and indices are made once per window and shared by all layers.

    A window counts entries, virtual tokens included: as in transformers, whose masks compare cache indices, a
    delta's prefix leaves the window when w real tokens have followed it.
    """

    def __init__(self, cache: SlotKVCache, rows: Sequence[RowSpan]) -> None:
        self.cache = cache
        self.rows = rows
        self.attended: list[tuple[int, int | None]] = []
        self.prefills = [row for row in rows if row.stop - row.start > 1]
        self.decodes = [row for row in rows if row.stop - row.start == 1]
        self.only_decodes = not self.prefills
        self.longest = max(row.past + row.stop - row.start for row in rows)
        self._views: dict[int | None, View] = {}
        self._entries: Entries | None = None
        if self.decodes:
            device = cache.device
            columns = [(row.start, row.slot, row.past) for row in self.decodes]
            self.rows_3B = torch.tensor(columns, device=device).t().contiguous()
            self.tokens_B, self.slots_B, self.past_B = self.rows_3B
            # slots outside the used ones are not read: retained prefixes lie around those that run
            first = min(row.slot for row in self.decodes)
            self.used = slice(first, max(row.slot for row in self.decodes) + 1)
            self.num_used = self.used.stop - first
            self.places_B = self.slots_B - first
            self.longest_decode = max(row.past for row in self.decodes) + 1

    def view(self, window: int | None) -> View:
        """What layers with this window see."""
        if window is not None and window >= self.longest:  # nothing is out of sight
            window = None
        found = self._views.get(window)
        if found is None:
            found = self._views[window] = self._make_view(window)
        return found

    def _make_view(self, window: int | None) -> View:
        prefills = [self._prefill_view(row, window) for row in self.prefills]
        if self.cache.decode is not None:  # it needs no masks
            return View(window, prefills, batched=False, decode_mask=None)
        lengths = [min(row.past + 1, window or row.past + 1) for row in self.decodes]
        batched = bool(lengths) and sum(lengths) >= DENSE_SHARE * self.num_used * self.longest_decode
        return View(window, prefills, batched, self._decode_mask(window) if batched else None)

    def _prefill_view(self, row: RowSpan, window: int | None) -> tuple[int, Tensor | None]:
        count = row.stop - row.start
        if row.past == 0 and (window is None or count <= window):
            return 0, None
        begin = 0 if window is None else max(0, row.past + 1 - window)
        shape = (count, row.past + count - begin)
        wall = torch.full(shape, -torch.inf, dtype=self.cache.dtype, device=self.cache.device)
        later = wall.triu(row.past + 1 - begin)
        return begin, later if window is None else later + wall.tril(row.past - begin - window)

    def _decode_mask(self, window: int | None) -> Tensor:
        device = self.cache.device
        # idle slots attend to one entry: a row that is masked whole would be NaN
        visible = torch.ones(self.num_used, dtype=torch.long, device=device)
        visible[self.places_B] = self.past_B + 1
        entries = torch.arange(self.longest_decode, device=device)[None]
        hidden = entries >= visible[:, None]
        if window is not None:
            hidden |= entries < visible[:, None] - window
        mask = torch.zeros(self.num_used, 1, 1, self.longest_decode, dtype=self.cache.dtype, device=device)
        return mask.masked_fill_(hidden[:, None, None], -torch.inf)

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
        """See `AttentionPlan.attend`. The result does not depend on the other rows beyond rounding."""
        if bias is not None:
            return bias.attend(self, layer, query, key, value, scaling)
        cache = self.cache
        self.attended.append((layer, window))
        view = self.view(window)
        rule, scores = ScoreRule(scaling, softcap, view.window), _Scores(scaling, softcap)
        keys, values = cache.keys[layer], cache.values[layer]
        if cache.decode is not None and self.only_decodes:  # nothing to convert or to transpose
            out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
            cache.decode.attend(out, TokenHeads(query[0], key[0], value[0]), keys, values, self.rows_3B, rule)
            return out[None]
        query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1).to(cache.dtype) for x in (query, key, value))
        out = query_THD.new_empty(query_THD.shape)
        for row, (begin, mask) in zip(self.prefills, view.prefills, strict=True):
            tokens, end = slice(row.start, row.stop), row.past + row.stop - row.start
            keys[row.slot, :, row.past : end] = key_TKD[tokens].transpose(0, 1)
            values[row.slot, :, row.past : end] = value_TKD[tokens].transpose(0, 1)
            attended = scores.attend(
                query_THD[tokens].transpose(0, 1)[None],
                keys[row.slot : row.slot + 1, :, begin:end],
                values[row.slot : row.slot + 1, :, begin:end],
                mask,
                causal=mask is None,
            )
            out[tokens] = attended[0].transpose(0, 1)
        if self.decodes and cache.decode is not None:
            heads = TokenHeads(*(x.transpose(0, 1) for x in (query_THD, key_TKD, value_TKD)))
            cache.decode.attend(out, heads, keys, values, self.rows_3B, rule)
        elif self.decodes:
            chosen = slice(None) if self.only_decodes else self.tokens_B
            keys[self.slots_B, :, self.past_B] = key_TKD[chosen]
            values[self.slots_B, :, self.past_B] = value_TKD[chosen]
            decode = self._decode_batched if view.batched else self._decode_each
            out[chosen] = decode(query_THD[chosen], keys, values, view, scores)
        return out.to(query.dtype)[None]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `AttentionPlan.extend`."""
        self.attended.append((layer, None))
        if self._entries is None:
            self._entries = self._make_entries()
        at = self._entries
        found = []
        for pool, new_TKD in ((self.cache.keys[layer], key), (self.cache.values[layer], value)):
            pool[at.token_slots, :, at.token_entries] = new_TKD.to(pool.dtype)
            rows_BLKD = pool.transpose(1, 2)[at.row_slots, at.row_entries]
            found.append(rows_BLKD.transpose(1, 2).to(new_TKD.dtype))
        return found[0], found[1]

    def _make_entries(self) -> Entries:
        device = self.cache.device
        counts = torch.tensor([row.stop - row.start for row in self.rows], device=device)
        slots = torch.tensor([row.slot for row in self.rows], device=device)
        entries = [torch.arange(row.past, row.past + row.stop - row.start) for row in self.rows]
        lengths = torch.tensor([row.past for row in self.rows], device=device) + counts
        columns = torch.arange(self.longest, device=device)[None] - (self.longest - lengths[:, None])
        return Entries(
            token_slots=slots.repeat_interleave(counts),
            token_entries=torch.cat(entries).to(device),
            row_slots=slots[:, None],
            row_entries=columns.clamp_(min=0),  # to the left of a row stands its own first entry
        )

    def _decode_batched(
        self, query_BHD: Tensor, keys: Tensor, values: Tensor, view: View, scores: _Scores
    ) -> Tensor:
        # Heads that share a key head are packed as that head's queries: one read of the cache serves them all.
        count, heads, width = query_BHD.shape
        packed = query_BHD.new_zeros(self.num_used, heads // self.cache.groups, self.cache.groups, width)
        packed[self.places_B] = query_BHD.view(count, -1, self.cache.groups, width)
        attended = scores.attend(
            packed,
            keys[self.used, :, : self.longest_decode],
            values[self.used, :, : self.longest_decode],
            view.decode_mask,
        )
        return attended[self.places_B].view(count, heads, width)

    def _decode_each(
        self, query_BHD: Tensor, keys: Tensor, values: Tensor, view: View, scores: _Scores
    ) -> Tensor:
        _, heads, width = query_BHD.shape
        out = torch.empty_like(query_BHD)
        for index, row in enumerate(self.decodes):
            end = row.past + 1
            begin = 0 if view.window is None else max(0, end - view.window)
            attended = scores.attend(
                query_BHD[index].view(1, -1, self.cache.groups, width),
                keys[row.slot : row.slot + 1, :, begin:end],
                values[row.slot : row.slot + 1, :, begin:end],
                None,
            )
            out[index] = attended.view(heads, width)
        return out


class _Scores(NamedTuple):
    """How scores are made of queries and keys, and attention of scores."""

    scaling: float
    softcap: float | None

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, causal: bool = False
    ) -> Tensor:
        """Softmax attention.

        Shapes: query [S, H, n, D], keys and values [S, K, L, D], mask [n, L] or [S, 1, 1, L] added to the scores
        -> [S, H, n, D]. `causal` means n = L.
        """
        if self.softcap is None:
            return F.scaled_dot_product_attention(
                query,
                keys,
                values,
                attn_mask=mask,
                is_causal=causal,
                scale=self.scaling,
                enable_gqa=query.shape[1] != keys.shape[1],
            )
        # Semantics: scores = softcap * tanh(q·k * scaling / softcap), which SDPA can't; in fp32, rounded once.
        slots, heads, count, width = query.shape
        groups = heads // keys.shape[1]
        packed = query.reshape(slots, -1, groups * count, width).float()
        scores = packed @ keys.float().transpose(-1, -2) * self.scaling
        scores = torch.tanh(scores / self.softcap) * self.softcap
        if causal:
            mask = torch.full((count, count), -torch.inf, device=query.device).triu(1)
        if mask is not None:
            scores += mask.repeat(groups, 1) if mask.dim() == 2 else mask
        attended = torch.softmax(scores, dim=-1) @ values.float()
        return attended.view(query.shape).to(query.dtype)
