"""What a delta does on a fixed random prompt: the admission probe, and which neurons it activates."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from adapters.errors import InvalidDelta
from adapters.positions import Cut, FromInvocation
from adapters.tasks import Task
from serving.core import PoolingParams, Request, SamplingParams
from serving.engine.runner import Runner
from serving.engine.sequence import ScheduledRow, Sequence
from serving.model.backbone import Backbone
from serving.model.programs import PlacedDelta

PROBE_TOKENS = 16
"""Length of the prompt."""

_OUTPUTS = {
    (False, "decoder"): "logits",
    (False, "encoder"): "final hidden states",
    (True, "decoder"): "scores",
    (True, "encoder"): "scores",
}
"""What is compared, by whether the delta has a task head and by kind of backbone."""


def measure_effect(placed: PlacedDelta, backbone: Backbone) -> tuple[float, float]:
    """(max |change|, max |bare value|) of the outputs of every token.

    Outputs are logits; with a task head its scores, on an encoder without one the final hidden states. A head that
    stands alone changes nothing: there it is how far its scores of the tokens are apart. Raises InvalidDelta for a
    delta that changes nothing or overflows.
    """
    what = _OUTPUTS[placed.head is not None, backbone.spec.kind]
    tokens = probe_tokens(backbone.spec.vocab_size)
    for weights in (w for ops in placed.modules.values() for w in ops.embeddings):  # rows that it replaces
        tokens[::2] = weights.ids.cpu()[torch.arange(PROBE_TOKENS // 2) % len(weights.ids)]
    bare, changed = _outputs([None, placed], backbone, tokens)
    if not torch.isfinite(changed).all():
        raise InvalidDelta([f"The delta makes non-finite {what} on the probe tokens."])
    alone = not (placed.modules or placed.prefix is not None or placed.num_inserted)
    change = changed.amax(dim=0) - changed.amin(dim=0) if alone else (changed - bare).abs()
    effect = float(change.max())
    if not effect > 0.0:  # also true for NaN
        raise InvalidDelta(
            [
                f"The delta has no effect: its head gives {PROBE_TOKENS} probe tokens the same scores."
                if alone
                else f"The delta has no effect: its {what} equal the bare backbone's on {PROBE_TOKENS} probe tokens."
            ],
            remedy="Check that the trained weights were saved; a freshly initialised adapter changes nothing.",
        )
    return effect, float(bare.abs().max())


def activations(backbone: Backbone, placed: PlacedDelta) -> bytes:
    """One bit per neuron, layer by layer: 1 where what the down projection reads is above 0 on average over the tokens.

    Two prompts that activate the same neurons tend to do the same (Su et al., "On Transferability of Prompt Tuning for
    Natural Language Processing", section 5): what `deltamux adapters similar` shows beside cosines. Engine thread only.
    Empty where no module reads `ffn.a` (mixtures of experts).
    """
    found: list[Tensor] = []

    def note(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].reshape(-1, inputs[0].shape[-1]).float().mean(dim=0) > 0)

    modules = [m for m in backbone.spec.modules if m.read is not None and m.read.name == "ffn.a"]
    hooks = [backbone.model.get_submodule(m.path).register_forward_pre_hook(note) for m in modules]
    try:
        _outputs([placed], backbone, probe_tokens(backbone.spec.vocab_size))
    finally:
        for hook in hooks:
            hook.remove()
    return np.packbits(torch.cat(found).cpu().numpy()).tobytes() if found else b""


def _outputs(deltas: Seq[PlacedDelta | None], backbone: Backbone, tokens: Tensor) -> list[Tensor]:
    """Outputs [PROBE_TOKENS, n] of the prompt through each of `deltas`: those of the last one's head, if it has one."""
    head = None if deltas[-1] is None else deltas[-1].head
    longest = max(0 if delta is None else delta.prefix_len for delta in deltas)
    runner = Runner(backbone, num_slots=len(deltas), max_len=longest + PROBE_TOKENS)
    generates = head is None and backbone.spec.kind == "decoder"
    rows = []
    for slot, delta in enumerate(deltas):
        request = Request(
            request_id=f"probe-{slot}",
            prompt_token_ids=tuple(tokens.tolist()),
            sampling=SamplingParams(prompt_logprobs=0 if generates else None),  # 0: logits of every token
            pooling=None if generates else PoolingParams(task=Task.EMBEDDING),
            adapter_digest=None if delta is None else delta.digest,
        )
        row = Sequence(request, tokens.tolist(), state=None)
        row.admit(slot, delta)
        if delta is not None and (invocation := _invocation(delta)) is not None:
            row.cuts = (Cut(0, invocation),)
        row.pooled_tokens = range(0 if generates else PROBE_TOKENS)
        rows.append(ScheduledRow(row, PROBE_TOKENS))
    outputs = runner.run(rows)
    if generates:
        return [output.logits for output in outputs]
    return [output.hidden if head is None else head(output.hidden) for output in outputs]


def _invocation(placed: PlacedDelta) -> FromInvocation | None:
    """From what tokens on the delta acts, which the probe's random ones need not hold."""
    return next((each for each in placed.positions if isinstance(each, FromInvocation)), None)


def probe_tokens(vocab_size: int) -> Tensor:
    """The prompt, [PROBE_TOKENS] ids on the host."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (PROBE_TOKENS,), generator=draw)
