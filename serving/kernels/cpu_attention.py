"""Decode attention on CPU by the compiled kernel: rows of any length, window and softcap in one call, without masks."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from serving.kernels.cpu import DTYPE_CODES
from serving.kernels.cpu_build import load_library
from serving.kernels.ops import ScoreRule, TokenHeads


class _Heads(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    )


class _Decode(ctypes.Structure):
    _fields_ = (
        *((name, _Heads) for name in ("query", "key", "value", "out")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "tokens", "slots", "past")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_heads", "num_kv_heads", "width", "max_len", "window")),
        *((name, ctypes.c_float) for name in ("scaling", "softcap")),
        *((name, ctypes.c_int32) for name in ("dtype", "pool_dtype")),
    )  # fmt: skip


class CpuDecodeAttention:
    """`DecodeAttention` by the compiled kernel. Raises KernelBuildError where it can't be had."""

    def __init__(self) -> None:
        library = load_library()
        size = library.deltamux_decode_size()
        assert size == ctypes.sizeof(_Decode), size
        self._run = library.deltamux_decode_attention
        self._run.restype = None
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int32)

    def attend(
        self,
        out_THD: Tensor,
        heads: TokenHeads,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        rule: ScoreRule,
    ) -> None:
        """See `DecodeAttention`."""
        assert rows.is_contiguous(), rows.stride()
        assert keys.is_contiguous(), keys.stride()
        assert values.is_contiguous(), values.stride()
        query, key, value = (_dense_width(x) for x in heads)
        step = rows.shape[1] * rows.element_size()
        call = _Decode(
            _heads(query, 1, 0), _heads(key, 1, 0), _heads(value, 1, 0), _heads(out_THD, 0, 1),
            keys.data_ptr(), values.data_ptr(),
            rows.data_ptr(), rows.data_ptr() + step, rows.data_ptr() + 2 * step,
            rows.shape[1], query.shape[0], key.shape[0], query.shape[2], keys.shape[2], rule.window or 0,
            rule.scaling, rule.softcap or 0.0, DTYPE_CODES[query.dtype], DTYPE_CODES[keys.dtype],
        )  # fmt: skip
        self._run(ctypes.byref(call), torch.get_num_threads())


def _dense_width(heads: Tensor) -> Tensor:
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _heads(x: Tensor, token_dim: int, head_dim: int) -> _Heads:
    return _Heads(x.data_ptr(), x.stride(token_dim), x.stride(head_dim))
