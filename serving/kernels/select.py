"""Which executors a replica gets. Chosen once, at start."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from adapters.errors import BackboneRefused
from serving.kernels import cpu
from serving.kernels.cpu_attention import CpuDecodeAttention
from serving.kernels.cpu_build import KernelBuildError
from serving.kernels.ops import Kernels
from serving.kernels.reference import ReferenceKernels

log = logging.getLogger(__name__)

Choice = Literal["auto", "reference", "compiled"]


def select_kernels(choice: Choice, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The executors for a backbone on `device` in `dtype`.

    `auto` takes the compiled kernels where they can be had (C++ on the CPU, Triton on CUDA) and plain torch elsewhere,
    and says so. Raises BackboneRefused where `compiled` is asked for and can't be had.
    """
    if choice == "reference":
        return Kernels(ReferenceKernels(), None, None)
    found = _compiled(device, dtype)
    if isinstance(found, Kernels):
        return found
    if choice == "compiled":
        raise BackboneRefused(
            f"The compiled kernels are asked for, but {found}.",
            param="engine.kernels",
            remedy="Set it to 'auto', or install a C++ compiler (CPU) or deltamux[cuda] (CUDA).",
        )
    log.warning("deltas run in plain torch: %s", found)
    return Kernels(ReferenceKernels(), None, None)


def _compiled(device: torch.device, dtype: torch.dtype) -> Kernels | str:
    """The compiled kernels, or why they can't be had."""
    if device.type == "cpu" and dtype in cpu.DTYPE_CODES:
        try:
            return Kernels(ReferenceKernels(), cpu.CpuRows(), CpuDecodeAttention())
        except KernelBuildError as error:
            return str(error)
    if device.type == "cuda":
        try:
            from serving.kernels.triton_rows import DTYPES, TritonRows  # noqa: PLC0415  (optional)
        except ImportError as error:
            return f"triton can't be imported: {error}"
        if dtype in DTYPES:
            return Kernels(ReferenceKernels(), TritonRows(device), None)
    return f"they run fp32 and bf16 on CPU, and fp16 too on CUDA; the backbone is {dtype} on {device.type}"
