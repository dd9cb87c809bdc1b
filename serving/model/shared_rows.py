"""Rows that all rows of a batch share: the relative embeddings of models whose attention projects them (DeBERTa-v2).

The model projects the table once for the whole batch, with modules that deltas may change, among them those of the
tokens. What comes of it is another bias of the attention scores for each delta; so the bias is computed for the rows of
one delta after the other, with that delta's programs on the table, and for all other rows at once.
Legend: B rows of the batch, H heads, Q tokens of the longest row, D head width, n rows of the table, d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.backbone_spec import BackboneSpec
from adapters.errors import BackboneRefused
from serving.model.context import ForwardContext, SharedGroup, active_context, inner_context
from serving.model.packed import Forward
from serving.model.programs import DeltaSegment, PlacedDelta, compile_programs

if TYPE_CHECKING:
    from serving.model.backbone import Backbone

Table = Callable[[], Tensor]
"""Makes the table of shared rows, [n, d]."""


def install_shared_rows(body: Any, spec: BackboneSpec) -> None:
    """Let every row of `body`, a transformers model, see the shared rows as its delta makes them.

    Raises BackboneRefused where its attention does not use them in the way that is known here.
    """
    if spec.shared is None:
        return
    attentions = [module for module in body.modules() if hasattr(module, "disentangled_attention_bias")]
    table = getattr(body.encoder, "get_rel_embedding", None)
    size = getattr(body.encoder, "rel_embeddings", None)
    if (
        len(attentions) != spec.num_layers
        or table is None
        or not isinstance(size, nn.Embedding)
        or size.num_embeddings != spec.shared.count
    ):
        raise BackboneRefused(
            f"{spec.model_type!r}: {len(attentions)} of {spec.num_layers} layers use relative embeddings as "
            f"expected, of which there should be {spec.shared.count}.",
            param="backbone",
            remedy="This version of transformers is not served with this architecture.",
        )

    def bare_table() -> Tensor:
        with inner_context(None):
            found: Tensor = table()
        return found

    body.encoder.get_rel_embedding = bare_table
    for module in attentions:
        _hook(module, table)


def _hook(attention: Any, table: Table) -> None:
    base = attention.disentangled_attention_bias

    def bias(query: Tensor, key: Tensor, distances: Tensor, rows: Tensor, scale_factor: int) -> Any:
        """Shapes: query and key [B * H, Q, D] -> [B * H, Q, Q]; 0 where the model has no such bias."""
        context = active_context()
        if context is None or not context.shared:
            return base(query, key, distances, rows, scale_factor)
        heads = len(query) // len(context.attention.rows)
        parts: list[Any] = []
        for group in context.shared:
            part = slice(group.first * heads, group.stop * heads)
            with inner_context(ForwardContext(group.programs, context.attention)):
                if group.table is None:
                    group.table = table()
                parts.append(base(query[part], key[part], distances, group.table, scale_factor))
        return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]

    attention.disentangled_attention_bias = bias


def shared_groups(
    deltas: Sequence[PlacedDelta | None], backbone: Backbone, merged: Mapping[int, Forward]
) -> list[SharedGroup]:
    """The rows of a batch, whose `deltas` are given in order, by what they see of the shared rows.

    Empty where none changes anything there. `merged` modules are those of the batch's only delta.
    """
    shared, modules = backbone.spec.shared, backbone.shared_modules
    acting = [None if d is None or not modules & d.modules.keys() else d.form_at(None) for d in deltas]
    if shared is None or not any(acting):
        return []
    groups, first = [], 0
    for _, members in groupby(acting, key=id):
        rows = list(members)
        segments = [DeltaSegment(0, shared.count, delta) for delta in rows[:1] if delta is not None]
        programs = compile_programs(
            len(backbone.spec.modules),
            backbone.kernels,
            segments,
            [],
            backbone.logit_modules,
            merged if segments else {},
        )
        groups.append(SharedGroup(first, first + len(rows), programs))
        first += len(rows)
    return groups
