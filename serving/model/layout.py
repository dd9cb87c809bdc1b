"""How a batch of ragged rows goes through the unmodified model: the layout, chosen once at load by `parity`.

Whatever the layout, the engine hands over its tokens flattened, [T], row after row, and gets the logits of the rows it
asked for. `Flattened` is the usual one; `padded.py` has the fallback.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.errors import BackboneRefused
from serving.model.attention import ATTENTION_NAME
from serving.model.context import ForwardContext, forward_context


class Layout(Protocol):
    """How tokens are arranged for the model's forward.

    `sees_queries` and `free_positions` are those of `BackboneSpec`. `attends_by_plan`: every layer attends through the
    context's plan, or takes its keys and values from there.
    """

    name: str
    sees_queries: bool
    free_positions: bool
    attends_by_plan: bool

    def adopt(self, model: PreTrainedModel) -> None:
        """Set `model` up for this layout. Raises BackboneRefused where it can't be."""
        ...

    def groups(self, counts: Sequence[int]) -> list[list[int]]:
        """Which rows of a step run together; `counts` are their numbers of new tokens."""
        ...

    def forward(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        positions: Tensor,
        context: ForwardContext,
        logits_rows: Tensor | None,
    ) -> Tensor:
        """See `Backbone.forward`; the logits are in the model's dtype, some row of them where none are wanted."""
        ...


class Flattened:
    """All tokens in one row, [1, T]; attention is ours, through transformers' attention interface."""

    name = "flattened"
    sees_queries = True
    free_positions = True
    attends_by_plan = True

    def adopt(self, model: PreTrainedModel) -> None:
        require_positions(model)
        model.set_attn_implementation(ATTENTION_NAME)

    def groups(self, counts: Sequence[int]) -> list[list[int]]:
        return [list(range(len(counts)))]

    def forward(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        positions: Tensor,
        context: ForwardContext,
        logits_rows: Tensor | None,
    ) -> Tensor:
        keep = torch.zeros(1, dtype=torch.long, device=tokens.device) if logits_rows is None else logits_rows
        with forward_context(context):
            out = model(
                **as_input(tokens[None]), position_ids=positions[None], use_cache=False, logits_to_keep=keep
            )
        logits: Tensor = out.logits[0]
        return logits


def require_positions(model: PreTrainedModel) -> None:
    """Raises BackboneRefused where the forward of `model` can't be told the positions of flattened rows."""
    if not takes(model, "position_ids"):
        raise BackboneRefused(
            f"The forward of {model.config.model_type!r} takes no position_ids, without which rows can't be "
            "flattened.",
            param="backbone",
        )


def as_input(tokens: Tensor) -> dict[str, Tensor]:
    """The keyword under which a model takes ids or, where they are floats, embeddings."""
    return {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}


def takes(model: PreTrainedModel, name: str) -> bool:
    """True where the model's forward has a parameter of this name; some swallow unknown ones."""
    return name in inspect.signature(type(model).forward).parameters
