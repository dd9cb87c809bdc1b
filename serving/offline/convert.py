"""What the server refuses but the user's own library loads -> the canonical pair that it takes.

A pickled PEFT adapter becomes the file that PEFT writes today and goes through the server's own reader. What the reader
refuses goes through the probe. Either way the whole model must then give PEFT's logits. What AdapterHub's library saved
goes through the reader alone (`hub.py`).
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from safetensors.torch import load_file

from adapters.backbone_spec import BackboneSpec
from adapters.canonical import Canonical, to_canonical
from adapters.errors import InvalidDelta, InvalidRequest
from adapters.formats import read_directory, read_upload
from adapters.formats.peft_modules import MAX_LOWERED_BYTES
from adapters.normal_form import Delta
from adapters.parity import ParityRecord
from serving.offline import hub
from serving.offline.compress import Change
from serving.offline.hub import is_hub, read_hub
from serving.offline.job import CHANGES, UNPICKLED, Job, Result
from serving.offline.lowering import to_delta
from serving.offline.parity import NEW_TOKENS, compare, load, random_prompts, require_generating
from serving.offline.reference import run_job

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PARITY = "parity.json"

Report = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Conversion:
    """A converted delta. `needed`: the server can't read the adapter as it is.

    `record`: None where no reference could be run. `forms`: how many modules are held in which form; empty where the
    reader took it. `notes`: what PEFT warned of, or what was left out.
    """

    delta: Delta
    canonical: Canonical
    record: ParityRecord | None
    needed: bool
    forms: Mapping[str, int]
    notes: tuple[str, ...]

    def write(self, out: Path) -> None:
        """Write the pair and any parity record to the new directory `out`. Raises InvalidRequest where it is taken."""
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            (partial / "manifest.json").write_bytes(self.canonical.manifest)
            (partial / "tensors.safetensors").write_bytes(self.canonical.tensors)
            if self.record is not None:
                (partial / PARITY).write_text(self.record.model_dump_json())
            partial.chmod(0o755)
            os.replace(partial, out)  # an empty directory may be there
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise InvalidRequest(f"{out} can't be written: {error.strerror}.", param="OUT") from error


def convert(
    directory: Path,
    backbone_path: str,
    *,
    quota_bytes: int = MAX_LOWERED_BYTES,
    report: Report = lambda _: None,
) -> Conversion:
    """Convert the adapter in `directory` for the backbone.

    Raises InvalidDelta with every reason why it can't be, BackboneRefused, InvalidRequest, Unavailable.
    """
    if (directory / CONFIG).is_file() and is_hub(directory):
        report("loading the backbone")
        delta, notes = read_hub(directory, load(backbone_path))
        return Conversion(
            delta, to_canonical(delta), None, not (directory / hub.TENSORS).is_file(), {}, notes
        )
    if not (directory / CONFIG).is_file() or not any((directory / n).is_file() for n in (TENSORS, PICKLED)):
        raise InvalidRequest(
            f"{directory} has no {CONFIG} with {TENSORS} or {PICKLED}, nor with {hub.TENSORS} or {hub.PICKLED}.",
            param="DIR",
            remedy="Name a directory that PEFT's save_pretrained or AdapterHub's save_adapter wrote.",
        )
    with TemporaryDirectory() as scratch:
        source = (
            directory if (directory / TENSORS).is_file() else _unpickled(directory, Path(scratch), report)
        )
        report("loading the backbone")
        backbone = load(backbone_path)
        refusal: InvalidDelta | None = None
        try:
            delta = read_directory(source, backbone.spec, backbone_digest=backbone.spec.digest)
            require_generating(delta)
        except InvalidDelta as error:
            refusal = error
        work = Path(scratch) / "work"
        work.mkdir()
        prompts = random_prompts(backbone, None if refusal else delta)
        job = Job(
            str(source),
            str(work),
            backbone_path,
            prompts=[prompt.ids for prompt in prompts],
            new_tokens=NEW_TOKENS,
            probe=refusal is not None,
            quota_bytes=quota_bytes,
        )
        try:
            result = run_job(job, report)
            forms: Mapping[str, int] = {}
            if refusal is not None:
                changes = _changes(work / CHANGES)
                forms = Counter(change.form for change in changes.values())
                delta = _accepted(
                    to_delta(changes, backbone.spec, method=result.method, lineage=_lineage(result)),
                    backbone.spec,
                )
        except InvalidDelta as error:
            first = refusal.problems if refusal else ()
            raise InvalidDelta([*first, *error.problems], param=error.param, remedy=error.remedy) from error
        report("the engine runs the same prompts")
        record = compare(backbone, delta, prompts, result, work).record
        if not record.passes:
            why = "PEFT does something outside of the modules that were probed." if refusal else "Report it."
            raise InvalidDelta(
                [
                    f"The engine differs from PEFT: error {record.error:.1e} of the logits' scale, greedy text "
                    f"{'equal' if record.greedy_equal else 'different'}. {why}"
                ]
            )
        needed = refusal is not None or source != directory
        return Conversion(delta, to_canonical(delta), record, needed, forms, tuple(result.notes))


def _unpickled(directory: Path, scratch: Path, report: Report) -> Path:
    report(f"reading {PICKLED} with torch's restricted unpickler")
    run_job(Job(str(directory), str(scratch), unpickle=True), report)
    return scratch / UNPICKLED


def _accepted(delta: Delta, spec: BackboneSpec) -> Delta:
    """`delta` as the server's reader takes it. Raises InvalidDelta."""
    pair = to_canonical(delta)
    return read_upload({"manifest.json": pair.manifest, "tensors.safetensors": pair.tensors}, spec)


def _changes(file: Path) -> dict[str, Change]:
    fields: dict[str, dict[str, object]] = {}
    for key, tensor in load_file(file).items():
        path, _, name = key.rpartition(":")
        fields.setdefault(path, {})[name] = tensor
    return {path: Change(**found) for path, found in fields.items()}  # type: ignore[arg-type]


def _lineage(result: Result) -> dict[str, str]:
    """Where the numbers are from: seeds and decompositions may give others elsewhere."""
    return {"format": "peft", "converted": "probe", "peft": result.library_version, "torch": result.torch}
