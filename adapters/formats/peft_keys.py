"""PEFT's tensor keys: `base_model.model.<module path>.<field>` -> module and field, strays refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.formats.problems import Problems, quoted

PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."
PROMPT = "prompt_embeddings"
"""The key of what prompt methods train."""

# Parts of keys that belong to features which are not served, and what to do.
REFUSED_PARTS: Mapping[str, str] = {
    ".experts.": "deltas on the experts of a mixture are not executed: each expert sees only some tokens. "
    "Train the attention projections",
    ".mlp.gate.": "the router of a mixture of experts is no site. Train the attention projections",
    ".lora_embedding_": "LoRA on an embedding is not executed yet. Train without it",
    ".base_layer.weight": "a copy of a base weight. Save with `save_pretrained(save_embedding_layers=False)`",
    ".modules_to_save.": "PEFT's `save_pretrained` writes saved modules without this part. Save the adapter with it",
    ".original_module.": "a copy of a base parameter beside a saved module. Train it with bias='none'",
    ".token_adapter.": "the config names no such token rows",
    ".lora_diag": "KaSA drops singular directions of each base weight",
    ".lora_velora_": "a tensor that only VeLoRA's training reads. Save the adapter without velora_config",
}


def under_body(tensors: Mapping[str, Tensor], spec: BackboneSpec) -> dict[str, Tensor]:
    """The tensors of an adapter with the backbone's body in their keys, as in models with a head.

    Adapters that were trained on the body alone leave its name out: `encoder.layer.0…` for `bert.encoder.layer.0…`.
    Prompts are saved with other keys, which name the body.
    """
    body = spec.body
    if PROMPT in tensors or not body:
        return dict(tensors)
    inside = {module.path.split(".")[1] for module in spec.modules if module.path.startswith(f"{body}.")}
    tops = {module.path.partition(".")[0] for module in spec.modules}
    found = {}
    for key, tensor in tensors.items():
        path = key.removeprefix(PREFIX)
        top = path.partition(".")[0]
        bare = key.startswith(PREFIX) and top in inside and top not in tops
        found[f"{PREFIX}{body}.{path}" if bare else key] = tensor
    return found


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and its key in the file."""

    key: str
    tensor: Tensor


def place(
    tensors: Mapping[str, Tensor], fields: Mapping[str, str], spec: BackboneSpec, problems: Problems
) -> dict[str, dict[str, Placed]]:
    """Module path -> field -> tensor. `fields` maps the key's end to the field's name.

    Keys that name no module or no field are added to `problems`, as is a field that two keys name.
    """
    placed: dict[str, dict[str, Placed]] = {}
    for key, tensor in tensors.items():
        path, field = _split(key, fields)
        if path not in spec.by_path or field is None:
            problems.add(f"A tensor without a site: {quoted(key)}: {_why(key, spec)}.")
            continue
        found = placed.setdefault(path, {})
        if field in found:
            problems.add(f"Two tensors for one place: {quoted(found[field].key)} and {quoted(key)}.")
        found[field] = Placed(key, tensor)
    return placed


def take_shared(
    tensors: Mapping[str, Tensor], names: tuple[str, ...], problems: Problems
) -> tuple[dict[str, Placed] | None, dict[str, Tensor]]:
    """The tensors that all modules of the adapter share (keys `base_model.<name>`), and the others.

    None, with the problems noted, where one is missing.
    """
    keys = {f"{SHARED_PREFIX}{name}": name for name in names}
    for key in sorted(keys.keys() - tensors.keys()):
        problems.add(f"A site without a tensor: the file has no {quoted(key)}, which all modules share.")
    shared = {name: Placed(key, tensors[key]) for key, name in keys.items() if key in tensors}
    rest = {key: tensor for key, tensor in tensors.items() if key not in keys}
    return shared if len(shared) == len(names) else None, rest


def check_indices(placed: Placed, size: int, problems: Problems) -> bool:
    """True where the tensor holds whole numbers from 0 to size - 1; otherwise the problem is noted."""
    tensor = placed.tensor
    if tensor.dtype.is_floating_point:
        problems.add(f"{quoted(placed.key)}: got {tensor.dtype}, expected integers.")
    elif tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < size:
        problems.add(f"{quoted(placed.key)}: its numbers are outside 0 to {size - 1}.")
    else:
        return True
    return False


def check_shape(placed: Placed, expected: tuple[int, ...], problems: Problems) -> bool:
    """True where the tensor has the expected shape; otherwise the problem is noted."""
    got = tuple(placed.tensor.shape)
    if got != expected:
        problems.add(f"{quoted(placed.key)}: got shape {list(got)}, expected {list(expected)}.")
    return got == expected


def _split(key: str, fields: Mapping[str, str]) -> tuple[str, str | None]:
    if key.startswith(PREFIX):
        # longest first: `base_layer.bias` also ends in `bias`
        for end in sorted(fields, key=len, reverse=True):
            if key.endswith("." + end):
                return key[len(PREFIX) : -len(end) - 1], fields[end]
    return "", None


def _why(key: str, spec: BackboneSpec) -> str:
    for part, reason in REFUSED_PARTS.items():
        if part in key:
            return reason
    module = spec.by_path.get(key.removeprefix(PREFIX).removesuffix(".weight"))
    if module is not None and module.writes[0].site.local in ("embed", "logits"):
        return (
            "modules_to_save does not name its module, so it is a copy of the base weight. Save with "
            "`save_pretrained(save_embedding_layers=False)`; a resized vocabulary is another backbone"
        )
    if not key.startswith(PREFIX):
        return f"keys start with {PREFIX!r} in files that PEFT's `save_pretrained` writes"
    return f"the backbone {quoted(spec.name)} has no such module, or the method no such tensor"
