"""PEFT prefix tuning and cartridges -> AttnPrefix; prompt tuning, P-tuning, CPT and multitask prompts -> VirtualTokens.

Format: PEFT 0.21.2, key `prompt_embeddings`. Prefix and cartridge: [l, 2·L·H·D], per token and layer first the key,
then the value, [H, D] each, any projection already evaluated. The others: [l, d], likewise after P-tuning's encoder and
CPT's projection. Multitask adds `prefix_task_cols` [1, l, k] and `prefix_task_rows` [1, k, d], whose product multiplies
the prompt entry by entry. Real tokens are positioned after the l virtual ones.

On encoder-decoders PEFT doubles what it stores and uses a part, and what its `generate` does is what is served. Prefix:
the 2·L rows of each token, with L the config's `num_layers` (the encoder's layers unless it says another number), stand
twice behind one another and are cut by four, so that layer i of the decoder has rows 4·i and 4·i + 1 modulo 2·L; the
other rows, the encoder and cross-attention have no part in it. Prompts: [2·l, d], whose first l rows stand before
the encoder's tokens; `forward` puts the others of a multitask prompt before the decoder's, `generate` does not.
Source: PEFT `PeftModel.get_prompt`, `PeftModelForSeq2SeqLM.generate` and `get_prompt_embedding_to_save`,
`MultitaskPromptEmbedding`; Li and Liang
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
from adapters.normal_form import AttnPrefix, Op, Rows, VirtualTokens

IGNORES_PREFIX = frozenset({"distilbert", "modernbert", "albert", "deberta-v2"})
"""Encoders whose forward takes no past keys and values: under PEFT a prefix changes nothing there."""

SCALES_OUTSIDE = frozenset({"marian", "pegasus"})
"""Encoder-decoders that scale looked-up embeddings in their encoder's code, which PEFT's prompts go past."""

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
    _check_stacks(config, raw.get("task_type"), spec, problems)
    layers = _prefix_layers(config, spec, problems)
    _check_sizes(
        config,
        {"num_layers": layers, "num_attention_heads": spec.num_kv_heads, "token_dim": kv_width},
        problems,
    )
    saved, tensors = take_saved(config, tensors, spec, problems, prefix=SHARED_PREFIX)
    stored = _embeddings(tensors, config["num_virtual_tokens"], 2 * layers * kv_width, problems)
    if stored is None:
        return ()
    rows = stored.view(-1, 2 * layers, spec.num_kv_heads, spec.head_dim)
    both = spec.kind == "encoder-decoder"
    at = [(4 if both else 2) * layer % (2 * layers) for layer in range(spec.num_layers)]
    prefixes = (
        AttnPrefix(layer=layer, key=rows[:, row], value=rows[:, row + 1], stack="dec" if both else "")
        for layer, row in enumerate(at)
    )
    return (*saved, *prefixes)


def _prefix_layers(config: Mapping[str, Any], spec: BackboneSpec, problems: Problems) -> int:
    """The number of layers for which rows are stored."""
    if spec.kind != "encoder-decoder":
        return spec.num_layers
    stated = config["num_layers"]
    layers = stated if stated == spec.num_layers else spec.num_encoder_layers
    if layers < spec.num_layers:
        problems.add(
            f"adapter_config.json: num_layers: PEFT cuts a prefix of {layers} layers for {layers} of the decoder's "
            f"{spec.num_layers} layers and fails on the others. Train it with num_layers={spec.num_layers}.",
            param="num_layers",
        )
    return layers


def _check_stacks(
    config: Mapping[str, Any], task_type: object, spec: BackboneSpec, problems: Problems
) -> None:
    """Whether the prompt was trained for a model of as many stacks."""
    stacks = 2 if spec.kind == "encoder-decoder" else 1
    if config["num_transformer_submodules"] not in (None, stacks):
        problems.add(
            f"adapter_config.json: num_transformer_submodules: got {config['num_transformer_submodules']}, but "
            f"{spec.model_type} has {stacks}.",
            param="num_transformer_submodules",
        )
    if stacks == 2 and task_type is None:
        problems.add(
            "adapter_config.json: task_type: got null, expected 'SEQ_2_SEQ_LM': without it PEFT leaves the prompt out.",
            param="task_type",
        )


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
    length, width = config["num_virtual_tokens"], spec.embedding_width
    stored = _embeddings(tensors, _stored(length, spec), width, problems)
    return () if stored is None else (*saved, VirtualTokens(embeddings=stored[:length]))


read_prefix_tuning = partial(_read_prefix, rules=PREFIX_TUNING)
read_cartridge = partial(_read_prefix, rules=CARTRIDGE)
read_prompt_tuning = partial(_read_prompt, rules=PROMPT_TUNING)
read_p_tuning = partial(_read_prompt, rules=P_TUNING)


def read_cpt(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The virtual tokens; what does not fit is added to `problems`."""
    if spec.kind == "encoder-decoder":
        problems.add(
            "adapter_config.json: peft_type: PEFT's generate has no CPT on encoder-decoders. Use prompt tuning.",
            param="peft_type",
        )
        return ()
    return _read_prompt(raw, tensors, spec, problems, rules=CPT)


def _stored(length: int | None, spec: BackboneSpec) -> int | None:
    """Rows of a file with `length` virtual tokens."""
    return None if length is None else length * (2 if spec.kind == "encoder-decoder" else 1)


def read_multitask_prompt_tuning(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The virtual tokens of the only task; what does not fit is added to `problems`."""
    config = _prompt_config(raw, MULTITASK_PROMPT_TUNING, spec, problems)
    saved, tensors = _take_saved_beside_tokens(config, tensors, spec, problems)
    width = spec.embedding_width
    ranks, length = config["num_ranks"], config["num_virtual_tokens"]
    rows_stored = _stored(length, spec)
    task = {name: Placed(name, tensors[name]) for name in (TASK_COLUMNS, TASK_ROWS) if name in tensors}
    for name in (TASK_COLUMNS, TASK_ROWS):
        if name not in task:
            problems.add(f"A site without a tensor: the file has no {name!r}.")
    stored = _embeddings(
        {key: tensor for key, tensor in tensors.items() if key not in task},
        rows_stored,
        width,
        problems,
    )
    if None in (ranks, length, config["num_tasks"]) or len(task) < 2:  # refused already
        return ()
    shapes = {TASK_COLUMNS: (1, rows_stored, ranks), TASK_ROWS: (1, ranks, width)}
    if not fits(task, shapes, problems) or stored is None:
        return ()
    columns, rows = (task[name].tensor[0].float() for name in shapes)
    return (*saved, VirtualTokens(embeddings=(stored.float() * (columns @ rows))[:length]))


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
    _check_stacks(config, raw.get("task_type"), spec, problems)
    if spec.model_type in SCALES_OUTSIDE:
        problems.add(
            f"adapter_config.json: peft_type: {spec.model_type} scales the embeddings that it looks up itself; behind "
            "a prompt PEFT leaves that out for all other tokens too. Use prefix tuning.",
            param="peft_type",
        )
    # PEFT does not use num_layers and num_attention_heads here, but they tell that another backbone was meant
    layers = spec.num_encoder_layers or spec.num_layers
    _check_sizes(
        config,
        {
            "num_layers": layers,
            "num_attention_heads": spec.num_heads,
            "token_dim": spec.embedding_width,
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
