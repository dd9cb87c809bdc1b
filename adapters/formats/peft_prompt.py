"""PEFT prefix tuning and cartridges -> AttnPrefix; prompt tuning, P-tuning, CPT and multitask prompts -> VirtualTokens.

Format: PEFT 0.21.2, key `prompt_embeddings`. Prefix and cartridge: [l, 2·L·H·D], per token and layer first the key,
then the value, [H, D] each, any projection already evaluated. The others: [l, d], likewise after P-tuning's encoder and
CPT's projection. Multitask adds `prefix_task_cols` [1, l, k] and `prefix_task_rows` [1, k, d], whose product multiplies
the prompt entry by entry. Real tokens are positioned after the l virtual ones.
Source: PEFT `PeftModel.get_prompt` and `get_prompt_embedding_to_save`, `MultitaskPromptEmbedding`; Li and Liang
"Prefix-Tuning"; Lester et al. "Prompt tuning"; Wang et al. "Multitask Prompt Tuning" section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.formats.peft_config import PREFIX_TUNING, PROMPT_TUNING
from adapters.formats.peft_config_prompt import CARTRIDGE, CPT, MULTITASK_PROMPT_TUNING, P_TUNING
from adapters.formats.peft_keys import PROMPT, SHARED_PREFIX, Placed, check_shape
from adapters.formats.peft_modules import fits
from adapters.formats.peft_saved import take_saved
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import Rule, check_config
from adapters.normal_form import AttnPrefix, Op, Rows, Site, VirtualTokens

IGNORES_PREFIX = frozenset({"distilbert", "modernbert", "albert", "deberta-v2"})
"""Encoders whose forward takes no past keys and values: under PEFT a prefix changes nothing there."""

TASK_COLUMNS, TASK_ROWS = "prefix_task_cols", "prefix_task_rows"


def _read_prefix(
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    spec: BackboneSpec,
    problems: Problems,
    *,
    rules: Mapping[str, Rule],
) -> tuple[Op, ...]:
    """One AttnPrefix per layer; what does not fit is added to `problems`."""
    config = check_config(raw, rules, problems)
    if spec.model_type in IGNORES_PREFIX:
        problems.add(
            f"adapter_config.json: peft_type: {spec.model_type} takes no past keys and values, so under PEFT this "
            "prefix changes nothing. Use prompt tuning.",
            param="peft_type",
        )
    kv_width = spec.num_kv_heads * spec.head_dim
    _check_sizes(
        config,
        {"num_layers": spec.num_layers, "num_attention_heads": spec.num_kv_heads, "token_dim": kv_width},
        problems,
    )
    saved, tensors = take_saved(config, tensors, spec, problems, prefix=SHARED_PREFIX)
    stored = _embeddings(tensors, config["num_virtual_tokens"], 2 * spec.num_layers * kv_width, problems)
    if stored is None:
        return ()
    by_layer = stored.view(-1, spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
    prefixes = (
        AttnPrefix(layer=layer, key=by_layer[:, layer, 0], value=by_layer[:, layer, 1])
        for layer in range(spec.num_layers)
    )
    return (*saved, *prefixes)


def _read_prompt(
    raw: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    spec: BackboneSpec,
    problems: Problems,
    *,
    rules: Mapping[str, Rule],
) -> tuple[Op, ...]:
    """The virtual tokens; what does not fit is added to `problems`."""
    config = _prompt_config(raw, rules, spec, problems)
    saved, tensors = _take_saved_beside_tokens(config, tensors, spec, problems)
    stored = _embeddings(tensors, config["num_virtual_tokens"], spec.site_width[Site("embed")], problems)
    return () if stored is None else (*saved, VirtualTokens(embeddings=stored))


read_prefix_tuning = partial(_read_prefix, rules=PREFIX_TUNING)
read_cartridge = partial(_read_prefix, rules=CARTRIDGE)
read_prompt_tuning = partial(_read_prompt, rules=PROMPT_TUNING)
read_p_tuning = partial(_read_prompt, rules=P_TUNING)
read_cpt = partial(_read_prompt, rules=CPT)


def read_multitask_prompt_tuning(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The virtual tokens of the only task; what does not fit is added to `problems`."""
    config = _prompt_config(raw, MULTITASK_PROMPT_TUNING, spec, problems)
    saved, tensors = _take_saved_beside_tokens(config, tensors, spec, problems)
    width = spec.site_width[Site("embed")]
    ranks, length = config["num_ranks"], config["num_virtual_tokens"]
    task = {name: Placed(name, tensors[name]) for name in (TASK_COLUMNS, TASK_ROWS) if name in tensors}
    for name in (TASK_COLUMNS, TASK_ROWS):
        if name not in task:
            problems.add(f"A site without a tensor: the file has no {name!r}.")
    stored = _embeddings(
        {key: tensor for key, tensor in tensors.items() if key not in task},
        length,
        width,
        problems,
    )
    if None in (ranks, length, config["num_tasks"]) or len(task) < 2:  # refused already
        return ()
    shapes = {TASK_COLUMNS: (1, length, ranks), TASK_ROWS: (1, ranks, width)}
    if not fits(task, shapes, problems) or stored is None:
        return ()
    columns, rows = (task[name].tensor[0].float() for name in shapes)
    return (*saved, VirtualTokens(embeddings=stored.float() * (columns @ rows)))


def _take_saved_beside_tokens(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[list[Op], Mapping[str, Tensor]]:
    """As `take_saved`, without an embedding: PEFT embeds the prompt by the base one, generated tokens by the saved."""
    saved, rest = take_saved(config, tensors, spec, problems, prefix=SHARED_PREFIX)
    if any(isinstance(op, Rows) for op in saved):
        problems.add(
            "adapter_config.json: modules_to_save: beside virtual tokens PEFT reads the prompt with the base model's "
            "token embedding and generated tokens with the saved one, so what is meant is not defined.",
            param="modules_to_save",
        )
    return saved, rest


def _prompt_config(
    raw: Mapping[str, Any], rules: Mapping[str, Rule], spec: BackboneSpec, problems: Problems
) -> dict[str, Any]:
    config = check_config(raw, rules, problems)
    # PEFT does not use num_layers and num_attention_heads here, but they tell that another backbone was meant
    _check_sizes(
        config,
        {
            "num_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "token_dim": spec.site_width[Site("embed")],
        },
        problems,
    )
    return config


def _check_sizes(config: Mapping[str, Any], sizes: Mapping[str, int], problems: Problems) -> None:
    for key, size in sizes.items():
        if config[key] not in (None, size):  # null: PEFT takes it from the base model
            problems.add(
                f"adapter_config.json: {key}: got {config[key]}, but the backbone has {size}: the adapter was trained "
                "on another base model.",
                param=key,
            )


def _embeddings(
    tensors: Mapping[str, Tensor], length: int | None, width: int, problems: Problems
) -> Tensor | None:
    for key in tensors.keys() - {PROMPT}:
        problems.add(f"A tensor without a site: {quoted(key)}: prompts are stored under {PROMPT!r}.")
    if PROMPT not in tensors:
        problems.add(f"A site without a tensor: the file has no {PROMPT!r}.")
        return None
    stored = tensors[PROMPT]
    if length is None:  # refused already
        length = stored.shape[0] if stored.dim() else 0
    return stored if check_shape(Placed(PROMPT, stored), (length, width), problems) else None
