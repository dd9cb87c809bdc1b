"""What an adapted linear module computes, recovered from its outputs alone.

A module whose output is affine in its input is W' x + b'. Zero gives b', the unit vectors give the columns of W'.
Random inputs then show whether the module is affine at all: of several batch and sequence lengths and of two sizes,
so that a module whose result depends on the other rows, on the other tokens, on chance or on the size of its input
does not pass.

Probing is done in float64: in fp32 the later subtraction of W would leave noise of its size in the change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""[batch, tokens, d_in] -> [batch, tokens, d_out], in the dtype of its input."""

SHAPES = ((1, 1), (1, 7), (5, 1), (3, 11))
"""(batch, tokens) of the random inputs."""

SIZES = (1.0, 8.0)
"""Standard deviations of the random inputs."""

LIMITS = {torch.float64: 2e-6, torch.float32: 2e-5}
"""Largest |recovered - module| that counts as equal, relative to max(1, max |module|).

Some modules compute in fp32 whatever they are given, so float64 can't be held to its own precision.
"""

_ROWS = 1024  # unit vectors a call: bounds what a wide module's probe takes


class NotAffineError(Exception):
    """The module is no affine function of its input, token by token; the text says how that showed."""


@dataclass(frozen=True, slots=True)
class AffineMap:
    """y = x @ weight.T + bias; `noise`: by how much its entries may be off. Shapes: [d_out, d_in], [d_out]."""

    weight: Tensor
    bias: Tensor
    noise: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@torch.no_grad()
def recover(module: Forward, d_in: int, *, dtype: torch.dtype = torch.float64) -> AffineMap:
    """The affine map that `module` is, in float64. Raises NotAffineError where it is none."""
    bias = module(torch.zeros(1, 1, d_in, dtype=dtype))[0, 0]
    columns = [
        module(torch.eye(d_in, dtype=dtype)[None, start : start + _ROWS])[0] - bias
        for start in range(0, d_in, _ROWS)
    ]
    found = AffineMap(torch.cat(columns).T, bias)
    error = check_equal(module, found, d_in, dtype=dtype)
    # errors of the d_in entries of a row add up in each output as a random walk
    return AffineMap(found.weight.double(), bias.double(), noise=error / d_in**0.5)


@torch.no_grad()
def check_equal(module: Forward, found: Forward, d_in: int, *, dtype: torch.dtype) -> float:
    """Compare `module` with `found` on random inputs of every shape and size; the largest error per unit of input.

    Raises NotAffineError where it is over the limit.
    """
    draw = torch.Generator().manual_seed(0)
    largest = 0.0
    for shape in SHAPES:
        for size in SIZES:
            x = size * torch.randn(*shape, d_in, generator=draw, dtype=torch.float64).to(dtype)
            expected = module(x)
            got = found(x)
            error, limit = _distance(got, expected), LIMITS[dtype]
            if not error <= limit:  # also true for NaN
                raise NotAffineError(
                    f"{_why(module, found, d_in, dtype)} (off by {error:.1e} of the output's scale, limit {limit:.0e})"
                )
            largest = max(largest, float((got - expected).abs().max()) / size)
    return largest


def _distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def _why(module: Forward, found: Forward, d_in: int, dtype: torch.dtype) -> str:
    """What kind of function a module is that is not affine, seen on rows of several tokens."""
    x = torch.randn(*SHAPES[-1], d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )
    expected, limit = module(x), LIMITS[dtype]
    if not (torch.isfinite(expected).all() and torch.isfinite(found(x)).all()):
        return "its output is not finite"
    if not _distance(module(x), expected) <= limit:
        return "it draws random numbers: the same input gives another output the next time"
    alone = torch.stack([torch.cat([module(token[None, None])[0] for token in row]) for row in x])
    if not _distance(alone, expected) <= limit:
        return "a token's output depends on the other tokens or rows of the batch"
    return "its output is not affine in its input"
