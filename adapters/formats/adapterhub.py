"""AdapterHub adapters (adapter_config.json + adapter.safetensors) -> Delta. The library itself is never imported.

Format: `adapters` 1.3.0; tests/golden/README.md writes down its keys and formulas as read in that library's source.
`config.architecture` names the method, none stands for a bottleneck adapter; a union has several methods in one file.
Keys are found through the sites of the backbone, so that a reader knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from adapters.backbone_spec import BackboneSpec
from adapters.formats.adapterhub_bottleneck import read_bottleneck
from adapters.formats.adapterhub_config import TOP_LEVEL, UNION, release
from adapters.formats.adapterhub_lora import read_lora
from adapters.formats.adapterhub_prefix import read_prefix
from adapters.formats.adapterhub_reft import acts_last, read_reft
from adapters.formats.adapterhub_stored import Part, Stored
from adapters.formats.base_claim import check_base
from adapters.formats.files import Upload
from adapters.formats.problems import Problems, name_or_kind
from adapters.formats.schema import check_config
from adapters.normal_form import Delta

Reader = Callable[[Mapping[str, Any], str, Stored], Part | None]
"""(nested config, its path in messages, tensors) -> what it amounts to, or None where the config was refused, so that
its tensors can't be told from others."""

READERS: Mapping[str | None, Reader] = {
    None: read_bottleneck,
    "lora": read_lora,
    "prefix_tuning": read_prefix,
    "reft": read_reft,
}

TOP = "config."
"""Path of the outermost config in messages."""

REFUSED: Mapping[str, str] = {
    "mtl_lora": "multi-task LoRA takes the task with each request. Train one LoRA for each task",
    "prompt_tuning": "AdapterHub puts its prompts behind the norm of an encoder's embeddings, which is not served, and "
    "has none on decoders. Train prompt tuning with PEFT",
}

UNPROVEN = frozenset({"albert", "deberta-v2"})
"""Architectures of which no adapter of the library has been compared with it."""


def read_adapterhub(
    upload: Upload, spec: BackboneSpec, backbone_digest: str | None, problems: Problems
) -> Delta | None:
    """The delta of an AdapterHub adapter, or None where its method is not served; problems are noted."""
    raw = upload.config
    top = check_config(raw, TOP_LEVEL, problems)
    claimed = raw.get("model_name")
    lineage = check_base(
        claimed if isinstance(claimed, str) else None,
        None,
        spec,
        backbone_digest,
        problems,
        param="model_name",
    )
    for key, size in (("model_type", spec.model_type), ("hidden_size", spec.hidden_size)):
        if top[key] not in (None, size):
            problems.add(
                f"adapter_config.json: {key}: the backbone's is {size}; another model was trained.", param=key
            )
    if spec.model_type in UNPROVEN:
        problems.add(
            f"adapter_config.json: model_type: AdapterHub's adapters of {spec.model_type} are not served. Train with "
            "PEFT.",
            param="model_type",
        )
        return None
    nested = raw.get("config")
    if not isinstance(nested, dict):  # TOP_LEVEL refused it
        return None
    if top["name"] is None or top["version"] is None:  # refused: no keys could be told from others
        return None
    stored = Stored(
        upload.tensors,
        top["name"],
        spec,
        problems,
        release=release(top["version"]) or (0, 0),
        model_class=top["model_class"] or "",
    )
    part = _read(nested, TOP, stored)
    if part is None:
        return None
    method, ops = part
    stored.refuse_strays()
    delta = Delta(method=method, ops=ops, backbone_digest=spec.digest)
    return replace(delta, lineage={"format": "adapterhub", **lineage})


def _read(nested: Mapping[str, Any], path: str, stored: Stored) -> Part | None:
    architecture = nested.get("architecture")
    if architecture == "union" and path == TOP:  # the library looks for methods in the outermost one only
        return _read_union(nested, path, stored)
    reader = READERS.get(architecture) if architecture is None or isinstance(architecture, str) else None
    if reader is None:
        why = (
            REFUSED.get(architecture, "supported: lora, prefix_tuning, reft, union, and none for bottlenecks")
            if isinstance(architecture, str)
            else "expected a string or null"
        )
        stored.problems.add(
            f"adapter_config.json: {path}architecture: {name_or_kind(architecture)} is not served: {why}.",
            param="architecture",
        )
        return None
    return reader(nested, path, stored)


def _read_union(nested: Mapping[str, Any], path: str, stored: Stored) -> Part | None:
    """All methods of a union (MAM: prefix tuning and a parallel bottleneck), those at the end of a layer in order."""
    configs = check_config(nested, UNION, stored.problems, prefix=path)["configs"]
    if configs is None:
        return None
    parts = [_read(config, f"{path}configs[{index}].", stored) for index, config in enumerate(configs)]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    ops = sorted((op for _, ops in found for op in ops), key=acts_last)
    names = [name for name, _ in found]
    return "mam" if sorted(names) == ["par_bn", "prefix_tuning"] else "+".join(names)[:64], tuple(ops)
