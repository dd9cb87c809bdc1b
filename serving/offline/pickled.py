"""Reading what torch.save wrote, on the uploader's machine: tensors by name and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from adapters.errors import InvalidDelta


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict; those that share memory still do. Raises InvalidDelta.

    torch's restricted unpickler builds tensors and plain containers only; any other object is refused.
    """
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler passes on whatever a damaged file makes it raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise InvalidDelta(
            [f"{file.name}: it holds more than tensors, or is damaged: {type(error).__name__}: {first}"],
            param=file.name,
        ) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise InvalidDelta([f"{file.name}: expected one tensor for each name."], param=file.name)
    return {key: value.detach() for key, value in loaded.items()}
