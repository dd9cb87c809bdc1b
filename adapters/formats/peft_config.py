"""The schema of PEFT's adapter_config.json, per method.

Source: the config classes of PEFT 0.21.2 (`PeftConfig`, `LoraConfig`, `IA3Config`, `PrefixTuningConfig`,
`PromptTuningConfig`) and the keys that releases from 0.2 on wrote. A key that is not listed is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.formats.head_recipes import TASKS
from adapters.formats.problems import quoted
from adapters.formats.schema import (
    BOOLEAN,
    OBJECT,
    TEXT,
    Check,
    Rule,
    is_bool,
    is_fraction,
    is_int,
    is_names,
    is_scale,
    is_text,
    off,
    or_null,
)

MAX_RANK = 4096
MANY = 1 << 30

# init_lora_weights that subtract from the base what they put into the adapter. (eva, orthogonal and mica choose the
# adapter's start only; MiCA's frozen B is stored like any other.)
BASE_CHANGING_INITS: Mapping[str, str] = {
    "pissa": "PiSSA moves the principal part of each base weight into the adapter",
    "olora": "OLoRA subtracts the adapter's first value from each base weight",
    "corda": "CorDA subtracts the adapter's first value from each base weight",
    "loftq": "LoftQ quantises the base weights against the adapter",
    "lora_ga": "LoRA-GA subtracts the adapter's first value from each base weight",
}
INERT_INITS = ("gaussian", "eva", "orthogonal", "mica")


def is_pattern(text: str) -> bool:
    """True for a module pattern without quantifiers: letters, digits, `_`, `.`, and `^` at its start."""
    body = text.removeprefix("^")
    return bool(body) and body.isascii() and all(char.isalnum() or char in "_." for char in body)


def is_pattern_map(of: Check) -> Check:
    """A check for objects of module patterns to values that pass `of`."""
    return lambda value: (
        isinstance(value, dict) and all(is_pattern(key) and of(item) for key, item in value.items())
    )


def _explain_init(value: object) -> str | None:
    for name, effect in BASE_CHANGING_INITS.items():
        if isinstance(value, str) and value.startswith(name):
            return (
                f"'{name}' changes the base model: {effect}. Convert the adapter with PEFT's "
                "`save_pretrained(path_initial_model_for_weight_conversion=...)` and upload the result."
            )
    return None


def explain_pattern(value: object) -> str | None:
    """Why the first pattern that is refused in `value` is refused."""
    bad = [pattern for pattern in value if not is_pattern(pattern)] if isinstance(value, dict) else []
    if not bad:
        return None
    return (
        f"the pattern {quoted(bad[0])} is refused: module names of letters, digits, '_' and '.' are read, with '^' in "
        "front at most; regular expressions from uploads are never run."
    )


def _is_token_indices(value: object) -> bool:
    if isinstance(value, dict):
        return len(value) <= 1 and all(map(_is_token_indices, value.values()))
    return value is None or (isinstance(value, list) and all(map(is_int(0, MANY), value)))


COMMON: Mapping[str, Rule] = {
    "peft_type": TEXT,  # the reader table has looked at it
    "base_model_name_or_path": TEXT,  # so has the base check
    "revision": TEXT,
    "task_type": Rule(
        lambda value: value is None or (isinstance(value, str) and value in TASKS),
        f"{', '.join(TASKS)} or null",
    ),
    "auto_mapping": OBJECT,
    "peft_version": TEXT,
    "inference_mode": BOOLEAN,
    "modules_to_save": off(None, [], why="this method saves no whole modules beside its own tensors"),
}

SAVED: Mapping[str, Rule] = {
    "modules_to_save": Rule(or_null(is_names), "a list of module names or null", used=True),
}

TARGETS: Mapping[str, Rule] = {
    "target_modules": Rule(
        lambda value: is_text(value) or is_names(value), "a list of module names, or a string", used=True
    ),
    **SAVED,
}

EXCLUDES: Mapping[str, Rule] = {
    "exclude_modules": Rule(
        or_null(is_names),
        "a list of module names or null",
        used=True,
        why="a string is a regular expression, which is never run",
    ),
}

LAYOUT: Mapping[str, Rule] = {
    "fan_in_fan_out": BOOLEAN,  # PEFT overwrites it with the base module's own layout
}

LAYERS: Mapping[str, Rule] = {
    "layers_to_transform": Rule(
        lambda value: (
            value is None or all(map(is_int(0, MANY), value if isinstance(value, list) else [value]))
        ),
        "null, a layer index or a list of them",
        used=True,
    ),
    "layers_pattern": off(None, [], "", why="it renames the layers' container"),
}

DROPOUT = Rule(is_fraction, "a number from 0 up to 1")
RANK = Rule(is_int(1, MAX_RANK), f"an integer from 1 to {MAX_RANK}", used=True, default=8)
SCALE = Rule(is_scale, "a positive number", used=True, default=8)

RANK_PATTERN = Rule(
    is_pattern_map(is_int(1, MAX_RANK)),
    f"an object of module names to integers from 1 to {MAX_RANK}",
    used=True,
    default={},
    explain=explain_pattern,
)
SCALE_PATTERN = Rule(
    is_pattern_map(is_scale),
    "an object of module names to positive numbers",
    used=True,
    default={},
    explain=explain_pattern,
)


def bias_rule(own: str) -> Rule:
    """Which biases were trained; `own` is the method's word for those of the adapted modules."""
    return Rule(
        lambda value: value in ("none", "all", own), f"'none', 'all' or '{own}'", used=True, default="none"
    )


