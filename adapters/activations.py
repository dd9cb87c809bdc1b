"""The normal form's activation functions, for readers that evaluate a small network once and for kernels in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.normal_form import Activation


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


FUNCTIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
}
