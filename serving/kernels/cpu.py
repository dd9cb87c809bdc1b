"""The row-wise ops of short segments on CPU: one compiled call per module and batch, whatever the mix of deltas.

A delta is encoded once, when it is placed: a table of ops with pointers to its weights, ordered by module. A batch is a
list of such tables and the tokens they act on, so a change of the batch costs microseconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.normal_form import Activation, Site
from serving.kernels.cpu_build import load_library
from serving.kernels.ops import AffineWeights, FusedSegment, LinearMapWeights, LowRankWeights, PlacedModule

ADD_FROM_INPUT, ADD_FROM_TAP, ADD_FROM_OUTPUT, AFFINE, BLOCKS = range(5)
ACTIVATION_CODES: Mapping[Activation, int] = {
    "identity": 0, "relu": 1, "gelu": 2, "gelu_new": 3, "silu": 4, "tanh": 5, "leaky_relu": 6, "sigmoid": 7,
}  # fmt: skip
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

POINTERS = ("a", "b", "a_bias", "b_bias", "order")
NUMBERS = ("kind", "activation", "rank", "width", "start", "stop", "tap", "block", "stages", "shared")
OP_DTYPE = np.dtype(
    [(name, np.uint64) for name in POINTERS]
    + [(name, np.int32) for name in NUMBERS]
    + [("scaling", np.float32), ("unused", np.int32)]
)
OP_FIELDS = OP_DTYPE.names or ()
_Op = tuple[float, ...]
"""One op, by `OP_FIELDS`."""
SEGMENT_DTYPE = np.dtype(
    [("ops", np.uint64), ("offsets", np.uint64), ("start", np.int32), ("stop", np.int32)]
)

MAX_SEGMENT_TOKENS = 64
"""Longer segments reuse wide weights enough for torch's matrix products to be faster (`python -m loadtest kernels`)."""
PIECE_TOKENS = 16
"""What one thread takes of a segment where there are several threads."""


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPhase:
    """One delta's ops before or after the base modules: `ops[offsets[i]:offsets[i + 1]]` act at module i."""

    ops: npt.NDArray[Any]
    offsets: npt.NDArray[np.int32]

    @property
    def touched(self) -> npt.NDArray[np.bool_]:
        """Per module, whether the delta acts there."""
        return np.diff(self.offsets) > 0


@dataclass(frozen=True, slots=True, eq=False)
class EncodedDelta:
    """A delta's row-wise ops for the compiled kernels. `weights` keeps alive what the ops point to."""

    before: EncodedPhase
    after: EncodedPhase
    taps: frozenset[int]
    weights: tuple[Tensor, ...]
    num_weights: int


class CpuRows:
    """`FusedRows` by the compiled kernels. Raises KernelBuildError where they can't be had."""

    max_segment_tokens = MAX_SEGMENT_TOKENS

    def __init__(self) -> None:
        library = load_library()
        sizes = [library.deltamux_struct_size(which) for which in range(3)]
        assert sizes == [OP_DTYPE.itemsize, SEGMENT_DTYPE.itemsize, ctypes.sizeof(_Matrix)], sizes
        self.run = library.deltamux_run_rows
        self.run.restype = None
        self.run.argtypes = (
            ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32,
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32,
        )  # fmt: skip

    def encode(
        self, modules: Mapping[int, PlacedModule], taps: Mapping[Site, int], num_modules: int
    ) -> EncodedDelta:
        """See `FusedRows`."""
        weights: list[Tensor] = []
        before: list[list[_Op]] = [[] for _ in range(num_modules)]
        after: list[list[_Op]] = [[] for _ in range(num_modules)]
        for index, ops in modules.items():
            assert ops.is_row_wise, index
            before[index] = [
                *(_affine(w, weights) for w in ops.inputs),
                *(_blocks(w, weights) for w in ops.input_maps),
                *(_low_rank(w, ADD_FROM_OUTPUT, weights) for w in ops.reflections),
            ]
            after[index] = [
                *(_low_rank(w, ADD_FROM_INPUT, weights) for w in ops.parallel),
                *(_low_rank(w, ADD_FROM_TAP, weights, tap=taps[site]) for site, w in ops.remote),
                *(_affine(w, weights) for w in ops.outputs),
                *(_blocks(w, weights) for w in ops.output_maps),
                *(_low_rank(w, ADD_FROM_OUTPUT, weights) for w in ops.sequential),
            ]
        read = frozenset(taps[site] for ops in modules.values() for site, _ in ops.remote)
        return EncodedDelta(
            _phase(before), _phase(after), read, tuple(weights), sum(t.numel() for t in weights)
        )

    def bind(self, segments: Sequence[FusedSegment]) -> CpuBatch:
        """See `FusedRows`."""
        return CpuBatch(self, segments)


