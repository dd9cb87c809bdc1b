"""Attention over slots against plain attention in float64, for ragged mixes of prefill, chunks and decode."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.kernels.cpu_attention import CpuDecodeAttention
from serving.kernels.ops import DecodeAttention, ScoreRule, TokenHeads
from serving.model.kv_cache import KVShape, RowSpan, SlotKVCache

HEAD_DIM, SCALING = 8, 0.3


EXECUTORS = pytest.mark.parametrize("decode", [None, CpuDecodeAttention()], ids=["torch", "compiled"])


def cache(
    kv_heads: int, heads: int, decode: DecodeAttention | None = None, *, max_len: int = 32
) -> SlotKVCache:
    return SlotKVCache(
        KVShape(num_layers=2, num_kv_heads=kv_heads, num_heads=heads, head_dim=HEAD_DIM),
        num_slots=6,
        max_len=max_len,
        dtype=torch.float32,
        device=torch.device("cpu"),
        decode=decode,
    )


def plain(
    query: Tensor, key: Tensor, value: Tensor, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Causal attention of the last n tokens over all; query [n, H, D], key and value [L, K, D] -> [n, H, D]."""
    groups = query.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(groups, 1).double(), value.repeat_interleave(groups, 1).double()
    scores = torch.einsum("nhd,lhd->hnl", query.double(), k) * SCALING
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    count, length = query.shape[0], key.shape[0]
    entries, tokens = torch.arange(length)[None], torch.arange(count)[:, None] + length - count
    hidden = entries > tokens
    if window is not None:
        hidden |= entries <= tokens - window
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


class Rows:
    """Random sequences fed to a cache step by step; remembers what every row should attend to."""

    def __init__(
        self,
        kv_heads: int,
        heads: int,
        window: int | None = None,
        softcap: float | None = None,
        decode: DecodeAttention | None = None,
    ) -> None:
        self.options = (window, softcap)
        self.cache, self.kv_heads, self.heads = cache(kv_heads, heads, decode), kv_heads, heads
        self.known: dict[int, tuple[Tensor, Tensor]] = {}

    def prefix(self, slot: int, length: int) -> None:
        pairs = [
            (torch.randn(length, self.kv_heads, HEAD_DIM), torch.randn(length, self.kv_heads, HEAD_DIM))
        ] * 2
        self.cache.write_prefix(slot, pairs)
        self.known[slot] = pairs[1]

    def step(self, counts: dict[int, int]) -> float:
        """Append that many tokens to each slot, in the order given; the largest error of any row in layer 1."""
        spans, start = [], 0
        for slot, count in counts.items():
            past = self.known[slot][0].shape[0] if slot in self.known else 0
            spans.append(RowSpan(start, start + count, slot, past))
            start += count
        q = torch.randn(1, self.heads, start, HEAD_DIM)
        k, v = (torch.randn(1, self.kv_heads, start, HEAD_DIM) for _ in range(2))
        out = self.cache.plan(spans).attend(1, q, k, v, SCALING, *self.options)
        worst = 0.0
        for span in spans:
            new = slice(span.start, span.stop)
            key, value = k[0, :, new].transpose(0, 1), v[0, :, new].transpose(0, 1)
            if span.past:
                key, value = (
                    torch.cat([old, x]) for old, x in zip(self.known[span.slot], (key, value), strict=True)
                )
            self.known[span.slot] = (key, value)
            expected = plain(q[0, :, new].transpose(0, 1), key, value, *self.options)
            worst = max(worst, float((out[0, new].double() - expected).abs().max()))
        return worst


