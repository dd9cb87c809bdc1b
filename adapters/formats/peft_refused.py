"""PEFT methods that have no reader, each with what would be needed.

Source: the layers and saved tensors of PEFT 0.21.2.
"""

from __future__ import annotations

from collections.abc import Mapping

_AS_LORA = "PEFT's `save_as_lora` makes a LoRA of it on the training machine (check how close it comes); upload that."
_FROM_BASE = (
    "its update is computed from the base weights, which an upload does not hold; this release has no offline "
    "conversion for it."
)
_FROM_SEED = (
    "the places of its coefficients are not in the file but drawn again from a seed, which other versions of torch "
    f"may draw otherwise. {_AS_LORA}"
)

REFUSED_METHODS: Mapping[str, str] = {
    "ADAMSS": "which outputs each subspace writes is clustered from the base weights and not in the file.",
    "DEFT": _FROM_BASE,
    "FOURIERFT": _FROM_SEED,
    "FROD": _FROM_BASE,
    "GLORA": _FROM_BASE,
    "HIRA": f"its update is computed from the base weights, which an upload does not hold. {_AS_LORA}",
    "LILY": "its router averages over the whole batch, so that a row's result would depend on the other rows.",
    "MIXED": "it names several adapters of different methods. Upload each one by itself.",
    "OSF": _FROM_BASE,
    "PEANUT": _FROM_BASE,
    "PSOFT": f"its update is computed from the base weights, which an upload does not hold. {_AS_LORA}",
    "SHADOW": "it runs a second model beside the backbone.",
    "SUPERTUNING": "sparse changes of base weights are not served yet.",
    "TINYLORA": (
        "its trained vectors are numbered in the order of the training model's modules instead of named after them. "
        f"{_AS_LORA}"
    ),
    "WAVEFT": _FROM_SEED,
    "XLORA": "it routes each token between several adapters after a first pass. Upload each adapter by itself.",
}
