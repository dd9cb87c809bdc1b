"""Encoder-decoders: the encoder runs over whole rows once per request, the decoder step by step, both flattened.

The pass of the encoder ends with the cross-attention's keys and values, made by the decoder's own hooked modules, so
that deltas on them act. In the decoder's passes a transformers cache says that they are known, and keeps nothing.
Legend: S tokens that encoders read, T tokens of the decoder's rows, R wanted rows, K kv heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from adapters.backbone_spec import BackboneSpec
from adapters.errors import BackboneRefused
from adapters.normal_form import Site
from serving.model.attention import ATTENTION_NAME, CROSS_MARK
from serving.model.context import ForwardContext, active_context, forward_context
from serving.model.cross_cache import CrossCache
from serving.model.distance_bias import give_rules
from serving.model.layout import as_input
from serving.model.sites import insert_virtual_tokens


class SourceRow(NamedTuple):
    """Tokens [start, stop) of an encoder's pass are what the requests in `slots` read."""

    start: int
    stop: int
    slots: Sequence[int]


class EncoderDecoder:
    """All tokens of a stack in one row, [1, S] and [1, T]; attention is ours in both."""

    name = "flattened stacks"
    sees_queries = True
    free_positions = True
    attends_by_plan = True

    def __init__(self, spec: BackboneSpec) -> None:
        self._spec = spec

    def adopt(self, model: PreTrainedModel) -> None:
        """Set `model` up, once: positions are given to its embeddings, and its head runs on wanted rows alone."""
        spec = self._spec
        model.set_attn_implementation(ATTENTION_NAME)
        give_rules(model)
        for layer in range(spec.num_layers):
            module, _ = spec.writer[Site("dec.cross.q.out", layer)]
            setattr(model.get_submodule(module.path.rpartition(".")[0]), CROSS_MARK, True)
        for stack in (model.get_encoder(), model.get_decoder()):
            if (embedding := getattr(stack, "embed_positions", None)) is not None:
                _give_positions(embedding)
        insert_virtual_tokens(model.get_encoder().get_input_embeddings())
        _slice_rows(model.get_submodule(spec.writer[Site("logits")][0].path))

    def groups(self, counts: Sequence[int]) -> list[list[int]]:
        """All rows run together."""
        return [list(range(len(counts)))]

    def forward(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        positions: Tensor,
        context: ForwardContext,
        logits_rows: Tensor | None,
    ) -> Tensor:
        """A pass of the decoder; see `Layout.forward`."""
        keep = torch.zeros(1, dtype=torch.long, device=tokens.device) if logits_rows is None else logits_rows
        context.positions, context.logits_rows = positions, keep
        inputs = {f"decoder_{name}": given for name, given in as_input(tokens[None]).items()}
        nothing = torch.zeros(1, 1, self._spec.hidden_size, dtype=model.dtype, device=tokens.device)
        with forward_context(context):
            out = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=nothing),
                past_key_values=_known_cache(self._spec, nothing),
                use_cache=True,
                **inputs,
            )
        assert context.cross is not None, "a pass of the decoder"
        _require_all(
            context.cross.attended, self._spec.num_layers, "decoder's layers attended to the encoder's output"
        )
        logits: Tensor = out.logits[0]
        return logits

    def encode(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        positions: Tensor,
        context: ForwardContext,
        cache: CrossCache,
        rows: Sequence[SourceRow],
    ) -> None:
        """A pass of the encoder over whole rows, and the cross-attention's keys and values of their slots.

        Shapes: tokens [S] ids, positions [S].
        """
        spec = self._spec
        context.positions = positions
        with forward_context(context):
            states = model.get_encoder()(input_ids=tokens[None]).last_hidden_state
            attended = context.attention.attended
            _require_all(attended, spec.num_encoder_layers, "encoder's layers attended through the engine")
            for layer in range(spec.num_layers):
                key_SKD, value_SKD = (
                    model.get_submodule(spec.writer[Site(f"dec.cross.{name}.out", layer)][0].path)(states)
                    .view(-1, spec.num_kv_heads, spec.head_dim)
                    for name in ("k", "v")
                )  # fmt: skip
                for start, stop, slots in rows:
                    cache.write_source(slots, layer, key_SKD[start:stop], value_SKD[start:stop])


def _require_all(attended: Sequence[object], expected: int, what: str) -> None:
    if len(attended) != expected:
        raise BackboneRefused(f"{len(attended)} of the {expected} {what}.", param="backbone")


class _KnownLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer of a cache that keeps nothing: the engine's does. `keys` and `values` stand for known ones."""

    def __init__(self, nothing: Tensor) -> None:
        super().__init__()
        self.keys = self.values = nothing

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new ones go on to the attention function as they are."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        """None are kept here."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No masks are made."""
        return query_length, 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1


def _known_cache(spec: BackboneSpec, nothing: Tensor) -> EncoderDecoderCache:
    """A cache after whose first look every layer's cross keys are known."""
    own, cross = (Cache([_KnownLayer(nothing[None]) for _ in range(spec.num_layers)]) for _ in range(2))
    cache = EncoderDecoderCache(own, cross)
    cache.is_updated = dict.fromkeys(range(spec.num_layers), True)
    return cache


def _give_positions(embedding: nn.Module) -> None:
    """Positions are those of the context, which differ from row to row; the module itself counts from a past."""
    base = embedding.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if (context := active_context()) is not None:
            kwargs["position_ids"] = context.positions
        return base(*args, **kwargs)

    embedding.forward = forward


def _slice_rows(head: nn.Module) -> None:
    base = head.forward

    def forward(states: Tensor) -> Any:
        if (context := active_context()) is not None and context.logits_rows is not None:
            states = states[:, context.logits_rows]
        return base(states)

    head.forward = forward
