"""The admission probe: what a delta changes on a fixed random prompt, beside a bare row in the same batch."""

from __future__ import annotations

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
    bare, changed = _outputs(placed, backbone)
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


def _outputs(placed: PlacedDelta, backbone: Backbone) -> list[Tensor]:
    """Outputs [PROBE_TOKENS, n] of the bare row and of the delta's."""
    runner = Runner(backbone, num_slots=2, max_len=placed.prefix_len + PROBE_TOKENS)
    tokens = _probe_tokens(placed, backbone.spec.vocab_size)
    generates = placed.head is None and backbone.spec.kind == "decoder"
    rows = []
    for slot, delta in enumerate((None, placed)):
        request = Request(
            request_id=f"probe-{slot}",
            prompt_token_ids=tokens,
            sampling=SamplingParams(prompt_logprobs=0 if generates else None),  # 0: logits of every token
            pooling=None if generates else PoolingParams(task=Task.EMBEDDING),
            adapter_digest=None if delta is None else placed.digest,
        )
        row = Sequence(request, list(tokens), state=None)
        row.admit(slot, delta)
        if (invocation := _invocation(placed)) is not None:
            row.cuts = (Cut(0, invocation),)
        row.pooled_tokens = range(0 if generates else PROBE_TOKENS)
        rows.append(ScheduledRow(row, PROBE_TOKENS))
    outputs = runner.run(rows)
    if generates:
        return [output.logits for output in outputs]
    return [output.hidden if placed.head is None else placed.head(output.hidden) for output in outputs]


def _invocation(placed: PlacedDelta) -> FromInvocation | None:
    """From what tokens on the delta acts, which the probe's random ones need not hold."""
    return next((each for each in placed.positions if isinstance(each, FromInvocation)), None)


def _probe_tokens(placed: PlacedDelta, vocab_size: int) -> tuple[int, ...]:
    """Random tokens, every other one of those whose rows the delta replaces."""
    draw = torch.Generator().manual_seed(0)
    row = torch.randint(0, vocab_size, (PROBE_TOKENS,), generator=draw)
    for weights in (w for ops in placed.modules.values() for w in ops.embeddings):
        row[::2] = weights.ids.cpu()[torch.arange(PROBE_TOKENS // 2) % len(weights.ids)]
    return tuple(row.tolist())
