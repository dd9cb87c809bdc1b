"""Which executors a replica gets. Chosen once, at start."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from adapters.errors import BackboneRefused
from serving.kernels.cpu import DTYPE_CODES, CpuRows
from serving.kernels.cpu_attention import CpuDecodeAttention
from serving.kernels.cpu_build import KernelBuildError
from serving.kernels.ops import Kernels
from serving.kernels.reference import ReferenceKernels

log = logging.getLogger(__name__)

Choice = Literal["auto", "reference", "compiled"]


def select_kernels(choice: Choice, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The executors for a backbone on `device` in `dtype`.

    `auto` takes the compiled kernels where they can be had and plain torch elsewhere, and says so. Raises
    BackboneRefused where `compiled` is asked for and can't be had.
    """
    if choice == "reference":
        return Kernels(ReferenceKernels(), None, None)
    reason = None
    if device.type != "cpu" or dtype not in DTYPE_CODES:
        reason = f"they run fp32 and bf16 on CPU, the backbone is {dtype} on {device.type}"
    else:
        try:
            return Kernels(ReferenceKernels(), CpuRows(), CpuDecodeAttention())
        except KernelBuildError as error:
            reason = str(error)
    if choice == "compiled":
        raise BackboneRefused(
            f"The compiled kernels are asked for, but {reason}.",
            param="engine.kernels",
            remedy="Set it to 'auto' or install a C++ compiler.",
        )
    log.warning("deltas run in plain torch: %s", reason)
    return Kernels(ReferenceKernels(), None, None)
