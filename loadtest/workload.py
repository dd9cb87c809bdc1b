"""Prompts and arrivals: seeded, the same for every server and library."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VOCAB_SIZE = 16_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: seconds after the start, prompt ids, index of its delta (None: bare), tokens to generate."""

    at_s: float
    prompt: tuple[int, ...]
    delta: int | None
    output_tokens: int


def random_prompts(count: int, *, shortest: int = 16, longest: int = 128, seed: int = 7) -> list[list[int]]:
    """`count` prompts of `shortest` to `longest` tokens."""
    draw = random.Random(seed)  # noqa: S311 - a workload, not a secret
    return [
        [draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(shortest, longest))] for _ in range(count)
    ]


def zipf_choices(count: int, num_deltas: int, exponent: float, *, seed: int = 7) -> list[int]:
    """`count` delta indices; the k-th most frequent has a share proportional to k ** -exponent."""
    weights = np.arange(1, num_deltas + 1, dtype=np.float64) ** -exponent
    draw = np.random.default_rng(seed)
    return [int(i) for i in draw.choice(num_deltas, size=count, p=weights / weights.sum())]


def power_choices(count: int, num_deltas: int, alpha: float, *, seed: int = 7) -> list[int]:
    """`count` delta indices floor(n * Power(alpha)): alpha 1 is uniform. Source: S-LoRA's trace generator."""
    draw = np.random.default_rng(seed)
    return [int(i) for i in np.floor(num_deltas * draw.power(alpha, size=count))]


def gamma_times(count: int, rate: float, cv: float, *, seed: int = 7) -> list[float]:
    """Arrival times with gaps of mean 1 / rate and coefficient of variation cv. Source: S-LoRA section 6."""
    draw = np.random.default_rng(seed)
    gaps = draw.gamma(1 / cv**2, cv**2 / rate, size=count)
    return [float(t) for t in np.cumsum(gaps)]


def times_within(seconds: float, rate: float, cv: float, *, seed: int = 7) -> list[float]:
    """`gamma_times` of the first `seconds`, the first of them at 0: as many as there happen to be, one at least."""
    times = gamma_times(int(4 * rate * seconds) + 64, rate, cv, seed=seed)
    return [at for at in (time - times[0] for time in times) if at < seconds]


def uniform_lengths(count: int, low: int, high: int, *, seed: int = 7) -> list[int]:
    """`count` lengths, low to high inclusive."""
    draw = np.random.default_rng(seed)
    return [int(n) for n in draw.integers(low, high + 1, size=count)]


def arrivals(
    times: Sequence[float], deltas: Sequence[int | None], prompts: Sequence[int], outputs: Sequence[int]
) -> list[Arrival]:
    """Put together times, deltas, prompt lengths and output lengths; the prompts' tokens are seeded."""
    draw = random.Random(11)  # noqa: S311
    return [
        Arrival(at, tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(length)), delta, output)
        for at, delta, length, output in zip(times, deltas, prompts, outputs, strict=True)
    ]
