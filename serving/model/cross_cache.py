"""The cache of an encoder-decoder: beside each slot's own keys and values, those of the tokens that its encoder read.

Cross keys and values are computed once per request, in the pass of the encoder, and only read afterwards. A slot's have
an identity: copying a slot whose target holds the same ones (beams of one request) copies the decoder's entries alone.
Legend: T tokens of the batch, B rows of one token, S tokens that the encoder read, H query heads, K kv heads, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from serving.kernels.ops import DecodeAttention, ScoreRule, TokenHeads
from serving.model.encoder import Prefix, RowAttention
from serving.model.kv_cache import KVShape, RowSpan, SlotAttention, SlotKVCache


class CrossCache:
    """Two slot caches of one shape: `own` for the decoder's tokens, `cross` for the encoder's."""

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
        self.own, self.cross = (
            SlotKVCache(
                shape, num_slots=num_slots, max_len=max_len, dtype=dtype, device=device, decode=decode
            )
            for _ in range(2)
        )
        self.num_slots = num_slots
        self.max_len = max_len
        self._lengths = [0] * num_slots
        self._identities: list[object] = [object() for _ in range(num_slots)]

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry over all layers, the same in both."""
        return self.own.entry_bytes

    def write_prefix(self, slot: int, prefix: Prefix) -> None:
        """See `SlotKVCache.write_prefix`: the decoder's own."""
        self.own.write_prefix(slot, prefix)

    def begin_source(self, slots: Sequence[int], length: int, prefix: Prefix | None) -> None:
        """All of `slots` are about to hold one encoder row of `length` tokens, behind a delta's own keys and values."""
        identity = object()
        past = 0 if prefix is None else prefix[0][0].shape[0]
        for slot in slots:
            if prefix is not None:
                self.cross.write_prefix(slot, prefix)
            self._lengths[slot], self._identities[slot] = past + length, identity

    def write_source(self, slots: Sequence[int], layer: int, key: Tensor, value: Tensor) -> None:
        """Cross keys and values of one layer, [S, K, D] each, of the row that was begun for `slots`."""
        for slot in slots:
            end = self._lengths[slot]
            self.cross.keys[layer][slot, :, end - len(key) : end] = key.transpose(0, 1)
            self.cross.values[layer][slot, :, end - len(value) : end] = value.transpose(0, 1)

    def clear(self, slot: int) -> None:
        """See `SlotKVCache.clear`."""
        self.own.clear(slot)
        self.cross.clear(slot)
        self._lengths[slot], self._identities[slot] = 0, object()

    def copy(self, source: int, target: int, stop: int, start: int = 0) -> None:
        """Copy entries [start, stop), and what the encoder made unless `target` has the same."""
        self.own.copy(source, target, stop, start)
        if self._identities[source] is not self._identities[target]:
            self.cross.copy(source, target, self._lengths[source])
            self._lengths[target] = self._lengths[source]
            self._identities[target] = self._identities[source]

    def plan(self, rows: Sequence[RowSpan]) -> SlotAttention:
        """The decoder's attention to its own tokens in one step."""
        return self.own.plan(rows)

    def plan_cross(self, rows: Sequence[RowSpan]) -> CrossAttention:
        """The decoder's attention to the encoder's tokens in one step."""
        return CrossAttention(self.cross, rows, [self._lengths[row.slot] for row in rows])

    @staticmethod
    def plan_encoder(rows: Sequence[RowSpan], prefixes: Sequence[Prefix | None]) -> RowAttention:
        """The encoder's attention in its pass over whole rows."""
        return RowAttention(rows, prefixes)


class CrossAttention:
    """`CrossPlan` over the cross half of a `CrossCache`: every token of a row sees all of its slot's entries."""

    def __init__(self, cache: SlotKVCache, rows: Sequence[RowSpan], lengths: Sequence[int]) -> None:
        self.cache = cache
        self.attended: list[int] = []
        self._longer = [(row, n) for row, n in zip(rows, lengths, strict=True) if row.stop - row.start > 1]
        singles = [
            (row.start, row.slot, n - 1)
            for row, n in zip(rows, lengths, strict=True)
            if row.stop - row.start == 1
        ]
        self._singles = torch.tensor(singles, device=cache.device).view(-1, 3).t().contiguous()
        self._mask: Tensor | None = None
        self._longest = max((last + 1 for _, _, last in singles), default=0)

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """See `CrossPlan.attend`."""
        self.attended.append(layer)
        cache = self.cache
        keys, values = cache.keys[layer], cache.values[layer]
        query_THD = query[0].transpose(0, 1).to(cache.dtype)
        out = query_THD.new_empty(query_THD.shape)
        if self._longest:
            self._attend_singles(out, query_THD, keys, values, scaling)
        for row, length in self._longer:
            attended = _softmax(
                query_THD[row.start : row.stop].transpose(0, 1)[None],
                keys[row.slot : row.slot + 1, :, :length],
                values[row.slot : row.slot + 1, :, :length],
                None,
                scaling,
            )
            out[row.start : row.stop] = attended[0].transpose(0, 1)
        return out.to(query.dtype)[None]

    def _attend_singles(
        self, out: Tensor, query_THD: Tensor, keys: Tensor, values: Tensor, scaling: float
    ) -> None:
        tokens_B, slots_B, last_B = self._singles
        if self.cache.decode is not None:
            # the kernel of decode steps appends an entry first: it is given the last one, which stays what it is
            last = [pool[slots_B, :, last_B] for pool in (keys, values)]
            if self._longer:
                count = len(query_THD)
                last = [x.new_zeros(count, *x.shape[1:]).index_copy(0, tokens_B, x) for x in last]
            heads = TokenHeads(*(x.transpose(0, 1) for x in (query_THD, *last)))
            self.cache.decode.attend(out, heads, keys, values, self._singles, ScoreRule(scaling, None, None))
            return
        if self._mask is None:
            hidden = torch.arange(self._longest, device=keys.device)[None] > last_B[:, None]
            mask = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device)
            self._mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        attended = _softmax(
            query_THD[tokens_B][:, :, None],
            keys[slots_B, :, : self._longest],
            values[slots_B, :, : self._longest],
            self._mask,
            scaling,
        )
        out[tokens_B] = attended[:, :, 0]


def _softmax(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
