"""Which neurons of the feed-forward layers a delta activates on fixed tokens.

Two prompts that activate the same neurons tend to do the same (Su et al., "On Transferability of Prompt Tuning for
Natural Language Processing", section 5): what `deltamux adapters similar` shows beside cosines.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from serving.model.backbone import Backbone
from serving.model.context import ForwardContext
from serving.model.kv_cache import RowSpan
from serving.model.programs import DeltaSegment, PlacedDelta, compile_programs

PROBE_TOKENS = 16
"""Length of the fixed random prompt on which deltas are measured."""


def probe_tokens(backbone: Backbone) -> Tensor:
    """The fixed prompt, [PROBE_TOKENS] ids on the host."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, backbone.spec.vocab_size, (PROBE_TOKENS,), generator=draw)


def activations(backbone: Backbone, placed: PlacedDelta) -> bytes:
    """One bit per neuron, layer by layer: 1 where what the down projection reads is above 0 on average over the tokens.

    Engine thread only. Empty where no module reads `ffn.a` (mixtures of experts).
    """
    spec, prefix = backbone.spec, placed.prefix_len
    found: list[Tensor] = []

    def note(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].reshape(-1, inputs[0].shape[-1]).float().mean(dim=0) > 0)

    cache = backbone.new_cache(1, prefix + PROBE_TOKENS)
    if placed.prefix is not None:
        cache.write_prefix(0, placed.prefix)
    segments = [DeltaSegment(0, PROBE_TOKENS, placed)]
    programs = compile_programs(
        len(spec.modules), backbone.kernels, segments, segments, backbone.logit_modules
    )
    paths = [
        module.path for module in spec.modules if module.read is not None and module.read.name == "ffn.a"
    ]
    hooks = [backbone.model.get_submodule(path).register_forward_pre_hook(note) for path in paths]
    try:
        backbone.forward(
            probe_tokens(backbone).to(backbone.device),
            (torch.arange(PROBE_TOKENS) + placed.position_offset).to(backbone.device),
            ForwardContext(programs, cache.plan([RowSpan(0, PROBE_TOKENS, 0, prefix)])),
            torch.arange(PROBE_TOKENS, device=backbone.device),
        )
    finally:
        for hook in hooks:
            hook.remove()
    return np.packbits(torch.cat(found).cpu().numpy()).tobytes() if found else b""
