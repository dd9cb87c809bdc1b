"""What an encoder-decoder's generation config demands of its output, by transformers' own processors.

Summarisers and translators are published with such rules (no trigram twice, a first token, an end at the limit), and
their authors' numbers hold with them. How tokens are chosen (beams, sampling, lengths) is the request's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import logits_process as processors

from adapters.errors import BackboneRefused

INERT: dict[str, Any] = {
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "penalty_alpha": 0.0,
    "sequence_bias": None,
    "stop_strings": None,
    "token_healing": False,
    "watermarking_config": None,
}
"""What is not executed, with the values that ask for nothing."""


class GenerationRules:
    """The rules of one backbone. `start_tokens` are what its decoder begins with.

    Raises BackboneRefused for a config without a start token, or with a rule that is not executed.
    """

    def __init__(self, model: PreTrainedModel, eos_token_ids: frozenset[int]) -> None:
        config: GenerationConfig = model.generation_config
        for name, value in INERT.items():
            if (got := getattr(config, name, None)) is not None and got != value:
                raise BackboneRefused(
                    f"generation_config: {name} is {got!r}; it is not executed.",
                    param="backbone",
                    remedy="Take it out of the checkpoint's generation_config.json if its output may differ.",
                )
        start = config.decoder_start_token_id
        start = config.bos_token_id if start is None else start
        if start is None:
            raise BackboneRefused(
                "generation_config has no decoder_start_token_id, with which the decoder begins.",
                param="backbone",
                remedy="Set it in the checkpoint's generation_config.json.",
            )
        self.start_tokens = (int(start),)
        self._forced_eos = config.forced_eos_token_id
        self._device = device = model.device
        eos = torch.tensor(sorted(eos_token_ids), device=device)
        # the order is that of `generate`, which matters where one rule lifts what another forbids
        before: list[processors.LogitsProcessor | None] = [
            _made(processors.RepetitionPenaltyLogitsProcessor, config.repetition_penalty, inert=1.0),
            _made(processors.NoRepeatNGramLogitsProcessor, config.no_repeat_ngram_size, inert=0),
            _made(processors.NoBadWordsLogitsProcessor, config.bad_words_ids, eos),
        ]
        if eos_token_ids:
            before += [
                _made(processors.MinLengthLogitsProcessor, config.min_length, eos, inert=0, device=device),
                None
                if not config.min_new_tokens
                else processors.MinNewTokensLengthLogitsProcessor(
                    1, config.min_new_tokens, eos, device=device
                ),
            ]
        before.append(_made(processors.ForcedBOSTokenLogitsProcessor, config.forced_bos_token_id))
        first = 1 if config.forced_bos_token_id is None else 2
        after = [
            _made(processors.SuppressTokensLogitsProcessor, config.suppress_tokens, device=device),
            _made(
                processors.SuppressTokensAtBeginLogitsProcessor,
                config.begin_suppress_tokens,
                first,
                device=device,
            ),
            processors.LogitNormalization() if config.renormalize_logits else None,
        ]
        self._before = processors.LogitsProcessorList(found for found in before if found is not None)
        self._after = processors.LogitsProcessorList(found for found in after if found is not None)

    @property
    def demands_nothing(self) -> bool:
        """True where no token is ever forced, forbidden or penalised."""
        return not self._before and not self._after and self._forced_eos is None

    def apply(self, tokens: Sequence[int], scores: Tensor, max_len: int) -> Tensor:
        """Scores of the token after `tokens`, the decoder's so far; its last may be number `max_len`.

        Shapes: scores [V] (logits, or log-probabilities in a beam search) -> [V], -inf where forbidden.
        """
        ids, scores_1V = torch.tensor([list(tokens)], device=self._device), scores[None]
        scores_1V = self._before(ids, scores_1V)
        if self._forced_eos is not None:
            forced = processors.ForcedEOSTokenLogitsProcessor(max_len, self._forced_eos, device=self._device)
            scores_1V = forced(ids, scores_1V)
        found: Tensor = self._after(ids, scores_1V)[0]
        return found


def _made(
    kind: Any, value: Any, *args: Any, inert: Any = None, **kwargs: Any
) -> processors.LogitsProcessor | None:
    """The processor for a value of the config, None where that asks for nothing."""
    return None if value is None or value == inert else kind(value, *args, **kwargs)
