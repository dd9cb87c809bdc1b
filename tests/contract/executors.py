"""The executors that the kernel contract runs over; the fused ones are called op by op, as the general ones are.

Where TRITON_INTERPRET=1, which has to be set before triton is imported, they are the Triton kernels under the
interpreter, and no others: `test_triton_interpreted.py` starts such a process. On a CUDA device they run with
`-m gpu`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import pytest
import torch
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
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)


def moved(value: Any, device: torch.device) -> Any:
    """Weights, or what holds them, with every tensor on `device`; a broadcast view stays one."""
    match value:
        case Tensor():
            kept = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())
            return value[kept].to(device).expand(value.shape)
        case list():
            return [moved(item, device) for item in value]
        case tuple():
            return tuple(moved(item, device) for item in value)
        case _ if hasattr(value, "__dataclass_fields__") and not isinstance(value, Site):
            return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


@dataclass(frozen=True)
class FusedExecutor:
    """A `FusedRows` with the device and the dtypes that it runs on; made when a test asks for it."""

    make: Callable[[torch.device], FusedRows]
    device: torch.device
    dtypes: Sequence[torch.dtype]


@cache
def cpu_rows(device: torch.device) -> FusedRows:
    assert device.type == "cpu", device
    return CpuRows()


@cache
def triton_rows(device: torch.device) -> FusedRows:
    from serving.kernels.triton_rows import TritonRows  # noqa: PLC0415  (optional)

    return TritonRows(device)


class OpByOp:
    """The row-wise part of `DeltaKernels` over a `FusedRows`: each segment's op is the only one of its delta."""

    def __init__(self, executor: FusedExecutor) -> None:
        self.executor = executor

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
            device = self.executor.device
            fused = self.executor.make(device)
            bound = [
                FusedSegment(a, b, fused.encode({1: moved(ops, device)}, {}, 2)) for a, b, ops in segments
            ]
            batch = fused.bind(bound)
            assert list(batch.changes_output) == [False, True]
            there = y.to(device)
            batch.run_output(1, there, there if x is y else x.to(device))
            y.copy_(there)


HALF = (torch.bfloat16, torch.float16)
COMPILED = FusedExecutor(cpu_rows, torch.device("cpu"), (torch.float32, torch.bfloat16))
TRITON_INTERPRETED = FusedExecutor(triton_rows, torch.device("cpu"), (torch.float32, *HALF))
TRITON = FusedExecutor(triton_rows, torch.device("cuda"), (torch.float32, *HALF))

FUSED: Mapping[str, FusedExecutor] = (
    {"triton interpreted": TRITON_INTERPRETED} if INTERPRETED else {"compiled": COMPILED, "triton": TRITON}
)


def _marks(executor: FusedExecutor) -> Sequence[pytest.MarkDecorator]:
    return ON_GPU if executor.device.type == "cuda" else ()


FUSED_WITH_DTYPE = [
    pytest.param(executor, dtype, id=f"{name}-{dtype}", marks=_marks(executor))
    for name, executor in FUSED.items()
    for dtype in executor.dtypes
]
ROW_WISE = [
    *([] if INTERPRETED else [pytest.param(ReferenceKernels(), id="reference")]),
    *(pytest.param(OpByOp(executor), id=name, marks=_marks(executor)) for name, executor in FUSED.items()),
]
