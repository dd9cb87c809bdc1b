"""Encoders whose own code attends: rows side by side, [B, Q], with pads on their right, masked by the model itself.

The fallback of `encoder.WholeRows`. Pads write nothing and belong to no delta.
Legend: B rows, Q tokens of the longest, T tokens of all rows, d hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.backbone_spec import BackboneSpec
from serving.model.context import ForwardContext, forward_context
from serving.model.encoder import BareEncoder
from serving.model.layout import as_input, require_positions, takes
from serving.model.padded import Padding, by_length, spread
from serving.model.shared_rows import install_shared_rows


class PaddedRows:
    """Rows side by side, [B, Q]; attention is the model's own, in eager mode. `logit_modules` run aside."""

    name = "padded rows"
    sees_queries = False
    free_positions = True
    attends_by_plan = False

    def __init__(self, spec: BackboneSpec, logit_modules: frozenset[int]) -> None:
        self._spec = spec
        self._logit_modules = logit_modules
        self._takes_types = False

    def adopt(self, model: PreTrainedModel | BareEncoder) -> None:
        """Set `model` up. Raises BackboneRefused where its body takes no positions, or shares rows unknown to us."""
        require_positions(model.base_model)
        self._takes_types = takes(model.base_model, "token_type_ids")
        model.set_attn_implementation("eager")
        install_shared_rows(model.base_model, self._spec)

    def groups(self, counts: Sequence[int]) -> list[list[int]]:
        """See `Layout.groups`: rows of like lengths."""
        return by_length(counts)

    def forward(
        self,
        model: PreTrainedModel | BareEncoder,
        tokens: Tensor,
        positions: Tensor,
        context: ForwardContext,
        logits_rows: Tensor | None,
    ) -> Tensor:
        """The final hidden states [T, d] of the body, as `encoder.WholeRows.forward`."""
        assert logits_rows is None, "an encoder's logits are made of wanted rows"
        device = tokens.device
        counts = [row.stop - row.start for row in context.attention.rows]
        batch, width = len(counts), max(counts)
        places = [torch.arange(width * row, width * row + count) for row, count in enumerate(counts)]
        places_T = torch.cat(places).to(device)
        context.padding = Padding(places_T, places_T[:0], self._logit_modules)
        inputs = as_input(spread(tokens, places_T, batch, width))
        inputs["position_ids"] = spread(positions, places_T, batch, width)
        inputs["attention_mask"] = spread(torch.ones_like(positions), places_T, batch, width)
        if context.token_types is not None and self._takes_types:
            inputs["token_type_ids"] = spread(context.token_types, places_T, batch, width)
        with forward_context(context):
            states: Tensor = model.base_model(**inputs).last_hidden_state
        context.keep_hidden(states)
        return states.flatten(0, 1)[places_T]