TARGETED: Mapping[str, Rule] = {**TARGETS, **EXCLUDES, **LAYOUT}

LORA: Mapping[str, Rule] = {
    **COMMON,
    **TARGETED,
    **LAYERS,
    "r": RANK,
    "lora_alpha": SCALE,
    "rank_pattern": RANK_PATTERN,
    "alpha_pattern": SCALE_PATTERN,
    "use_rslora": Rule(is_bool, "true or false", used=True, default=False),
    "use_dora": Rule(is_bool, "true or false", used=True, default=False),
    "lora_bias": Rule(is_bool, "true or false", used=True, default=False),
    "bias": bias_rule("lora_only"),
    "init_lora_weights": Rule(
        lambda value: is_bool(value) or value in INERT_INITS,
        f"true, false, {', '.join(INERT_INITS)}",
        explain=_explain_init,
    ),
    "lora_dropout": DROPOUT,
    "eva_config": OBJECT,
    "megatron_core": TEXT,
    "qalora_group_size": Rule(is_int(1, MANY), "a positive integer"),
    "runtime_config": OBJECT,  # PEFT ignores it in files
    "merge_weights": BOOLEAN,
    "megatron_config": off(None, why="Megatron's parallel layers are other modules"),
    "enable_lora": off(None, why="it adapts parts of a fused projection"),
    "trainable_token_indices": Rule(
        _is_token_indices,
        "null, a list of token ids, or an object of one embedding's name to such a list",
        used=True,
    ),
    "loftq_config": off(None, {}, why=BASE_CHANGING_INITS["loftq"]),
    "corda_config": off(None, why=BASE_CHANGING_INITS["corda"]),
    "lora_ga_config": off(None, why=BASE_CHANGING_INITS["lora_ga"]),
    "velora_config": off(None, why="it stores tensors of its own"),
    "alora_invocation_tokens": Rule(
        lambda value: (
            value is None or (isinstance(value, list) and bool(value) and all(map(is_int(0, MANY), value)))
        ),
        "null or a list of token ids, not empty",
        used=True,
    ),
    "use_qalora": off(False, why="QALoRA belongs to a GPTQ-quantised base model, which is another backbone"),
    "monteclora_config": off(None, why="it samples its weights"),
    "layer_replication": off(
        None,
        [],
        why="it runs layers of the backbone several times, which is not executed: all rows share one stack",
    ),
    "target_parameters": off(None, [], why="adapted bare parameters (mixture of experts) are not served yet"),
    "use_bdlora": Rule(
        lambda value: value is None or value is False or isinstance(value, dict),
        "null or an object",
        used=True,
    ),
    "arrow_config": off(None, why="it routes each token between several adapters"),
    "kasa_config": off(None, why="KaSA drops singular directions of each base weight"),
    "ensure_weight_tying": off(
        False,
        why="which modules it ties depends on their names: PEFT knows embed_tokens and lm_head, not wte",
    ),
}

BDLORA: Mapping[str, Rule] = {
    "target_modules_bd_a": Rule(or_null(is_names), "a list of parts of module names or null", used=True),
    "target_modules_bd_b": Rule(or_null(is_names), "a list of parts of module names or null", used=True),
    "nblocks": Rule(is_int(1, MANY), "a positive integer", used=True, default=1),
    "match_strict": Rule(is_bool, "true or false", used=True, default=True),
}

IA3: Mapping[str, Rule] = {
    **COMMON,
    **TARGETED,
    "feedforward_modules": Rule(
        lambda value: is_text(value) or is_names(value), "a list of module names, or a string", used=True
    ),
    "init_ia3_weights": BOOLEAN,
}

SIZE = Rule(or_null(is_int(1, MANY)), "a positive integer or null", used=True)

PROMPT_LEARNING: Mapping[str, Rule] = {
    **COMMON,
    **SAVED,
    "num_virtual_tokens": Rule(is_int(1, MANY), "a positive integer", used=True, required=True),
    "token_dim": SIZE,
    "num_layers": SIZE,
    "num_attention_heads": SIZE,
    "num_transformer_submodules": Rule(or_null(is_int(1, 2)), "1, 2 or null", used=True),
}

PREFIX_TUNING: Mapping[str, Rule] = {
    **PROMPT_LEARNING,
    "encoder_hidden_size": Rule(or_null(is_int(1, MANY)), "a positive integer or null"),
    "prefix_projection": BOOLEAN,  # PEFT evaluates the projection before it saves
    "init_weights": TEXT,
}

PROMPT_TUNING: Mapping[str, Rule] = {
    **PROMPT_LEARNING,
    "prompt_tuning_init": TEXT,
    "prompt_tuning_init_text": TEXT,
    "tokenizer_name_or_path": TEXT,  # read only to initialise, and here never
    "tokenizer_kwargs": OBJECT,
}
