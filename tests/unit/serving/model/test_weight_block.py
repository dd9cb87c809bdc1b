"""One delta's weights on CPU lie side by side, take the memory that they report, and stay as long as a tensor does."""

from __future__ import annotations

import gc
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.normal_form import Delta, LowRank, Site
from serving.model.placed_size import max_device_bytes
from serving.model.placement import place
from serving.model.weight_block import ALIGNMENT, HUGE_PAGE, WeightBlock, padded_bytes, whole_pages
from tests.unit.serving.engine.engine_support import tiny


def resident_bytes(start: int, stop: int) -> int:
    """Memory behind the pages of the addresses [start, stop), as the system has it."""
    first, last = start // mmap.PAGESIZE, -(-stop // mmap.PAGESIZE)
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(8 * first)
        entries = np.frombuffer(pages.read(8 * (last - first)), np.uint64)
    return int((entries >> np.uint64(63)).sum()) * mmap.PAGESIZE


def test_tensors_lie_side_by_side_each_at_a_cache_line() -> None:
    block = WeightBlock(padded_bytes(7 * 4) + padded_bytes(3 * 8))
    first, second = block.take((7,), torch.float32), block.take((3, 1), torch.int64)
    assert first.data_ptr() % ALIGNMENT == 0
    assert second.data_ptr() == first.data_ptr() + ALIGNMENT
    first.fill_(1)
    second.fill_(2)
    assert first.tolist() == [1] * 7
    assert second.tolist() == [[2]] * 3


def test_no_more_is_taken_than_there_was_room_for() -> None:
    block = WeightBlock(mmap.PAGESIZE)
    block.take((mmap.PAGESIZE,), torch.uint8)
    with pytest.raises(AssertionError):
        block.take((1,), torch.uint8)


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")
@pytest.mark.parametrize("size", [100, 3 * mmap.PAGESIZE + 1, HUGE_PAGE, 3 * HUGE_PAGE + 5 * mmap.PAGESIZE])
@pytest.mark.parametrize("limit", [1.0, 1.6])
def test_a_block_takes_the_memory_that_it_reports(size: int, limit: float) -> None:
    block = WeightBlock(padded_bytes(int(size * limit)))
    assert block.taken_bytes == 0
    weights = block.take((size,), torch.uint8)
    start = weights.data_ptr()
    weights.fill_(1)
    end = start + whole_pages(int(size * limit))
    assert whole_pages(size) <= resident_bytes(start, end) <= block.taken_bytes
    assert block.taken_bytes <= whole_pages(padded_bytes(int(size * limit)))


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")
def test_memory_goes_back_when_the_last_tensor_is_gone_and_not_before() -> None:
    block = WeightBlock(2 * HUGE_PAGE)
    kept = block.take((16,), torch.float32).fill_(7)
    rest = block.take((HUGE_PAGE // 4,), torch.float32).fill_(1)
    start, end = kept.data_ptr(), rest.data_ptr() + rest.nbytes
    del block, rest
    gc.collect()
    others = [WeightBlock(2 * HUGE_PAGE).take((16,), torch.float32).fill_(9) for _ in range(8)]
    assert kept.tolist() == [7] * 16
    assert all(other.data_ptr() >= end or other.data_ptr() < start for other in others)
    before = resident_bytes(start, end)
    del kept, others
    gc.collect()
    assert resident_bytes(start, end) < before


def test_a_module_is_placed_after_the_one_that_runs_before_it() -> None:
    backbone = tiny()
    modules = [m for m in backbone.spec.modules if m.shape.kind == "linear" and m.read is not None]
    ops = tuple(
        LowRank(
            read=m.read,
            write=m.writes[0].site,
            A=torch.randn(2, m.shape.d_in),
            B=torch.randn(m.shape.d_out, 2),
        )
        for m in reversed(modules)
        if m.read is not None and m.writes[0].site != Site("logits", -1)
    )
    delta = Delta(method="LORA", ops=ops, backbone_digest=backbone.spec.digest)
    placed = place(delta, "d", backbone)
    starts = [placed.modules[index].parallel[0].A.data_ptr() for index in sorted(placed.modules)]
    assert len(starts) > 2
    assert starts == sorted(starts)
    assert starts[-1] - starts[0] < placed.device_bytes <= max_device_bytes(delta, backbone)
