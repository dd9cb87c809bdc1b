"""The schemas of PEFT's methods that put tokens or keys and values in front, beside prefix and prompt tuning.

Source: the config classes of PEFT 0.21.2. PEFT evaluates prompt encoders before it saves, so what shaped them is inert.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.formats.peft_config import COMMON, DROPOUT, MANY, PROMPT_LEARNING, PROMPT_TUNING
from adapters.formats.schema import TEXT, Rule, is_bool, is_int, is_number, or_null

_COUNT = Rule(or_null(is_int(1, MANY)), "a positive integer or null")
_INTEGERS = Rule(
    or_null(lambda value: isinstance(value, list) and all(map(is_int(0, MANY), value))),
    "a list of non-negative integers or null",
)
_NUMBER = Rule(or_null(is_number), "a number or null")

P_TUNING: Mapping[str, Rule] = {
    **PROMPT_LEARNING,
    "encoder_reparameterization_type": TEXT,
    "encoder_hidden_size": _COUNT,
    "encoder_num_layers": _COUNT,
    "encoder_dropout": DROPOUT,
}

CPT: Mapping[str, Rule] = {
    **PROMPT_LEARNING,
    "cpt_token_ids": _INTEGERS,  # where the prompt started, and what the loss covers
    "cpt_mask": _INTEGERS,
    "cpt_tokens_type_mask": _INTEGERS,
    "opt_weighted_loss_type": TEXT,
    "opt_loss_decay_factor": _NUMBER,
    "opt_projection_epsilon": _NUMBER,
    "opt_projection_format_epsilon": _NUMBER,
    "tokenizer_name_or_path": TEXT,
}

CARTRIDGE: Mapping[str, Rule] = {
    **PROMPT_LEARNING,
    "num_frozen_tokens": Rule(is_int(0, MANY), "a non-negative integer"),
}

MULTITASK_PROMPT_TUNING: Mapping[str, Rule] = {
    **PROMPT_TUNING,
    "prompt_tuning_init_state_dict_path": TEXT,  # read only to initialise, and here never
    "prompt_tuning_init_task": Rule(or_null(is_int(0, MANY)), "a non-negative integer or null"),
    "num_ranks": Rule(is_int(1, MANY), "a positive integer", used=True, default=1),
    "num_tasks": Rule(
        lambda value: value == 1 and not is_bool(value),
        "1",
        used=True,
        default=1,
        explain=lambda value: (
            f"{value} tasks share this prompt and the file does not say which one is wanted. Keep one row of "
            "prefix_task_cols and prefix_task_rows, set num_tasks to 1 and upload one adapter per task."
            if is_int(2, MANY)(value)
            else None
        ),
    ),
}

ADAPTION_PROMPT: Mapping[str, Rule] = {
    **COMMON,
    "target_modules": Rule(or_null(lambda value: isinstance(value, str)), "a string or null", used=True),
    "adapter_len": Rule(is_int(1, MANY), "a positive integer", used=True, required=True),
    "adapter_layers": Rule(is_int(1, MANY), "a positive integer", used=True, required=True),
}