class CpuBatch:
    """`FusedBatch`: the tables of a batch's deltas, and the inputs of tapped modules until they are read."""

    def __init__(self, kernels: CpuRows, segments: Sequence[FusedSegment]) -> None:
        self._run = kernels.run
        self._threads = torch.get_num_threads()
        if self._threads > 1:
            # largest first: threads take them in this order, and who comes last should have little left
            ordered = sorted(segments, key=lambda segment: segment.encoded.num_weights, reverse=True)
            segments = [piece for segment in ordered for piece in _pieces(segment)]
        encoded: list[EncodedDelta] = [segment.encoded for segment in segments]
        self._encoded = encoded
        self._before = _table(segments, [delta.before for delta in encoded])
        self._after = _table(segments, [delta.after for delta in encoded])
        self._before_at, self._after_at = self._before.ctypes.data, self._after.ctypes.data
        self.changes_input = np.logical_or.reduce([delta.before.touched for delta in encoded]).tolist()
        self.changes_output = np.logical_or.reduce([delta.after.touched for delta in encoded]).tolist()
        self.taps = frozenset().union(*(delta.taps for delta in encoded))
        self._captured = (_Matrix * len(self.changes_output))() if self.taps else None
        self._kept: dict[int, Tensor] = {}

    def capture(self, module: int, x_TI: Tensor) -> None:
        """See `FusedBatch`."""
        assert self._captured is not None
        self._kept[module] = x_TI = x_TI.contiguous()
        self._captured[module] = _matrix(x_TI)

    def run_input(self, module: int, x_TI: Tensor) -> None:
        """See `FusedBatch`."""
        self._call(self._before_at, module, x_TI, None)

    def run_output(self, module: int, y_TO: Tensor, x_TI: Tensor) -> None:
        """See `FusedBatch`."""
        self._call(self._after_at, module, y_TO, x_TI.contiguous())

    def _call(self, table: int, module: int, y: Tensor, x: Tensor | None) -> None:
        # plain numbers: a struct for each matrix would cost as much as the rest of the call
        assert y.is_contiguous(), y.stride()
        read = (None, 0, 0) if x is None else (x.data_ptr(), x.shape[1], DTYPE_CODES[x.dtype])
        self._run(
            table, len(self._encoded), module, y.data_ptr(), y.shape[1], DTYPE_CODES[y.dtype], *read,
            self._captured, self._threads,
        )  # fmt: skip


def _pieces(segment: FusedSegment) -> Iterator[FusedSegment]:
    for start in range(segment.start, segment.stop, PIECE_TOKENS):
        yield FusedSegment(start, min(start + PIECE_TOKENS, segment.stop), segment.encoded)


def _matrix(rows: Tensor) -> _Matrix:
    return _Matrix(rows.data_ptr(), rows.shape[1], DTYPE_CODES[rows.dtype], 0)


def _table(segments: Sequence[FusedSegment], phases: Sequence[EncodedPhase]) -> npt.NDArray[Any]:
    table = np.zeros(len(segments), SEGMENT_DTYPE)
    table["ops"] = [phase.ops.ctypes.data for phase in phases]
    table["offsets"] = [phase.offsets.ctypes.data for phase in phases]
    table["start"] = [segment.start for segment in segments]
    table["stop"] = [segment.stop for segment in segments]
    return table


def _phase(by_module: Sequence[Sequence[_Op]]) -> EncodedPhase:
    offsets = np.concatenate([[0], np.cumsum([len(ops) for ops in by_module])]).astype(np.int32)
    return EncodedPhase(np.array([op for ops in by_module for op in ops], OP_DTYPE), offsets)


def _low_rank(w: LowRankWeights, kind: int, weights: list[Tensor], *, tap: int = -1) -> _Op:
    rank, width = w.A.shape
    return _op(
        weights, kind=kind, activation=ACTIVATION_CODES[w.activation], rank=rank, width=width, start=w.start,
        stop=w.stop, tap=tap, scaling=w.scaling, a=w.A, b=w.B, a_bias=w.a_bias, b_bias=w.b_bias,
    )  # fmt: skip


def _affine(w: AffineWeights, weights: list[Tensor]) -> _Op:
    return _op(weights, kind=AFFINE, start=w.start, stop=w.stop, a=w.scale, b=w.shift)


def _blocks(w: LinearMapWeights, weights: list[Tensor]) -> _Op:
    stages, runs, block, _ = w.blocks.shape
    shared = runs > 1 and w.blocks.stride(1) == 0  # one block for all runs is one block in memory
    return _op(
        weights, kind=BLOCKS, rank=runs, block=block, stages=stages, shared=int(shared), start=w.start,
        stop=w.stop, a=w.blocks[:, :1] if shared else w.blocks, order=w.order,
    )  # fmt: skip


def _op(weights: list[Tensor], **fields: Any) -> _Op:
    for name in POINTERS:
        tensor = fields.get(name)
        if tensor is not None:
            assert tensor.is_contiguous(), name
            assert tensor.device.type == "cpu", name
            weights.append(tensor)
            fields[name] = tensor.data_ptr()
    return tuple(fields.get(name) or 0 for name in OP_FIELDS)
