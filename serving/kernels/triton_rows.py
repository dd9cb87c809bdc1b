"""The row-wise ops of a batch's deltas on CUDA: a fixed number of launches per module, whatever the mix of deltas.

A delta is encoded once, when it is placed: a table of ops with the addresses of its weights, in device memory. A batch
is a small plan of chunks that point to such tables, sent in one copy. The launches of a module and their grids follow
from what was reserved, never from the deltas that fill it, so a CUDA graph that was captured over a reserved batch
replays any batch that `fits`.

Launches at a module: two for all LowRanks on its input or on captured inputs, the Affines of the output within the
second; one for Affines alone; one per stage of the longest LinearMap, and a copy of y; two per LowRank on the output
that must follow another. More than one of them on a half-precision y run on an fp32 copy, for one rounding.

What has been run: the kernels under Triton's interpreter, and their compilation for sm_90. Tests marked `gpu` state
what a device has to show: equality with the reference, and capture and replay. Nothing here has been timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adapters.normal_form import Activation, Site
from serving.kernels import triton_kernels
from serving.kernels.ops import AffineWeights, FusedSegment, LinearMapWeights, LowRankWeights, PlacedModule

IN_AFFINE, IN_MAP, IN_SELF, ADD, OUT_AFFINE, OUT_MAP, OUT_SELF = KINDS = range(7)
"""The kinds of ops at a module, in their order: those before it, those after it."""
BEFORE, AFTER = KINDS[:ADD], KINDS[ADD:]
ACTIVATION_CODES: Mapping[Activation, int] = {
    "identity": 0, "relu": 1, "gelu": 2, "gelu_new": 3, "silu": 4, "tanh": 5, "leaky_relu": 6, "sigmoid": 7,
}  # fmt: skip
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

CHUNK, RANKS, FIELDS = (
    int(c.value) for c in (triton_kernels.CHUNK, triton_kernels.RANKS, triton_kernels.FIELDS)
)
K_TILE, COLUMN_TILE = 64, 64
RANK_PROGRAMS = 4
"""Programs that share the rank tiles of a chunk and split; any number gives the same result."""
SPLIT_WIDTH, MAX_SPLITS = 512, 8
"""Columns that one program of `shrink` sums, and the most partial sums: set by the module, not by the batch."""
FP_FUSION = True
"""Products and sums in one instruction; Triton changes its default from 3.10 on, so it is said."""
MAX_SEGMENT_TOKENS = 512
"""Longer segments reuse wide weights enough for torch's matrix products. A guess: not measured on a device."""


class _Op(NamedTuple):
    """The words of an op, as `triton_kernels` numbers them."""

    level: int
    start: int
    stop: int
    first: int
    second: int = 0
    a_bias: int = 0
    b_bias: int = 0
    size: int = 0
    width: int = 0
    source: int = 0
    activation: int = 0
    scaling: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class EncodedDelta:
    """A delta's row-wise ops in device memory. `weights` keeps alive what the table points to.

    `levels` [modules, kinds]: launches that a kind takes at a module. `tiles`: the most rank tiles of one of them.
    """

    table: Tensor
    levels: npt.NDArray[np.int64]
    tiles: int
    taps: frozenset[int]
    weights: tuple[Tensor, ...]


