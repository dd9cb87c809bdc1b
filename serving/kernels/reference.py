"""The contract in plain torch, a loop over segments: the oracle of the tests and the CPU executor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.normal_form import Activation
from serving.kernels.ops import AffineSegment, LowRankSegment


def _gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
}


class ReferenceKernels:
    """`DeltaKernels` in plain torch, on any device and in any float dtype."""

    def add_low_rank(self, y_TO: Tensor, x_TI: Tensor, segments: Sequence[LowRankSegment]) -> None:
        for start, stop, w in segments:
            x = x_TI[start:stop]
            hidden = torch.mm(x, w.A.t()) if w.a_bias is None else torch.addmm(w.a_bias, x, w.A.t())
            if w.activation != "identity":
                hidden = ACTIVATIONS[w.activation](hidden)
            y = y_TO[start:stop, w.start : w.stop]
            y.addmm_(hidden, w.B.t(), alpha=w.scaling)
            if w.b_bias is not None:
                y.add_(w.b_bias, alpha=w.scaling)

    def apply_affine(self, y_TO: Tensor, segments: Sequence[AffineSegment]) -> None:
        for start, stop, w in segments:
            y = y_TO[start:stop, w.start : w.stop]
            if w.scale is not None:
                y.mul_(w.scale)
            if w.shift is not None:
                y.add_(w.shift)
