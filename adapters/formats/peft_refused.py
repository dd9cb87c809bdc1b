"""PEFT methods that have no reader, each with what would be needed.

Source: the layers and saved tensors of PEFT 0.21.2.
"""

from __future__ import annotations

from collections.abc import Mapping

_CONVERT = "Convert it offline with `deltamux convert`, which runs your own PEFT and measures what it does."
_FROM_BASE = f"its update is computed from the base weights, which an upload does not hold. {_CONVERT}"
_FROM_SEED = (
    "the places of its coefficients are not in the file but drawn again from a seed, which other versions of torch "
    f"may draw otherwise. {_CONVERT}"
)

REFUSED_METHODS: Mapping[str, str] = {
    "ADAMSS": f"which outputs each subspace writes is clustered from the base weights and not in the file. {_CONVERT}",
    "DEFT": _FROM_BASE,
    "FOURIERFT": _FROM_SEED,
    "FROD": _FROM_BASE,
    "GLORA": _FROM_BASE,
    "HIRA": _FROM_BASE,
    "LILY": "its router averages over the whole batch, so that a row's result would depend on the other rows.",
    "MIXED": "it names several adapters of different methods. Upload each one by itself.",
    "OSF": _FROM_BASE,
    "PEANUT": _FROM_BASE,
    "PSOFT": _FROM_BASE,
    "SHADOW": "it runs a second model beside the backbone.",
    "SUPERTUNING": f"sparse changes of base weights are read only in the canonical format. {_CONVERT}",
    "TINYLORA": (
        "its trained vectors are numbered in the order of the training model's modules instead of named after them. "
        f"{_CONVERT}"
    ),
    "WAVEFT": _FROM_SEED,
    "XLORA": "it routes each token between several adapters after a first pass. Upload each adapter by itself.",
}
