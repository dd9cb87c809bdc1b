"""What AdapterHub's library pickled -> the canonical pair, by the server's own reader.

The library can't be loaded here to compare with: it is imported under the name of this project's own package. Its
formulas are tested against logits that it gave in an environment of its own (tests/golden).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor

from adapters.errors import InvalidDelta
from adapters.formats import read_upload
from adapters.normal_form import Delta
from serving.model.backbone import Backbone
from serving.model.packed import plain_weight
from serving.offline.pickled import read_tensors

CONFIG = "adapter_config.json"
TENSORS, PICKLED = "adapter.safetensors", "pytorch_adapter.bin"
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")


def is_hub(directory: Path) -> bool:
    """True where AdapterHub's library saved an adapter."""
    return any((directory / name).is_file() for name in (TENSORS, PICKLED))


def read_hub(directory: Path, backbone: Backbone) -> tuple[Delta, tuple[str, ...]]:
    """The delta in `directory`, and what was left out of it. Raises InvalidDelta."""
    notes = _drop_heads(directory, backbone)
    plain = directory / TENSORS
    tensors = load_file(plain) if plain.is_file() else without_copies(read_tensors(directory / PICKLED))
    files = {CONFIG: (directory / CONFIG).read_bytes(), TENSORS: save(tensors)}
    return read_upload(files, backbone.spec, backbone_digest=backbone.spec.digest), notes


def without_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, under its shortest name; the library keeps a prefix under every layer, in one memory."""
    kept: dict[tuple[object, ...], str] = {}
    for key in sorted(tensors, key=lambda key: (len(key), key)):
        tensor = tensors[key]
        kept.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), key)
    return {key: tensors[key].contiguous().clone() for key in kept.values()}


def _drop_heads(directory: Path, backbone: Backbone) -> tuple[str, ...]:
    """Says that a head is left out which is the backbone's own. Raises InvalidDelta for another one."""
    file = next((directory / name for name in HEADS if (directory / name).is_file()), None)
    if file is None:
        return ()
    for key, tensor in (read_tensors(file) if file.suffix == ".bin" else load_file(file)).items():
        path, _, name = key.rpartition(".")
        module = backbone.spec.by_path.get(path)
        base = None
        if module is not None and name in ("weight", "bias"):
            owner = backbone.model.get_submodule(path)
            base = plain_weight(owner) if name == "weight" else getattr(owner, name)
        if base is None or base.shape != tensor.shape or not bool((base.float() == tensor.float()).all()):
            raise InvalidDelta(
                [
                    f"{file.name}: {key}: a prediction head that is not the backbone's own is not served from this "
                    "format. Save with `with_head=False`."
                ],
                param=file.name,
            )
    return (f"{file.name} is a copy of the backbone's own head, and is left out",)