@EXECUTORS
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 30])
@pytest.mark.parametrize(("kv_heads", "heads"), [(4, 4), (2, 4), (1, 4)])
def test_ragged_steps_equal_plain_attention(
    kv_heads: int, heads: int, window: int | None, softcap: float | None, decode: DecodeAttention | None
) -> None:
    torch.manual_seed(0)
    rows = Rows(kv_heads, heads, window, softcap, decode)
    rows.prefix(3, 5)
    steps = [
        {0: 7, 3: 4, 1: 1},
        {1: 3, 0: 1, 3: 1, 5: 6},
        {5: 1, 1: 1, 0: 1, 3: 1},
        {3: 1},
        {5: 1, 0: 2},
        {0: 1, 1: 1, 3: 1, 5: 1},
    ]
    assert max(rows.step(step) for step in steps) < 2e-6


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (20, 0.8)])
def test_sparse_and_uneven_decodes_go_row_by_row_with_the_same_result(
    window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(1)
    rows = Rows(2, 4, window, softcap)
    rows.step({5: 30, 0: 1})
    plan = rows.cache.plan([RowSpan(0, 1, 0, 1), RowSpan(1, 2, 5, 30)])
    assert not plan.view(window).batched
    assert rows.step({0: 1, 5: 1}) < 2e-6


def test_a_batched_decode_reads_only_the_slots_from_the_lowest_used_one_to_the_highest() -> None:
    torch.manual_seed(1)
    rows = Rows(2, 4)
    rows.step({4: 30, 5: 28})
    rows.cache.keys[1][:4] = torch.nan  # what lies elsewhere must not matter
    plan = rows.cache.plan([RowSpan(0, 1, 4, 30), RowSpan(1, 2, 5, 28)])
    assert plan.view(None).batched
    assert rows.step({5: 1, 4: 1}) < 2e-6


def test_masks_are_made_once_per_window() -> None:
    rows = Rows(2, 4)
    rows.step({0: 9, 1: 4})
    plan = rows.cache.plan([RowSpan(0, 3, 0, 9), RowSpan(3, 4, 1, 4)])
    assert plan.view(4) is plan.view(4)
    assert plan.view(4) is not plan.view(None)
    assert plan.view(12) is plan.view(None)  # as long as the longest row: nothing is out of sight


@EXECUTORS
def test_reused_slot_does_not_see_its_former_owner(decode: DecodeAttention | None) -> None:
    torch.manual_seed(2)
    rows = Rows(2, 4, decode=decode)
    rows.step({2: 20})
    del rows.known[2]
    assert rows.step({2: 3}) < 2e-6
    assert rows.step({2: 1, 0: 1}) < 2e-6


def test_read_gives_back_what_was_written() -> None:
    store = cache(2, 4)
    pairs = [(torch.randn(3, 2, HEAD_DIM), torch.randn(3, 2, HEAD_DIM)) for _ in range(2)]
    store.write_prefix(4, pairs)
    for (key, value), (k, v) in zip(pairs, store.read(4, 3), strict=True):
        assert torch.equal(key, k)
        assert torch.equal(value, v)


def test_a_copied_prefix_is_attended_to_like_the_original() -> None:
    torch.manual_seed(3)
    rows = Rows(2, 4)
    rows.prefix(1, 5)
    rows.step({1: 20})
    rows.cache.copy(1, 4, 18)
    rows.known[4] = tuple(x[:18] for x in rows.known[1])  # type: ignore[assignment]
    assert rows.step({4: 3, 1: 1}) < 2e-6
    assert rows.step({4: 1, 1: 1}) < 2e-6


@pytest.mark.parametrize("max_len", [40, 4096])  # less than a page, and many pages
def test_clearing_zeroes_one_slot_and_no_other(max_len: int) -> None:
    store = cache(2, 4, max_len=max_len)
    for pool in (*store.keys, *store.values):
        pool.fill_(torch.nan)
    store.clear(2)
    for pool in (*store.keys, *store.values):
        assert not pool[2].any()
        assert pool[1].isnan().all()
        assert pool[3].isnan().all()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_clearing_gives_memory_back_and_an_unused_slot_takes_none() -> None:
    def resident_mib() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    before = resident_mib()
    store = cache(2, 4, max_len=1 << 18)  # 16 MiB a slot and pool, 6 slots, 4 pools
    assert store.entry_bytes * (1 << 18) == 64 * 2**20
    assert resident_mib() - before < 8
    for pool in (*store.keys, *store.values):
        pool[3].fill_(1.0)
    assert resident_mib() - before > 56
    store.clear(3)
    assert resident_mib() - before < 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_decode_takes_any_strides_and_both_dtypes(
    dtype: torch.dtype, pool_dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    heads, kv_heads, width, lengths = 6, 3, 20, (70, 1, 33)
    keys, values = (torch.randn(4, kv_heads, 80, width).to(pool_dtype) for _ in range(2))
    keys[:, :, 75:] = torch.nan  # beyond every row: must not be read
    before = keys.clone()
    query = torch.randn(5, heads, width).to(dtype).transpose(0, 1)
    key, value = (torch.randn(5, kv_heads, 2 * width).to(dtype)[..., ::2].transpose(0, 1) for _ in range(2))
    out = torch.zeros(5, heads, width, dtype=dtype)
    rows = torch.tensor([[4, 1, 2], [0, 3, 2], [n - 1 for n in lengths]])
    rule = ScoreRule(SCALING, None, None)
    CpuDecodeAttention().attend(out, TokenHeads(query, key, value), keys, values, rows, rule)
    for (token, slot, past), length in zip(rows.t().tolist(), lengths, strict=True):
        k = torch.cat([before[slot, :, :past], key[:, token, None].to(pool_dtype)], dim=1)
        assert torch.equal(keys[slot, :, : past + 1], k)
        expected = plain(
            query[:, token][None].float(),
            k.transpose(0, 1).float(),
            values[slot, :, :length].transpose(0, 1).float(),
        )
        limit = 2e-6 if dtype == torch.float32 else 2e-2
        assert float((out[token].double() - expected[0]).abs().max()) < limit
    assert not out[[0, 3]].any()


def test_a_nan_in_a_row_stays_in_that_row() -> None:
    keys, values = torch.zeros(2, 1, 8, 4), torch.ones(2, 1, 8, 4)
    keys[0, 0, 1, 2] = torch.nan
    heads = TokenHeads(*(torch.ones(1, 2, 4) for _ in range(3)))
    out = torch.zeros(2, 1, 4)
    rows = torch.tensor([[0, 1], [0, 1], [3, 3]])
    CpuDecodeAttention().attend(out, heads, keys, values, rows, ScoreRule(1.0, None, None))
    assert bool(out[0].isnan().all())
    assert torch.equal(out[1], torch.ones(1, 4))
