"""What a delta kernel computes: the contract that every executor meets and that the contract tests state.

Legend: T tokens, I input width, O output width, r rank. Tokens of one delta are contiguous: a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from adapters.normal_form import Activation


@dataclass(frozen=True, slots=True, eq=False)
class LowRankWeights:
    """A placed LowRank: A [r, I], B [columns, r], a_bias [r], b_bias [columns], all fp32 on the device.

    Columns [start, stop) of the module's output are written.
    """

    A: Tensor
    B: Tensor
    scaling: float
    activation: Activation
    a_bias: Tensor | None
    b_bias: Tensor | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class AffineWeights:
    """A placed Affine: scale and shift [columns] or None; columns [start, stop) are touched."""

    scale: Tensor | None
    shift: Tensor | None
    start: int
    stop: int


class LowRankSegment(NamedTuple):
    """Tokens [start, stop) go through `weights`."""

    start: int
    stop: int
    weights: LowRankWeights


class AffineSegment(NamedTuple):
    """Tokens [start, stop) go through `weights`."""

    start: int
    stop: int
    weights: AffineWeights


class DeltaKernels(Protocol):
    """Executors of the normal form's row-wise ops. Chosen once, when the backbone is loaded."""

    def add_low_rank(self, y_TO: Tensor, x_TI: Tensor, segments: Sequence[LowRankSegment]) -> None:
        """Add each segment's low-rank delta in place.

        Semantics: y[t, cols] += scaling * (f(x[t] @ A.T + a_bias) @ B.T + b_bias) for t in the segment. All x are
        read before any y of the same segment is written, so y and x may be the same storage (sequential adapters).
        Shapes: y [T, O] fp32, x [T, I] fp32. Source: LoRA section 4.1; Houlsby et al. section 2.
        """
        ...

    def apply_affine(self, y_TO: Tensor, segments: Sequence[AffineSegment]) -> None:
        """Scale and shift each segment's columns in place.

        Semantics: y[t, cols] = y[t, cols] * scale + shift. Shapes: y [T, O] fp32. Source: IA3 section 3.3.
        """
        ...
