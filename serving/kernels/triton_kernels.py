"""The device side of `triton_rows`: four kernels that run the row-wise ops of a batch's deltas at one module.

A program takes a chunk: up to CHUNK tokens of one delta. What it does there it reads from the delta's table, int64:

    table[step], table[step + 1]   where the ops of `step` begin and end, for step = module * KINDS + kind
    table[begin], ...              one op in FIELDS words

`plan` [chunks, 3] int64 has (address of the table, first token, end) per chunk; a chunk without a table does nothing,
so a grid that was captured in a CUDA graph serves any batch whose chunks fit in it. All sums are in fp32 and of one
order: there are no atomics, and tiles do not depend on the batch. Weights are fp32, so every dot is one of fp32 and in
IEEE precision. Whoever imports this module imports triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOATS = tl.constexpr(tl.pointer_type(tl.float32))
WORDS = tl.constexpr(tl.pointer_type(tl.int64))

CHUNK = tl.constexpr(16)
"""Tokens of a program."""
RANKS = tl.constexpr(16)
"""Ranks of a LowRank op in a table: a wider one is cut."""
FIELDS = tl.constexpr(12)
"""Words of an op; which ones a kind reads is in `_low_rank`, `_affine` and `_maps` of triton_rows."""

LEVEL = tl.constexpr(0)
START = tl.constexpr(1)
STOP = tl.constexpr(2)
FIRST = tl.constexpr(3)  # A; scale; blocks
SECOND = tl.constexpr(4)  # B; shift; order
A_BIAS = tl.constexpr(5)
B_BIAS = tl.constexpr(6)
SIZE = tl.constexpr(7)  # ranks in this tile; columns of a block
WIDTH = tl.constexpr(8)  # columns of A
SOURCE = tl.constexpr(
    9
)  # module whose captured input is read, -1: the module's own; blocks: 1 if all runs share one
ACTIVATION = tl.constexpr(10)
SCALING = tl.constexpr(11)  # the bits of an fp32


@triton.jit
def _sigmoid(x):
    shrunk = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x < 0, shrunk, 1.0) / (1.0 + shrunk)


@triton.jit
def _activate(x, code):
    """Codes: ACTIVATION_CODES of triton_rows."""
    if code == 1:
        x = tl.maximum(x, 0.0)
    elif code == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.70710678118654752))
    elif code == 3:
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 1 + tanh(z) = 2 sigmoid(2 z)
    elif code == 4:
        x = x * _sigmoid(x)
    elif code == 5:
        x = 2.0 * _sigmoid(2.0 * x) - 1.0  # tl has no tanh, and libdevice's is not interpreted
    elif code == 6:
        x = tl.where(x > 0, x, 0.01 * x)
    elif code == 7:
        x = _sigmoid(x)
    return x


@triton.jit
def _apply_affine(y, table, step, columns):
    """y [CHUNK, tile] scaled and shifted by each op of `step` in turn."""
    for at in range(tl.load(table + step), tl.load(table + step + 1), FIELDS):
        op = table + at
        start = tl.load(op + START)
        inside = (columns >= start) & (columns < tl.load(op + STOP))
        scale = tl.load(op + FIRST)
        if scale != 0:
            y *= tl.load(scale.to(FLOATS) + columns - start, mask=inside, other=1.0)[None, :]
        shift = tl.load(op + SECOND)
        if shift != 0:
            y += tl.load(shift.to(FLOATS) + columns - start, mask=inside, other=0.0)[None, :]
    return y


@triton.jit(do_not_specialize=["step", "level"])
def shrink(
    plan, x, taps, hidden, step, level, num_splits, split_stride,
    token_stride, K_TILE: tl.constexpr,
):  # fmt: skip
    """hidden[split, t, i * RANKS + r] = the part of x[t] . A_i[r] over the split's columns, for tile i of the step.

    Grid (chunks, any number, splits). x [T, the width of A] of any float dtype; `taps` [modules] addresses of captured
    inputs of x's dtype; hidden [splits, T, ranks] fp32, of which what the chunk's tiles cover is written.
    """
    chunk = plan + 3 * tl.program_id(0)
    address = tl.load(chunk)
    if address != 0:
        table = address.to(WORDS)
        tokens = tl.load(chunk + 1) + tl.arange(0, CHUNK)
        valid = tokens < tl.load(chunk + 2)
        ranks = tl.arange(0, RANKS)
        begin = tl.load(table + step)
        stride = tl.num_programs(1) * FIELDS
        for at in range(begin + tl.program_id(1) * FIELDS, tl.load(table + step + 1), stride):
            op = table + at
            if tl.load(op + LEVEL) == level:
                width = tl.load(op + WIDTH)
                source = tl.load(op + SOURCE)
                rows = x
                if source >= 0:
                    rows = tl.load(taps + source).to(x.dtype)
                a = tl.load(op + FIRST).to(FLOATS)
                present = ranks < tl.load(op + SIZE)
                part = tl.cdiv(tl.cdiv(width, K_TILE), num_splits) * K_TILE
                first = tl.program_id(2) * part
                total = tl.zeros([CHUNK, RANKS], tl.float32)
                for k in range(first, tl.minimum(first + part, width), K_TILE):
                    columns = k + tl.arange(0, K_TILE)
                    inside = columns < width
                    x_TK = tl.load(
                        rows + tokens[:, None] * width + columns[None, :],
                        mask=valid[:, None] & inside[None, :],
                        other=0.0,
                    )
                    a_KR = tl.load(
                        a + ranks[None, :] * width + columns[:, None],
                        mask=present[None, :] & inside[:, None],
                        other=0.0,
                    )
                    total = tl.dot(x_TK.to(tl.float32), a_KR, total, input_precision="ieee")
                column = (at - begin) // FIELDS * RANKS
                out = hidden + tl.program_id(2) * split_stride + tokens[:, None] * token_stride
                tl.store(out + column + ranks[None, :], total, mask=valid[:, None])


@triton.jit(do_not_specialize=["step", "level", "affine_step"])
def expand(
    plan, y, hidden, width, step, level, affine_step, split_stride,
    token_stride, SPLITS: tl.constexpr, TILE: tl.constexpr, WITH_AFFINE: tl.constexpr,
):  # fmt: skip
    """y[t, cols] += scaling * (f(sum of hidden over splits + a_bias) @ B + b_bias), then the Affines of `affine_step`.

    Grid (chunks, tiles of y's columns). y [T, width] of any float dtype, rounded once; hidden as `shrink` left it.
    """
    chunk = plan + 3 * tl.program_id(0)
    address = tl.load(chunk)
    if address != 0:
        table = address.to(WORDS)
        tokens = tl.load(chunk + 1) + tl.arange(0, CHUNK)
        valid = tokens < tl.load(chunk + 2)
        ranks = tl.arange(0, RANKS)
        low = tl.program_id(1) * TILE
        columns = low + tl.arange(0, TILE)
        here = y + tokens[:, None] * width + columns[None, :]
        mask = valid[:, None] & (columns < width)[None, :]
        total = tl.load(here, mask=mask, other=0.0).to(tl.float32)
        begin = tl.load(table + step)
        for at in range(begin, tl.load(table + step + 1), FIELDS):
            op = table + at
            start = tl.load(op + START)
            stop = tl.load(op + STOP)
            if (tl.load(op + LEVEL) == level) & (start < low + TILE) & (stop > low):
                present = ranks < tl.load(op + SIZE)
                found = (
                    hidden + tokens[:, None] * token_stride + (at - begin) // FIELDS * RANKS + ranks[None, :]
                )
                h_TR = tl.zeros([CHUNK, RANKS], tl.float32)
                for split in tl.static_range(SPLITS):
                    h_TR += tl.load(
                        found + split * split_stride, mask=valid[:, None] & present[None, :], other=0.0
                    )
                a_bias = tl.load(op + A_BIAS)
                if a_bias != 0:
                    h_TR += tl.load(a_bias.to(FLOATS) + ranks, mask=present, other=0.0)[None, :]
                scaling = tl.load(op + SCALING).to(tl.int32).to(tl.float32, bitcast=True)
                h_TR = scaling * _activate(h_TR, tl.load(op + ACTIVATION))
                inside = (columns >= start) & (columns < stop)
                b_RC = tl.load(
                    tl.load(op + SECOND).to(FLOATS)
                    + ranks[:, None] * (stop - start)
                    + columns[None, :]
                    - start,
                    mask=present[:, None] & inside[None, :],
                    other=0.0,
                )
                total = tl.dot(h_TR, b_RC, total, input_precision="ieee")
                b_bias = tl.load(op + B_BIAS)
                if b_bias != 0:
                    bias = tl.load(b_bias.to(FLOATS) + columns - start, mask=inside, other=0.0)
                    total += scaling * bias[None, :]
        if WITH_AFFINE:
            total = _apply_affine(total, table, affine_step, columns)
        tl.store(here, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["step"])
def affine(plan, y, width, step, TILE: tl.constexpr):
    """y[t, cols] = y[t, cols] * scale + shift. Grid (chunks, tiles of y's columns). y [T, width]."""
    chunk = plan + 3 * tl.program_id(0)
    address = tl.load(chunk)
    if address != 0:
        table = address.to(WORDS)
        if tl.load(table + step) < tl.load(table + step + 1):
            tokens = tl.load(chunk + 1) + tl.arange(0, CHUNK)
            columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
            here = y + tokens[:, None] * width + columns[None, :]
            mask = (tokens < tl.load(chunk + 2))[:, None] & (columns < width)[None, :]
            total = _apply_affine(tl.load(here, mask=mask, other=0.0).to(tl.float32), table, step, columns)
            tl.store(here, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["step", "level"])
def turn(plan, y, source, width, step, level, TILE: tl.constexpr):
    """One stage of LinearMaps: y[t, order][i] = source[t, order][i] @ blocks[i], in runs of a block's size.

    Grid (chunks, tiles of columns). y, source [T, width], source a copy of y: no program reads what another writes.
    """
    chunk = plan + 3 * tl.program_id(0)
    address = tl.load(chunk)
    if address != 0:
        table = address.to(WORDS)
        tokens = tl.load(chunk + 1) + tl.arange(0, CHUNK)
        valid = tokens < tl.load(chunk + 2)
        places = tl.program_id(1) * TILE + tl.arange(0, TILE)
        for at in range(tl.load(table + step), tl.load(table + step + 1), FIELDS):
            op = table + at
            start = tl.load(op + START)
            count = tl.load(op + STOP) - start
            if (tl.load(op + LEVEL) == level) & (tl.program_id(1) * TILE < count):
                inside = places < count
                size = tl.load(op + SIZE)
                run = places // size
                block = run
                if tl.load(op + SOURCE) != 0:
                    block = run * 0
                matrix = tl.load(op + FIRST).to(FLOATS) + block * size * size + places % size
                order = tl.load(op + SECOND)
                ordered = order.to(WORDS)
                mask = valid[:, None] & inside[None, :]
                total = tl.zeros([CHUNK, TILE], tl.float32)
                for k in range(0, size):
                    column = run * size + k
                    if order != 0:
                        column = tl.load(ordered + column, mask=inside, other=0)
                    z = tl.load(
                        source + tokens[:, None] * width + (start + column)[None, :], mask=mask, other=0.0
                    )
                    total += z.to(tl.float32) * tl.load(matrix + k * size, mask=inside, other=0.0)[None, :]
                column = places.to(tl.int64)
                if order != 0:
                    column = tl.load(ordered + column, mask=inside, other=0)
                here = y + tokens[:, None] * width + (start + column)[None, :]
                tl.store(here, total.to(y.dtype.element_ty), mask=mask)
