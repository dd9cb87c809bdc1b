"""Merged linear layers: the base weight and one delta's affine ops as one packed matrix, beside the backbone's own.

The backbone is never written to: a batch whose rows all use the delta runs the merged copies, any other batch the
base, whose bytes are the ones that were loaded. A module's matrix is read off its program: what it makes of the unit
vectors, less what it makes of zero. So whatever is affine folds, and no op has a folding rule of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adapters.backbone_spec import ModuleSpec
from serving.kernels.ops import PlacedModule
from serving.model.backbone import Backbone
from serving.model.context import ForwardContext
from serving.model.kv_cache import RowSpan
from serving.model.packed import Forward, packed_linear
from serving.model.programs import DeltaSegment, PlacedDelta, compile_programs


def mergeable_modules(delta: PlacedDelta, backbone: Backbone) -> list[int]:
    """Indices of the linear modules where all that `delta` does is affine in the module's own input.

    None of a delta that acts on some tokens only: its rows are not alike. Of an encoder-decoder those of the decoder's
    passes; the encoder's are one per request.
    """
    if delta.forms:
        return []
    return [
        index
        for index, ops in delta.modules.items()
        if backbone.spec.modules[index].shape.kind in {"linear", "conv1d"}
        and index not in backbone.logit_modules
        and index not in delta.taps.values()
        and not _reads_prompts(backbone.spec.modules[index])
        and _is_affine(ops)
    ]


def merged_bytes(delta: PlacedDelta, backbone: Backbone) -> int:
    """Memory that `merge` will take."""
    shapes = [backbone.spec.modules[index].shape for index in mergeable_modules(delta, backbone)]
    return sum(4 * shape.d_out * (shape.d_in + 1) for shape in shapes)


@torch.inference_mode()
def merge(delta: PlacedDelta, backbone: Backbone) -> Mapping[int, Forward]:
    """Per mergeable module, the forward of its merged matrix: x [..., I] -> [..., O]. fp32 backbones on CPU only.

    Reads the backbone and the delta, so it may run beside the engine's thread while the delta is leased.
    """
    assert backbone.dtype == torch.float32, "a half-precision matrix would round the delta away"
    merged: dict[int, Forward] = {}
    nothing = backbone.new_cache(num_slots=1, max_len=1).plan([RowSpan(0, 1, 0, 0)])  # no layer attends here
    for index in mergeable_modules(delta, backbone):
        module = backbone.spec.modules[index]
        width = module.shape.d_in
        segments = [DeltaSegment(0, width + 1, delta)]
        programs = compile_programs(
            len(backbone.spec.modules), backbone.kernels, segments, [], backbone.logit_modules
        )
        program = programs[index]
        assert program is not None, index
        probe = torch.cat([torch.zeros(1, width), torch.eye(width)])
        base = backbone.model.get_submodule(module.path)  # outside a forward pass of the engine it runs bare
        out = program.run(ForwardContext(programs, nothing), base, probe[None], (), {})[0]
        bias = out[0].clone()
        merged[index] = packed_linear((out[1:] - bias).t().contiguous(), bias)
    return merged


def _reads_prompts(module: ModuleSpec) -> bool:
    return module.writes[0].site.stack == "enc" or (
        module.read is not None and module.read.name == "enc.final"
    )


def _is_affine(ops: PlacedModule) -> bool:
    low_ranks = [*ops.reflections, *ops.parallel, *ops.sequential]
    others = ops.prompts or ops.replacement or ops.again or ops.embeddings or ops.logits or ops.remote
    return not others and all(w.activation == "identity" for w in low_ranks)
