"""Memory for one delta's weights on CPU: side by side in the order in which the modules run, in huge pages.

A decode step reads every weight of its deltas once. In pages of 4 KiB that is a walk of the page tables for every few
rows, and a delta's tensors, allocated one by one, lie wherever the allocator had room. Each block is a mapping of its
own, so nothing is fragmented and a freed block's pages go back to the system at once. It is freed when the last tensor
in it is gone: whoever holds weights, a kernel's tables too, can't see them overwritten.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ALIGNMENT = 64
"""Bytes: a cache line and the widest vector."""


class WeightBlock:
    """Room for tensors of `limit_bytes` in all, counted by `padded_bytes`. No page is taken before it is written to."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = whole_pages(max(1, limit_bytes))
        mapping = mmap.mmap(-1, self._limit + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        start = -whole.data_ptr() % HUGE_PAGE
        self._huge = self._limit // HUGE_PAGE * HUGE_PAGE
        if self._huge and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them: the same in plain pages
                mapping.madvise(mmap.MADV_HUGEPAGE, start, self._huge)
        self._bytes = whole[start : start + self._limit]
        self._end = 0

    @property
    def taken_bytes(self) -> int:
        """Bytes of memory behind the tensors, whole pages."""
        return _round_up(self._end, HUGE_PAGE) if self._end < self._huge else whole_pages(self._end)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next `shape` elements, contiguous and not initialised."""
        size = math.prod(shape) * dtype.itemsize
        start, self._end = self._end, self._end + padded_bytes(size)
        assert self._end <= self._limit, (self._end, self._limit)
        return self._bytes[start : start + size].view(dtype).view(shape)


def padded_bytes(size_bytes: int) -> int:
    """What a tensor of `size_bytes` takes of a block."""
    return _round_up(size_bytes, ALIGNMENT)


def whole_pages(size_bytes: int) -> int:
    """Memory behind `size_bytes` of a block."""
    return _round_up(size_bytes, mmap.PAGESIZE)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
