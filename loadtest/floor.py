"""What this machine can do: read bandwidth and multiply rate, measured in the run that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loadtest.report import seconds

READ_BYTES = 256 << 20
PRODUCT = 1024
TRIES = 5


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes a second read from memory, and floating-point operations a second of fp32 matrix products."""

    bandwidth: float
    rate: float

    def floor_s(self, num_bytes: float, flops: float) -> float:
        """The least time for reading `num_bytes` and for `flops`, whichever is longer."""
        return max(num_bytes / self.bandwidth, flops / self.rate)


def measure_machine(read_bytes: int = READ_BYTES) -> Machine:
    """The best of a few tries each, with torch's present number of threads."""
    buffer = torch.ones(read_bytes // 4)
    square = torch.randn(PRODUCT, PRODUCT)
    reading = min(seconds(buffer.sum) for _ in range(TRIES))
    multiplying = min(seconds(lambda: torch.mm(square, square)) for _ in range(TRIES))
    return Machine(buffer.nbytes / reading, 2 * PRODUCT**3 / multiplying)
