"""PEFT trainable tokens, by themselves and beside LoRA -> Rows.

Format: PEFT 0.21.2, `<embedding>.trainable_tokens_delta` [n, d]: the new rows themselves, not differences, for the
tokens `token_indices` of the config. Where the head is tied to the embedding, its rows are replaced too, and the file
holds them twice. On encoder-decoders the table `shared` stands for both stacks' embeddings, and the file holds it, them
and a tied head, all equal; the stacks' own `embed_tokens` have rows of their own. Beside LoRA the key is `<embedding>.token_adapter.trainable_tokens_delta`, there once.
Source: PEFT `TrainableTokensLayer`, `TrainableTokensModel.inject_adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_config_matrix import TRAINABLE_TOKENS
from adapters.formats.peft_keys import PREFIX, Placed, check_shape
from adapters.formats.peft_modules import Layout, fits, read_modules
from adapters.formats.peft_targets import matches
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Op, Rows, Site

FIELD = "trainable_tokens_delta"
LAYOUT = Layout.of(FIELD, kinds=("embedding",))


def read_trainable_tokens(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a trainable tokens adapter; what does not fit is added to `problems`."""
    config = check_config(raw, TRAINABLE_TOKENS, problems)
    indices, shared = config["token_indices"], _shared_table(spec)
    named = config["target_modules"]
    if shared is not None and (not isinstance(named, list) or matches(shared, named)):
        return _of_shared(shared, indices, tensors, spec, problems)
    embedding = spec.modules[0].path
    if not isinstance(config["target_modules"], list):  # null and patterns: there is one embedding to find
        config["target_modules"] = [embedding]
    if spec.tied_embeddings and shared is None:
        tensors = _without_tied_copy(tensors, spec, problems)

    def lower(module: ModuleSpec, found: Mapping[str, Placed]) -> list[Op]:
        if indices is None or not fits(found, {FIELD: (len(indices), module.shape.d_out)}, problems):
            return []
        return _rows(indices, found[FIELD].tensor, _sites(module.path, spec))

    return read_modules(LAYOUT, lower, config, tensors, spec, problems)


def _of_shared(
    shared: str,
    indices: list[int] | None,
    tensors: Mapping[str, Tensor],
    spec: BackboneSpec,
    problems: Problems,
) -> tuple[Op, ...]:
    """The Rows of a table that stands for every module tied to it."""
    sites = _sites(shared, spec)
    tied = {f"{PREFIX}{spec.writer[site][0].path}.{FIELD}" for site in sites}
    key = f"{PREFIX}{shared}.{FIELD}"
    for stray in sorted(tensors.keys() - tied - {key}):
        problems.add(f"A tensor without a site: {quoted(stray)}: the config does not adapt it.")
    if key not in tensors:
        problems.add(f"A site without a tensor: the file has no {quoted(key)}.")
        return ()
    for copy in sorted(tied & tensors.keys()):
        if not torch.equal(tensors[copy], tensors[key]):
            problems.add(f"{quoted(copy)} differs from {quoted(key)}, to which it is tied.")
    width = spec.modules[0].shape.d_out
    if indices is None or not check_shape(Placed(key, tensors[key]), (len(indices), width), problems):
        return ()
    return tuple(_rows(indices, tensors[key], sites))


def read_lora_tokens(
    indices: list[int] | Mapping[str, list[int]] | None,
    tensors: Mapping[str, Tensor],
    spec: BackboneSpec,
    problems: Problems,
) -> tuple[list[Op], Mapping[str, Tensor]]:
    """The Rows of a LoRA adapter with `trainable_token_indices`, and the tensors that are left for LoRA."""
    if not indices:
        return [], tensors
    width, table = spec.modules[0].shape.d_out, _shared_table(spec) or spec.modules[0].path
    if isinstance(indices, Mapping):
        ((name, ids),) = indices.items()
    else:
        name, ids = table, indices
    key = f"{PREFIX}{table}.token_adapter.{FIELD}"
    if not matches(table, [name]):
        problems.add(
            f"trainable_token_indices: {quoted(name)} is not the token embedding, {quoted(table)}.",
            param="trainable_token_indices",
        )
    elif key not in tensors:
        problems.add(
            f"A site without a tensor: trainable_token_indices is set, but the file has no {quoted(key)}.",
            param="trainable_token_indices",
        )
    elif check_shape(Placed(key, tensors[key]), (len(ids), width), problems):
        return _rows(ids, tensors[key], _sites(table, spec)), {k: tensor for k, tensor in tensors.items() if k != key}
    return [], {k: tensor for k, tensor in tensors.items() if k != key}


def _shared_table(spec: BackboneSpec) -> str | None:
    """The module that holds the embedding of an encoder-decoder and, since both stacks have their own, never runs."""
    if spec.kind != "encoder-decoder":
        return None
    return f"{spec.body}.shared" if spec.body else "shared"


def _sites(table: str, spec: BackboneSpec) -> list[Site]:
    """Where rows of `table` act under PEFT: wherever its weight is used, unless it is one stack's own."""
    own = [part.site for module in spec.modules if module.path == table for part in module.writes]
    tied = [Site("logits")] if spec.tied_embeddings else []
    if spec.kind != "encoder-decoder":
        return own + tied
    return own or [Site("enc.embed"), Site("dec.embed"), *tied]


def _rows(indices: list[int], rows: Tensor, sites: list[Site]) -> list[Op]:
    ids = torch.tensor(indices, dtype=torch.int32)
    return [Rows(site=site, ids=ids, rows=rows) for site in sites]


def _without_tied_copy(
    tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> Mapping[str, Tensor]:
    """`tensors` without the head's rows, which PEFT shares with the embedding's and so must be equal to them."""
    embed, head = (f"{PREFIX}{spec.writer[Site(name)][0].path}.{FIELD}" for name in ("embed", "logits"))
    if embed not in tensors or head not in tensors:
        return tensors
    if not torch.equal(tensors[embed], tensors[head]):
        problems.add(f"{quoted(head)} differs from {quoted(embed)}, to which it is tied.")
    return {key: tensor for key, tensor in tensors.items() if key != head}
