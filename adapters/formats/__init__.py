"""Reading uploads: which files there are decides the format, one reader per format gives the delta.

| files | format |
|---|---|
| adapter_config.json, adapter_model.safetensors | PEFT |
| adapter_config.json, adapter.safetensors | AdapterHub |
| manifest.json, tensors.safetensors | canonical |
| head.json, with a cloze | the backbone as it is, behind that head |

Beside all but the third: `head.json` and `ood.safetensors`, which say more of a task head (`head_file`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.errors import InvalidDelta
from adapters.formats.adapterhub import read_adapterhub
from adapters.formats.base_claim import check_base
from adapters.formats.canonical_pair import MAX_MANIFEST_BYTES, read_pair
from adapters.formats.files import CONVERT, MAX_CONFIG_BYTES, Upload, read_json, read_safetensors
from adapters.formats.head_file import (
    HEAD_FILE,
    STATISTICS_FILE,
    HeadFile,
    read_head_file,
    with_head_file,
    with_statistics,
)
from adapters.formats.peft import read_peft
from adapters.formats.problems import Problems, quoted
from adapters.normal_form import Delta
from adapters.tensor_files import MappedFile, let_go_of
from adapters.validate import check

Reader = Callable[[Upload, BackboneSpec, str | None, Problems], Delta | None]


@dataclass(frozen=True, slots=True)
class Format:
    """A pair of files and the reader of their content."""

    name: str
    config: str
    tensors: str
    read: Reader
    max_config_bytes: int = MAX_CONFIG_BYTES


FORMATS: tuple[Format, ...] = (
    Format("PEFT", "adapter_config.json", "adapter_model.safetensors", read_peft),
    Format("AdapterHub", "adapter_config.json", "adapter.safetensors", read_adapterhub),
    Format("canonical", "manifest.json", "tensors.safetensors", read_pair, MAX_MANIFEST_BYTES),
)

HEAD_ALONE = "head.json with a cloze"
"""The format of an upload without tensors of its own."""

BESIDE = frozenset({HEAD_FILE, STATISTICS_FILE})
READ = frozenset(name for form in FORMATS for name in (form.config, form.tensors)) | BESIDE
IGNORED = frozenset({"README.md"})

_HEAD = "a prediction head replaces the backbone's own, which is not served yet. Save with `with_head=False`."
REFUSED: Mapping[str, str] = {
    "model_head.safetensors": _HEAD,
    "head_config.json": _HEAD,
    "pytorch_model_head.bin": _HEAD,
    "adapter_interface.json": "AdapterHub's plug-in mode follows other formulas than its own model classes.",
    "adapter_model.bin": f"pickled tensors are never read. {CONVERT}",
    "pytorch_adapter.bin": f"pickled tensors are never read. {CONVERT}",
}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def detect(names: Collection[str]) -> Format | None:
    """The format that a set of file names makes up, None for a head alone.

    Raises InvalidDelta naming each file that does not belong.
    """
    if HEAD_FILE in names and set(names) <= BESIDE | IGNORED:
        return None
    problems = Problems()
    given = set(names) - IGNORED - (BESIDE if "manifest.json" not in names else frozenset())
    for name in sorted(given - READ):
        problems.add(f"{quoted(name)}: {_why_refused(name)}", param="file")
    whole = [form for form in FORMATS if {form.config, form.tensors} <= given]
    if not whole:
        sets = "; ".join(f"{form.config} with {form.tensors} ({form.name})" for form in FORMATS)
        have = ", ".join(sorted(given & READ)) or "none of them"
        problems.add(f"An upload is one of: {sets}; {HEAD_ALONE}. Got {have}.", param="file")
    elif len(whole) > 1 or given & READ != {whole[0].config, whole[0].tensors}:
        problems.add(
            f"The files {', '.join(sorted(given & READ))} belong to different formats; send one pair.",
            param="file",
        )
    problems.raise_if_any()
    return whole[0]


def read_upload(
    files: Mapping[str, bytes | MappedFile], spec: BackboneSpec, *, backbone_digest: str | None = None
) -> Delta:
    """The delta of an upload, checked against `spec` and bound to its digest.

    `files`: file name -> content, as the parts of the upload name themselves; of a mapped file, no more than one
    tensor is in memory at a time while it is checked, and the delta's tensors are views of it. `backbone_digest`:
    what the uploader says of the backbone; it outweighs any name in the config.
    Raises InvalidDelta with every problem at once; PayloadTooLarge where a file or header is over its cap.
    """
    form = detect(files)
    problems = Problems()
    if form is None:
        said, statistics = _beside(files, problems)
        delta = _bare(said, spec, backbone_digest, problems)
    else:
        written, stored = files[form.config], files[form.tensors]
        config = read_json(form.config, written, problems, max_bytes=form.max_config_bytes)
        tensors = read_safetensors(form.tensors, stored, problems)
        said, statistics = _beside(files, problems)
        delta = None
        if config is not None and tensors is not None:
            # behind a cloze is a body, whatever its head is for
            task = None if said is None or said.cloze is not None else said.task
            delta = form.read(Upload(written[:], config, tensors, task), spec, backbone_digest, problems)
    if delta is not None and said is not None:
        delta = with_head_file(delta, said, problems)
    if delta is not None and statistics is not None:
        delta = with_statistics(delta, statistics, problems)
    if delta is not None and (delta.ops or not problems.texts):
        problems.extend(check(delta, spec, between=lambda: let_go_of(files)))
    problems.raise_if_any()
    assert delta is not None, form
    return delta


def _bare(
    said: HeadFile | None, spec: BackboneSpec, backbone_digest: str | None, problems: Problems
) -> Delta | None:
    """The backbone as it is, for a head alone to stand on."""
    if said is not None and said.cloze is None:
        problems.add(f"{HEAD_FILE}: only a cloze stands alone; other heads have tensors.", param=HEAD_FILE)
    if said is None or said.cloze is None:
        return None
    lineage = check_base(None, None, spec, backbone_digest, problems)
    return Delta(method="CLOZE", ops=(), backbone_digest=spec.digest, lineage={"format": "head", **lineage})


def _beside(
    files: Mapping[str, bytes | MappedFile], problems: Problems
) -> tuple[HeadFile | None, dict[str, Tensor] | None]:
    said = statistics = None
    if HEAD_FILE in files and (raw := read_json(HEAD_FILE, files[HEAD_FILE], problems)) is not None:
        said = read_head_file(raw, problems)
    if STATISTICS_FILE in files:
        statistics = read_safetensors(STATISTICS_FILE, files[STATISTICS_FILE], problems)
    return said, statistics


def read_directory(path: str | Path, spec: BackboneSpec, *, backbone_digest: str | None = None) -> Delta:
    """The delta in a directory, as `read_upload` reads it.

    Only files of the known formats are opened; others (a trainer leaves many) are not looked at, except that a head
    or pickled tensors beside no others are refused by name. Raises as `read_upload`.
    """
    if not Path(path).is_dir():
        raise InvalidDelta(["The adapter's directory does not exist, or is a file."], param="directory")
    present = {entry.name: entry for entry in Path(path).iterdir() if entry.is_file()}
    files = {name: entry.read_bytes() for name, entry in present.items() if name in READ}
    has_tensors = any(form.tensors in files for form in FORMATS)
    unread = {name for name in present if name in REFUSED and not (has_tensors and name.endswith(PICKLED))}
    return read_upload(files | dict.fromkeys(unread, b""), spec, backbone_digest=backbone_digest)


def _why_refused(name: str) -> str:
    if name in REFUSED:
        return REFUSED[name]
    if name.lower().endswith(PICKLED):
        return f"pickled tensors are never read. {CONVERT}"
    return f"this file is not part of any format. Send only the pair that the library saved. {CONVERT}"
