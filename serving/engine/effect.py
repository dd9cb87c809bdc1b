"""What a delta does on a fixed random prompt: the admission probe, and which neurons it activates."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adapters.backbone_spec import MASKED_HEAD_SITES
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

LOGITS, MASKED = "logits", "logits of the masked language model head"
STATES, SCORES = "final hidden states", "scores"
"""What is looked at."""


class Prober:
    """Measures deltas on one backbone. Engine thread only: decoding rows wait meanwhile, so a probe is a few tokens."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._masked_head = {
            index
            for index, module in enumerate(backbone.spec.modules)
            if backbone.spec.kind == "encoder"
            and module.writes[0].site.name in (*MASKED_HEAD_SITES, "logits")
        }
        self._bare: dict[str, Tensor] = {}

    def effect(self, placed: PlacedDelta) -> tuple[float, float]:
        """(max |change|, max |bare value|) of the outputs of every token.

        Outputs are logits; with a task head its scores, on an encoder without one the final hidden states; logits there
        too with a cloze, and where an encoder's masked language model head is changed. A head that stands alone changes
        nothing: there it is how far its outputs of the tokens are apart. Raises InvalidDelta for a delta that changes
        nothing or overflows.
        """
        what, head = self._probed(placed), placed.head
        tokens = probe_tokens(self.backbone.spec.vocab_size)
        replaced = [w for ops in placed.modules.values() for w in ops.embeddings]
        for weights in replaced:
            tokens[::2] = weights.ids.cpu()[torch.arange(PROBE_TOKENS // 2) % len(weights.ids)]
        bare, changed = (
            self._bare_outputs(tokens, what, keep=not replaced),
            self._run(placed, tokens, what),
        )
        if head is not None and what == SCORES:
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

    def _probed(self, placed: PlacedDelta) -> str:
        if placed.head is None:
            return STATES if self.backbone.spec.kind == "encoder" else LOGITS
        if placed.head.spec.cloze is not None:
            return MASKED
        changed = self._masked_head & placed.modules.keys()
        return MASKED if placed.task is Task.EMBEDDING and changed else SCORES

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
            self._run(placed, probe_tokens(spec.vocab_size), STATES if spec.kind == "encoder" else LOGITS)
        finally:
            for hook in hooks:
                hook.remove()
        return np.packbits(torch.cat(found).cpu().numpy()).tobytes() if found else b""

    def _bare_outputs(self, tokens: Tensor, what: str, *, keep: bool) -> Tensor:
        """Those of the bare backbone: known ones, since a forward of the same shape gives the same bits."""
        if not keep:
            return self._run(None, tokens, what)
        if what not in self._bare:
            self._bare[what] = self._run(None, tokens, what)
        return self._bare[what]

    def _run(self, delta: PlacedDelta | None, tokens: Tensor, what: str) -> Tensor:
        """Logits, or final hidden states, of every token: [PROBE_TOKENS, n]."""
        generates = what == LOGITS
        prefix_len = 0 if delta is None else delta.prefix_len
        num_read = 0 if delta is None else delta.cross_prefix_len + delta.num_inserted
        runner = Runner(self.backbone, num_slots=1, max_len=max(prefix_len, num_read) + PROBE_TOKENS)
        request = Request(
            request_id="probe",
            prompt_token_ids=tuple(tokens.tolist()),
            sampling=SamplingParams(prompt_logprobs=0 if generates else None),  # 0: logits of every token
            pooling=None if generates else PoolingParams(task=Task.EMBEDDING),
            adapter_digest=None if delta is None else delta.digest,
            masks=tuple(range(PROBE_TOKENS)) if what == MASKED else (),
        )
        reads = self.backbone.spec.kind == "encoder-decoder"
        source = request.prompt_token_ids if reads else ()  # and its decoder is given the same
        row = Sequence(request, tokens.tolist(), state=None, source=source)
        row.admit(0, delta)
        if delta is not None and (invocation := _invocation(delta)) is not None:
            row.cuts = (Cut(0, invocation),)
        row.pooled_tokens = range(0 if generates else PROBE_TOKENS)
        (output,) = runner.run([ScheduledRow(row, PROBE_TOKENS)])
        return output.logits if what in (LOGITS, MASKED) else output.hidden


def _invocation(placed: PlacedDelta) -> FromInvocation | None:
    """From what tokens on the delta acts, which the probe's random ones need not hold."""
    return next((each for each in placed.positions if isinstance(each, FromInvocation)), None)


def probe_tokens(vocab_size: int) -> Tensor:
    """The prompt, [PROBE_TOKENS] ids on the host."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (PROBE_TOKENS,), generator=draw)
