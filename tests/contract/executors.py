"""The executors that the kernel contract runs over; the fused ones are called op by op, as the general ones are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adapters.normal_form import Site
from serving.kernels.cpu import CpuRows
from serving.kernels.ops import (
    AffineSegment,
    FusedRows,
    FusedSegment,
    LinearMapSegment,
    LowRankSegment,
    PlacedModule,
)
from serving.kernels.reference import ReferenceKernels

TAPPED = Site("attn.x", 0)


class OpByOp:
    """The row-wise part of `DeltaKernels` over a `FusedRows`: each segment's op is the only one of its delta."""

    def __init__(self, fused: FusedRows) -> None:
        self.fused = fused

    def add_low_rank(self, y_TO: Tensor, x_TI: Tensor, segments: Sequence[LowRankSegment]) -> None:
        if y_TO is x_TI:
            self._run(y_TO, x_TI, [(a, b, PlacedModule(sequential=[w])) for a, b, w in segments])
        else:
            self._run(y_TO, x_TI, [(a, b, PlacedModule(parallel=[w])) for a, b, w in segments])

    def apply_affine(self, y_TO: Tensor, segments: Sequence[AffineSegment]) -> None:
        self._run(y_TO, y_TO, [(a, b, PlacedModule(outputs=[w])) for a, b, w in segments])

    def apply_linear_map(self, y_TO: Tensor, segments: Sequence[LinearMapSegment]) -> None:
        self._run(y_TO, y_TO, [(a, b, PlacedModule(output_maps=[w])) for a, b, w in segments])

    def _run(self, y: Tensor, x: Tensor, segments: Sequence[tuple[int, int, PlacedModule]]) -> None:
        if segments:
            bound = [FusedSegment(a, b, self.fused.encode({1: ops}, {}, 2)) for a, b, ops in segments]
            batch = self.fused.bind(bound)
            assert list(batch.changes_output) == [False, True]
            batch.run_output(1, y, x)


ROW_WISE = (ReferenceKernels(), OpByOp(CpuRows()))
