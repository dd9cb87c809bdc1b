"""From what the probe found in each module to a delta in the normal form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.errors import InvalidDelta
from adapters.formats.peft_modules import parallel
from adapters.normal_form import Affine, Delta, Op, WeightDelta
from serving.offline.compress import Change


def to_delta(
    changes: Mapping[str, Change], spec: BackboneSpec, *, method: str, lineage: Mapping[str, str]
) -> Delta:
    """The delta of `changes` (by module path), in the order of the backbone's modules.

    Raises InvalidDelta naming every module that is no site of the backbone.
    """
    if strange := sorted(changes.keys() - spec.by_path.keys()):
        raise InvalidDelta(
            [f"{path}: the backbone has no such site, or none that runs for every token." for path in strange]
        )
    ops = [
        op for module in spec.modules if module.path in changes for op in _ops(changes[module.path], module)
    ]
    return Delta(method=method, ops=tuple(ops), backbone_digest=spec.digest, lineage=lineage)


def _ops(change: Change, module: ModuleSpec) -> Iterator[Op]:
    if change.A is not None and change.B is not None:
        yield from parallel(module, change.A, change.B)
    if change.in_scale is not None:  # a fused module has one input for all its sites
        yield Affine(site=module.writes[0].site, side="input", scale=change.in_scale)
    for part in module.writes:
        rows = slice(part.start, part.stop)
        if change.dense is not None:
            yield WeightDelta(site=part.site, layout="dense", values=change.dense[rows])
        if change.indices is not None and change.values is not None:
            mine = (change.indices[0] >= part.start) & (change.indices[0] < part.stop)
            if mine.any():
                shifted = change.indices[:, mine] - torch.tensor([[part.start], [0]], dtype=torch.int32)
                yield WeightDelta(
                    site=part.site, layout="sparse", values=change.values[mine], indices=shifted
                )
        scale, shift = _cut(change.out_scale, rows), _cut(change.shift, rows)
        if scale is not None or shift is not None:
            yield Affine(site=part.site, scale=scale, shift=shift, covers_bias=False)


def _cut(vector: Tensor | None, rows: slice) -> Tensor | None:
    return None if vector is None else vector[rows]
