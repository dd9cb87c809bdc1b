"""PEFT trainable tokens -> Rows.

Format: PEFT 0.21.2, `<embedding>.trainable_tokens_delta` [n, d]: the new rows themselves, not differences, for the
tokens `token_indices` of the config. Where the head is tied to the embedding, its rows are replaced too, and the file
holds them twice.
Source: PEFT `TrainableTokensLayer`, `TrainableTokensModel.inject_adapter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.backbone_spec import BackboneSpec, ModuleSpec
from adapters.formats.peft_keys import PREFIX, Placed, check_shape
from adapters.formats.peft_matrix_config import TRAINABLE_TOKENS
from adapters.formats.peft_modules import lower_modules
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import Op, Rows, Site

FIELD = "trainable_tokens_delta"


def read_trainable_tokens(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of a trainable tokens adapter; what does not fit is added to `problems`."""
    config = check_config(raw, TRAINABLE_TOKENS, problems)
    indices = config["token_indices"]
    if spec.tied_embeddings:
        tensors = _without_tied_copy(tensors, spec, problems)

    def lower(module: ModuleSpec, found: Mapping[str, Placed]) -> list[Op]:
        if indices is None or not check_shape(found["rows"], (len(indices), module.shape.d_out), problems):
            return []
        ids, rows = torch.tensor(indices, dtype=torch.int32), found["rows"].tensor
        sites = [module.writes[0].site, *([Site("logits")] if spec.tied_embeddings else [])]
        return [Rows(site=site, ids=ids, rows=rows) for site in sites]

    required = {FIELD: "rows"}
    return lower_modules(config, tensors, required, lower, spec, problems, kinds=("embedding",))


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
