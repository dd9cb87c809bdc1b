"""The canonical pair (manifest.json + tensors.safetensors) as an upload: the same caps and checks as any other.

Format: `adapters.canonical`, `deltamux/1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from adapters.backbone_spec import BackboneSpec
from adapters.canonical import delta_of
from adapters.errors import InvalidDelta
from adapters.formats.base_claim import check_base
from adapters.formats.files import Upload
from adapters.formats.problems import Problems, kind_of, quoted
from adapters.normal_form import Delta

# An op is some 200 bytes of JSON and a file holds at most 20,000 tensors.
MAX_MANIFEST_BYTES = 4 * 1024 * 1024

KEYS: Mapping[str, type] = {
    "format": str,
    "method": str,
    "task": str,
    "backbone_digest": str,
    "position_offset": int,
    "labels": dict,
    "lineage": dict,
    "typology": dict,  # derived again from the ops
    "ops": list,
}


def read_pair(
    upload: Upload, spec: BackboneSpec, backbone_digest: str | None, problems: Problems
) -> Delta | None:
    """The delta of a canonical pair, or None where it can't be read; what is wrong is added to `problems`."""
    raw = upload.config
    before = len(problems.texts)
    for key in raw.keys() - KEYS.keys() - {"head"}:  # a delta without a task head has none
        problems.add(f"manifest.json: the key {quoted(key)} is not known in this format.")
    for key, kind in KEYS.items():
        if type(raw.get(key)) is not kind:
            got = kind_of(raw[key]) if key in raw else "nothing"
            problems.add(f"manifest.json: {key}: got {got}, expected {_WORDS[kind]}.")
    if len(problems.texts) > before:
        return None
    try:
        delta = delta_of(upload.config_bytes, upload.tensors)
    except InvalidDelta as error:
        problems.extend(error.problems)
        return None
    if delta.backbone_digest:  # validation compares it
        if backbone_digest is not None:
            check_base(None, None, spec, backbone_digest, problems)
        return delta
    lineage = check_base(None, None, spec, backbone_digest, problems)
    return replace(delta, backbone_digest=spec.digest, lineage={**delta.lineage, **lineage})


_WORDS: Mapping[type, str] = {str: "a string", int: "an integer", dict: "an object", list: "a list"}
