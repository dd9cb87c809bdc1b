"""What a delta does on a fixed random prompt: the admission probe, and which neurons it activates."""

from __future__ import annotations

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

PROBE_TOKENS = 8
"""Length of the prompt."""


class Prober:
    """Measures deltas on one backbone. Engine thread only: decoding rows wait meanwhile, so a probe is a few tokens."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._bare: dict[bool, Tensor] = {}

    def effect(self, placed: PlacedDelta) -> tuple[float, float]:
        """(max |change|, max |bare value|) of the outputs of every token.

        Outputs are logits; with a task head its scores, on an encoder without one the final hidden states. A head that
        stands alone changes nothing: there it is how far its scores of the tokens are apart. Raises InvalidDelta for a
        delta that changes nothing or overflows.
        """
        head, generates = placed.head, placed.head is None and self.backbone.spec.kind != "encoder"
        what = "scores" if head is not None else "logits" if generates else "final hidden states"
        tokens = probe_tokens(self.backbone.spec.vocab_size)
        replaced = [w for ops in placed.modules.values() for w in ops.embeddings]
        for weights in replaced:
            tokens[::2] = weights.ids.cpu()[torch.arange(PROBE_TOKENS // 2) % len(weights.ids)]
        bare, changed = (
            self._bare_outputs(tokens, generates, keep=not replaced),
            self._run(placed, tokens, generates),
        )
        if head is not None:
            bare, changed = head(bare), head(changed)
        if not torch.isfinite(changed).all():
            raise InvalidDelta([f"The delta makes non-finite {what} on the probe tokens."])
        alone = not (placed.modules or placed.prefix is not None or placed.num_inserted)
        change = changed.amax(dim=0) - changed.amin(dim=0) if alone else (changed - bare).abs()
        effect = float(change.max())
        if not effect > 0.0:  # also true for NaN
            same = "its head scores them all alike" if alone else f"its {what} equal the bare backbone's"
            raise InvalidDelta(
                [f"The delta has no effect: on {PROBE_TOKENS} probe tokens {same}."],
                remedy="Check that the trained weights were saved; a freshly initialised adapter changes nothing.",
            )
        return effect, float(bare.abs().max())

    def activations(self, placed: PlacedDelta) -> bytes:
        """One bit per neuron, layer by layer: 1 where what the down projection reads is above 0 on average.

        Two prompts that activate the same neurons tend to do the same (Su et al., "On Transferability of Prompt Tuning
        for Natural Language Processing", section 5): what `deltamux adapters similar` shows beside cosines. Empty where
        no module reads `ffn.a` (mixtures of experts).
        """
        found: list[Tensor] = []

        def note(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0].reshape(-1, inputs[0].shape[-1]).float().mean(dim=0) > 0)

        spec, model = self.backbone.spec, self.backbone.model
        modules = [m for m in spec.modules if m.read is not None and m.read.local == "ffn.a"]
        hooks = [model.get_submodule(m.path).register_forward_pre_hook(note) for m in modules]
        try:
            self._run(placed, probe_tokens(spec.vocab_size), generates=spec.kind != "encoder")
        finally:
            for hook in hooks:
                hook.remove()
        return np.packbits(torch.cat(found).cpu().numpy()).tobytes() if found else b""

    def _bare_outputs(self, tokens: Tensor, generates: bool, *, keep: bool) -> Tensor:
        """Those of the bare backbone: known ones, since a forward of the same shape gives the same bits."""
        if not keep:
            return self._run(None, tokens, generates)
        if generates not in self._bare:
            self._bare[generates] = self._run(None, tokens, generates)
        return self._bare[generates]

    def _run(self, delta: PlacedDelta | None, tokens: Tensor, generates: bool) -> Tensor:
        """Logits, or final hidden states, of every token: [PROBE_TOKENS, n]."""
        prefix_len = 0 if delta is None else delta.prefix_len
        num_read = 0 if delta is None else delta.cross_prefix_len + delta.num_inserted
        runner = Runner(self.backbone, num_slots=1, max_len=max(prefix_len, num_read) + PROBE_TOKENS)
        request = Request(
            request_id="probe",
            prompt_token_ids=tuple(tokens.tolist()),
            sampling=SamplingParams(prompt_logprobs=0 if generates else None),  # 0: logits of every token
            pooling=None if generates else PoolingParams(task=Task.EMBEDDING),
            adapter_digest=None if delta is None else delta.digest,
        )
        reads = self.backbone.spec.kind == "encoder-decoder"
        source = request.prompt_token_ids if reads else ()  # and its decoder is given the same
        row = Sequence(request, tokens.tolist(), state=None, source=source)
        row.admit(0, delta)
        if delta is not None and (invocation := _invocation(delta)) is not None:
            row.cuts = (Cut(0, invocation),)
        row.pooled_tokens = range(0 if generates else PROBE_TOKENS)
        (output,) = runner.run([ScheduledRow(row, PROBE_TOKENS)])
        return output.logits if generates else output.hidden


def _invocation(placed: PlacedDelta) -> FromInvocation | None:
    """From what tokens on the delta acts, which the probe's random ones need not hold."""
    return next((each for each in placed.positions if isinstance(each, FromInvocation)), None)


def probe_tokens(vocab_size: int) -> Tensor:
    """The prompt, [PROBE_TOKENS] ids on the host."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (PROBE_TOKENS,), generator=draw)