class TritonRows:
    """`FusedRows` by Triton kernels on `device`, which is CUDA or, under Triton's interpreter, the CPU."""

    max_segment_tokens = MAX_SEGMENT_TOKENS

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def encode(
        self, modules: Mapping[int, PlacedModule], taps: Mapping[Site, int], num_modules: int
    ) -> EncodedDelta:
        """See `FusedRows`."""
        weights: list[Tensor] = []
        offsets = np.zeros(num_modules * len(KINDS) + 1, np.int64)
        levels = np.zeros((num_modules, len(KINDS)), np.int64)
        ops: list[_Op] = []
        tiles = 0
        for index in range(num_modules):
            found = _ops(modules[index], taps, weights) if index in modules else [[]] * len(KINDS)
            for kind, of_kind in enumerate(found):
                ops += of_kind
                offsets[index * len(KINDS) + kind + 1] = len(ops)
                levels[index, kind] = 1 + max((op.level for op in of_kind), default=-1)
                if kind in (IN_SELF, ADD, OUT_SELF):
                    tiles = max(tiles, len(of_kind))
        table = np.concatenate([len(offsets) + FIELDS * offsets, np.array(ops, np.int64).reshape(-1)])
        read = frozenset(taps[site] for placed in modules.values() for site, _ in placed.remote)
        assert all(w.device.type == self.device.type for w in weights), self.device
        return EncodedDelta(torch.from_numpy(table).to(self.device), levels, tiles, read, tuple(weights))

    def bind(self, segments: Sequence[FusedSegment]) -> TritonBatch:
        """See `FusedRows`."""
        tokens = max(segment.stop for segment in segments)
        chunks = sum(1 for _ in _chunks(segments))
        batch = TritonBatch(self.device, [segment.encoded for segment in segments], tokens, chunks)
        batch.fill(segments)
        return batch

    def reserve(self, deltas: Iterable[EncodedDelta], max_tokens: int, max_segments: int) -> TritonBatch:
        """A batch without segments yet, whose launches and buffers serve any batch of `deltas` and their like.

        A CUDA graph is captured over it, by one forward pass, and replayed after each `fill`.
        """
        chunks = min(max_tokens, max_tokens // CHUNK + max_segments)
        return TritonBatch(self.device, list(deltas), max_tokens, chunks)


class TritonBatch:
    """`FusedBatch`: buffers and launches that are fixed when it is made, and the plan that `fill` puts into them.

    Filling and running are ordered by the current stream: the plan may be changed while earlier work still runs.
    """

    def __init__(
        self, device: torch.device, deltas: Sequence[EncodedDelta], max_tokens: int, max_chunks: int
    ) -> None:
        assert deltas, "nothing to reserve for"
        self._max_tokens = max_tokens
        self._levels: npt.NDArray[np.int64] = reduce(np.maximum, (delta.levels for delta in deltas))
        self._tiles = max(delta.tiles for delta in deltas)
        self._launches = self._levels.tolist()
        self._filled: list[EncodedDelta] = []  # keeps alive what the plan points to
        self._kept: dict[int, Tensor] = {}
        self.changes_input: Sequence[bool] = [bool(of_module[:ADD].any()) for of_module in self._levels]
        self.changes_output: Sequence[bool] = [bool(of_module[ADD:].any()) for of_module in self._levels]
        self.taps: frozenset[int] = frozenset().union(*(delta.taps for delta in deltas))
        self._plan = torch.zeros(max_chunks, 3, dtype=torch.int64, device=device)
        self._addresses = torch.zeros(len(self._levels), dtype=torch.int64, device=device)
        self._hidden = torch.empty(MAX_SPLITS, max_tokens, self._tiles * RANKS, device=device)

    def fits(self, segments: Sequence[FusedSegment]) -> bool:
        """True where the reserved buffers and launches cover `segments`."""
        return (
            sum(1 for _ in _chunks(segments)) <= len(self._plan)
            and all(segment.stop <= self._max_tokens for segment in segments)
            and all(
                bool((segment.encoded.levels <= self._levels).all())
                and segment.encoded.tiles <= self._tiles
                and segment.encoded.taps <= self.taps
                for segment in segments
            )
        )

    def fill(self, segments: Sequence[FusedSegment]) -> None:
        """Let the next runs and replays act on `segments`, which must fit, and on no others."""
        assert self.fits(segments), (len(segments), self._max_tokens, len(self._plan), self._tiles)
        # allocated anew each time: the caching allocator waits for copies from a pinned buffer before it reuses it
        plan = torch.zeros(self._plan.shape, dtype=torch.int64, pin_memory=self._plan.is_cuda)
        chunks = np.array(list(_chunks(segments)), np.int64).reshape(-1, plan.shape[1])
        plan.numpy()[: len(chunks)] = chunks
        self._plan.copy_(plan, non_blocking=True)
        self._filled = [segment.encoded for segment in segments]

    def capture(self, module: int, x_TI: Tensor) -> None:
        """See `FusedBatch`. In a CUDA graph the address is written at each replay: the tensor lies where it lay."""
        self._kept[module] = x_TI = x_TI.contiguous()
        self._addresses[module].fill_(x_TI.data_ptr())

    def run_input(self, module: int, x_TI: Tensor) -> None:
        """See `FusedBatch`."""
        self._run(module, BEFORE, x_TI, x_TI)

    def run_output(self, module: int, y_TO: Tensor, x_TI: Tensor) -> None:
        """See `FusedBatch`."""
        self._run(module, AFTER, y_TO, x_TI.contiguous())

    def _run(self, module: int, kinds: Sequence[int], y: Tensor, x: Tensor) -> None:
        assert y.is_contiguous(), y.stride()
        levels = self._launches[module]
        with_affine = kinds is AFTER and bool(levels[ADD] and levels[OUT_AFFINE])
        steps = [
            (kind, level)
            for kind in kinds
            for level in range(levels[kind])
            if not (with_affine and kind == OUT_AFFINE)
        ]
        work = y if len(steps) == 1 else y.to(torch.float32)
        for kind, level in steps:
            step = module * len(KINDS) + kind
            if kind in (IN_AFFINE, OUT_AFFINE):
                self._affine(work, step)
            elif kind in (IN_MAP, OUT_MAP):
                self._turn(work, step, level)
            else:
                assert kind != ADD or all(kept.dtype == x.dtype for kept in self._kept.values()), x.dtype
                self._low_rank(work, x if kind == ADD else work, step, level, with_affine and kind == ADD)
        if work is not y:
            y.copy_(work)

    def _low_rank(self, y: Tensor, x: Tensor, step: int, level: int, with_affine: bool) -> None:
        chunks, splits = len(self._plan), min(MAX_SPLITS, -(-x.shape[1] // SPLIT_WIDTH))
        split_stride, token_stride, _ = self._hidden.stride()
        triton_kernels.shrink[chunks, min(RANK_PROGRAMS, self._tiles), splits](
            self._plan, x, self._addresses, self._hidden, step, level, splits, split_stride, token_stride,
            K_TILE=K_TILE, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
        triton_kernels.expand[chunks, -(-y.shape[1] // COLUMN_TILE)](
            self._plan, y, self._hidden, y.shape[1], step, level, step + OUT_AFFINE - ADD, split_stride,
            token_stride, SPLITS=splits, TILE=COLUMN_TILE, WITH_AFFINE=with_affine,
            enable_fp_fusion=FP_FUSION,
        )  # fmt: skip

    def _affine(self, y: Tensor, step: int) -> None:
        grid = len(self._plan), -(-y.shape[1] // COLUMN_TILE)
        triton_kernels.affine[grid](
            self._plan, y, y.shape[1], step, TILE=COLUMN_TILE, enable_fp_fusion=FP_FUSION
        )

    def _turn(self, y: Tensor, step: int, level: int) -> None:
        grid = len(self._plan), -(-y.shape[1] // COLUMN_TILE)
        triton_kernels.turn[grid](
            self._plan, y, y.clone(), y.shape[1], step, level, TILE=COLUMN_TILE, enable_fp_fusion=FP_FUSION
        )


def _chunks(segments: Sequence[FusedSegment]) -> Iterator[tuple[int, int, int]]:
    for start, stop, encoded in segments:
        for first in range(start, stop, CHUNK):
            yield encoded.table.data_ptr(), first, min(first + CHUNK, stop)


def _ops(placed: PlacedModule, taps: Mapping[Site, int], weights: list[Tensor]) -> list[list[_Op]]:
    """The ops of a module by kind."""
    assert placed.is_row_wise, placed
    added = [(w, -1) for w in placed.parallel] + [(w, taps[site]) for site, w in placed.remote]
    return [
        [_affine(w, weights) for w in placed.inputs],
        _maps(placed.input_maps, weights),
        [op for level, w in enumerate(placed.reflections) for op in _low_rank(w, level, -1, weights)],
        [op for w, source in added for op in _low_rank(w, 0, source, weights)],
        [_affine(w, weights) for w in placed.outputs],
        _maps(placed.output_maps, weights),
        [op for level, w in enumerate(placed.sequential) for op in _low_rank(w, level, -1, weights)],
    ]


def _low_rank(w: LowRankWeights, level: int, source: int, weights: list[Tensor]) -> Iterator[_Op]:
    """A LowRank in tiles of its rank; the first one adds b_bias."""
    rank, width = w.A.shape
    a, b = _address(w.A, weights), _address(w.B, weights)
    a_bias, b_bias = _address(w.a_bias, weights), _address(w.b_bias, weights)
    for first in range(0, rank, RANKS):
        yield _Op(
            level=level, start=w.start, stop=w.stop, first=a + 4 * first * width,
            second=b + 4 * first * (w.stop - w.start), a_bias=a_bias and a_bias + 4 * first,
            b_bias=0 if first else b_bias, size=min(RANKS, rank - first), width=width, source=source,
            activation=ACTIVATION_CODES[w.activation], scaling=int(np.float32(w.scaling).view(np.int32)),
        )  # fmt: skip


def _affine(w: AffineWeights, weights: list[Tensor]) -> _Op:
    return _Op(0, w.start, w.stop, _address(w.scale, weights), _address(w.shift, weights))


def _maps(maps: Sequence[LinearMapWeights], weights: list[Tensor]) -> list[_Op]:
    """The stages of LinearMaps; those of one level touch different columns, so one launch runs them."""
    ops: list[_Op] = []
    for w in maps:
        stages, runs, block, _ = w.blocks.shape
        shared = runs > 1 and w.blocks.stride(1) == 0  # one block for all runs is one block in memory
        blocks = w.blocks[:, :1] if shared else w.blocks
        first, order = _address(blocks, weights), _address(w.order, weights)
        below = 1 + max((op.level for op in ops if op.start < w.stop and w.start < op.stop), default=-1)
        ops += [
            _Op(
                level=below + stage,
                start=w.start,
                stop=w.stop,
                first=first + 4 * stage * blocks[0].numel(),
                second=order and order + 8 * stage * (w.stop - w.start),
                size=block,
                source=int(shared),
            )
            for stage in range(stages)
        ]
    return ops


def _address(tensor: Tensor | None, weights: list[Tensor]) -> int:
    """Of the first element, 0 for None. Kernels read fp32, and int64 for orders."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous(), tensor.stride()
    assert tensor.dtype in (torch.float32, torch.int64), tensor.dtype
    weights.append(tensor)
    return tensor.data_ptr()
