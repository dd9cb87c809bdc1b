"""The schemas of PEFT's methods that rotate, add matrices or replace parameters.

Source: the config classes of PEFT 0.21.2.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.formats.peft_config import (
    COMMON,
    DROPOUT,
    EXCLUDES,
    LAYERS,
    LAYOUT,
    MANY,
    MAX_RANK,
    RANK,
    RANK_PATTERN,
    SCALE,
    SCALE_PATTERN,
    TARGETED,
    TARGETS,
    explain_pattern,
    is_pattern_map,
)
from adapters.formats.schema import (
    ANYTHING,
    BOOLEAN,
    TEXT,
    Rule,
    is_bool,
    is_int,
    is_number,
    off,
    or_null,
)


def _size(default: int) -> Rule:
    return Rule(is_int(0, MANY), "an integer from 0 up", used=True, default=default)


_INIT = {"init_weights": ANYTHING}  # the start of training
_BIAS = {"bias": off("none", why="trained biases are not read with this method yet")}

OFT: Mapping[str, Rule] = {
    **COMMON,
    **TARGETED,
    **LAYERS,
    **_INIT,
    **_BIAS,
    "r": _size(0),
    "oft_block_size": _size(32),
    "module_dropout": DROPOUT,
    "eps": Rule(is_number, "a number"),
    "coft": off(False, why="constrained OFT projects its parameters again at every forward pass"),
    "block_share": Rule(is_bool, "true or false", used=True, default=False),
    # before PEFT 0.18 the series was another one, and the key was absent or the version was not stored
    "use_cayley_neumann": Rule(is_bool, "true or false", used=True, required=True),
    "num_cayley_neumann_terms": Rule(is_int(1, 64), "an integer from 1 to 64", used=True, default=5),
    "peft_version": Rule(lambda value: isinstance(value, str), "a string", used=True, default=""),
}

BOFT: Mapping[str, Rule] = {
    **COMMON,
    **TARGETED,
    **LAYERS,
    **_INIT,
    **_BIAS,
    "boft_block_size": _size(4),
    "boft_block_num": _size(0),
    "boft_n_butterfly_factor": Rule(is_int(1, 32), "an integer from 1 to 32", used=True, default=1),
    "boft_dropout": DROPOUT,
}

ROAD_VARIANTS = ("road_1", "road_2", "road_4")

ROAD: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **_INIT,
    "variant": Rule(
        lambda value: value in ROAD_VARIANTS,
        f"one of {', '.join(ROAD_VARIANTS)}",
        used=True,
        default="road_1",
    ),
    "group_size": Rule(
        lambda value: is_int(2, MANY)(value) and value % 2 == 0,
        "an even number from 2 up",
        used=True,
        default=64,
    ),
}

HRA: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **EXCLUDES,
    **LAYERS,
    **_INIT,
    **_BIAS,
    "r": RANK,
    "apply_GS": Rule(is_bool, "true or false", used=True, default=False),
}

SHIRA: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **LAYOUT,
    **_INIT,
    "r": Rule(is_int(1, MAX_RANK), f"an integer from 1 to {MAX_RANK}", used=True, default=32),
    "mask_type": TEXT,  # the file holds the indices that it chose
    "random_seed": Rule(or_null(is_int(-MANY, MANY)), "an integer or null"),
}

LOKR: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **EXCLUDES,
    **LAYERS,
    **_INIT,
    "r": RANK,
    "alpha": SCALE,
    "rank_pattern": RANK_PATTERN,
    "alpha_pattern": SCALE_PATTERN,
    "rank_dropout": DROPOUT,
    "module_dropout": DROPOUT,
    "rank_dropout_scale": BOOLEAN,
    "use_effective_conv2d": BOOLEAN,  # only convolutions
    "decompose_both": Rule(is_bool, "true or false", used=True, default=False),
    "decompose_factor": Rule(is_int(-1, MANY), "an integer from -1 up", used=True, default=-1),
}

C3A: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **LAYERS,
    **_INIT,
    **_BIAS,
    "block_size": Rule(is_int(1, MANY), "a positive integer", used=True, default=256),
    "block_size_pattern": Rule(
        is_pattern_map(is_int(1, MANY)),
        "an object of module names to positive integers",
        used=True,
        default={},
        explain=explain_pattern,
    ),
}

TRAINABLE_TOKENS: Mapping[str, Rule] = {
    **TARGETS,
    **COMMON,  # without modules_to_save
    **_INIT,
    "token_indices": Rule(
        lambda value: isinstance(value, list) and bool(value) and all(map(is_int(0, MANY), value)),
        "a list of token ids",
        used=True,
        required=True,
    ),
}

LN_TUNING: Mapping[str, Rule] = {**COMMON, **TARGETS, **EXCLUDES}
