"""The schemas of PEFT's methods that lower to LowRank (or a shift) at linear modules, beside LoRA and IA3.

Source: the config classes of PEFT 0.21.2 and what their layers read of them at inference. Keys that only choose
initial values or how training runs are inert.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.formats.peft_config import (
    COMMON,
    DROPOUT,
    EXCLUDES,
    LAYERS,
    LAYOUT,
    LORA,
    MANY,
    MAX_RANK,
    RANK,
    RANK_PATTERN,
    SCALE,
    SCALE_PATTERN,
    TARGETS,
    bias_rule,
)
from adapters.formats.schema import BOOLEAN, Check, Rule, is_bool, is_int, is_number, off, or_null

_SEED = Rule(is_int(0, 1 << 63), "a non-negative integer")
_NUMBER = Rule(or_null(is_number), "a number or null")


def _count(default: int) -> Rule:
    return Rule(is_int(1, MANY), "a positive integer", used=True, default=default)


def _rank(default: int) -> Rule:
    return Rule(is_int(1, MAX_RANK), f"an integer from 1 to {MAX_RANK}", used=True, default=default)


def _scale(default: float) -> Rule:
    return Rule(SCALE.accepts, SCALE.expected, used=True, default=default)


def _saved_projection(tensors: str) -> Rule:
    return Rule(
        lambda value: value is True,
        "true",
        used=True,
        default=True,
        explain=lambda value: (
            f"{tensors} are not in the file but drawn again from a seed, which gives other numbers on other versions "
            "and devices of torch. Convert it offline with `deltamux convert`, or save it with this key set to true."
            if value is False
            else None
        ),
    )


def _is_masks(of: Check) -> Check:
    return lambda value: (
        value is None
        or (
            isinstance(value, dict)
            and all(isinstance(mask, list) and all(map(of, mask)) for mask in value.values())
        )
    )


_LORA_KEYS = {key: rule for key, rule in LORA.items() if key not in ("use_rslora", "use_dora", "lora_bias")}

ADALORA: Mapping[str, Rule] = {
    **_LORA_KEYS,
    "r": Rule(is_int(0, MANY), "an integer"),  # PEFT reads init_r instead
    "init_r": _rank(12),
    "rank_pattern": Rule(
        _is_masks(is_bool), "null or an object of tensor names to lists of true and false", used=True
    ),
    "alpha_pattern": off({}, None, why="PEFT's AdaLoRA does not read it"),
    "alora_invocation_tokens": off(None, why="PEFT's AdaLoRA has no invocation"),
    "use_rslora": BOOLEAN,  # PEFT's AdaLoRA does not read it
    "use_dora": off(False, why="PEFT has no AdaLoRA with DoRA"),
    "lora_bias": off(False, why="PEFT's AdaLoRA does not read it"),
    "use_bdlora": off(None, False, why="PEFT's AdaLoRA does not read it"),
    **dict.fromkeys(
        ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"), _NUMBER
    ),
}

_RANDOM: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **LAYOUT,
    **LAYERS,
    "init_weights": BOOLEAN,
    "projection_prng_key": _SEED,
}

VERA: Mapping[str, Rule] = {
    **_RANDOM,
    "r": _rank(256),
    "bias": bias_rule("vera_only"),
    "save_projection": _saved_projection("vera_A and vera_B"),
    "vera_dropout": DROPOUT,
    "d_initial": _NUMBER,
}

PVERA: Mapping[str, Rule] = {
    **_RANDOM,
    "r": _rank(256),
    "bias": bias_rule("pvera_only"),
    "save_projection": _saved_projection("pvera_A and pvera_B"),
    "pvera_dropout": DROPOUT,
    "d_initial": _NUMBER,
    "sample_at_inference": off(False, why="it draws random numbers for every token"),
    "generator_seed": Rule(or_null(_SEED.accepts), "a non-negative integer or null"),
}

RANDLORA: Mapping[str, Rule] = {
    **_RANDOM,
    "r": _rank(32),
    "randlora_alpha": _scale(640),
    "bias": bias_rule("randlora_only"),
    "save_projection": _saved_projection("randlora_A and randlora_B"),
    "randlora_dropout": DROPOUT,
    "sparse": BOOLEAN,  # how the bases were drawn; they are in the file
    "very_sparse": BOOLEAN,
}

LOHA: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **EXCLUDES,
    **LAYERS,
    "r": RANK,
    "alpha": SCALE,
    "rank_pattern": RANK_PATTERN,
    "alpha_pattern": SCALE_PATTERN,
    "rank_dropout": DROPOUT,
    "module_dropout": DROPOUT,
    "use_effective_conv2d": BOOLEAN,  # concerns convolutions, which no backbone here has
    "init_weights": BOOLEAN,
}

_BAT = (
    "'bat' multiplies blocks of the base weight, which an upload does not hold. Convert it offline with `deltamux "
    "convert`."
)

MISS: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **EXCLUDES,
    **LAYERS,
    "r": _rank(64),
    "mini_r": _count(1),
    "init_weights": Rule(
        lambda value: is_bool(value) or value == "mini",
        "true, false or 'mini'",
        used=True,
        default=True,
        explain=lambda value: _BAT if value == "bat" else None,
    ),
    "bias": bias_rule("miss_only"),
    "miss_dropout": DROPOUT,
}

POLY: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **EXCLUDES,
    "r": RANK,
    "n_tasks": Rule(
        lambda value: value == 1 and not is_bool(value),
        "1",
        used=True,
        default=1,
        explain=lambda value: (
            f"{value} tasks share this adapter and the file does not say which one is wanted. Keep one row of every "
            "poly_router.module_logits, set n_tasks to 1 and upload one adapter per task."
            if is_int(2, MANY)(value)
            else None
        ),
    ),
    "n_skills": _count(4),
    "n_splits": _count(1),
    "poly_type": Rule(lambda value: value == "poly", "'poly'"),
    "init_weights": BOOLEAN,
}

VBLORA: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **EXCLUDES,
    **LAYOUT,
    **LAYERS,
    "r": _rank(4),
    "num_vectors": _count(256),
    "vector_length": _count(256),
    "topk": _count(2),
    "save_only_topk_weights": Rule(is_bool, "true or false", used=True, default=False),
    "bias": bias_rule("vblora_only"),
    "vblora_dropout": DROPOUT,
    "init_vector_bank_bound": _NUMBER,
    "init_logits_std": _NUMBER,
}

DELORA: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **EXCLUDES,
    **LAYERS,
    "r": RANK,
    "rank_pattern": RANK_PATTERN,
    "delora_lambda": _NUMBER,  # where the stored delora_lambda started
    "lambda_pattern": Rule(lambda value: isinstance(value, dict), "an object"),
    "bias": bias_rule("delora_only"),
    "module_dropout": DROPOUT,
    "init_weights": BOOLEAN,
}

GRALORA: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **LAYOUT,
    **LAYERS,
    "r": _rank(32),
    "hybrid_r": Rule(is_int(0, MAX_RANK), f"an integer from 0 to {MAX_RANK}", used=True, default=0),
    "alpha": _scale(64),
    "gralora_k": _count(2),
    "bias": bias_rule("gralora_only"),
    "gralora_dropout": DROPOUT,
    "init_weights": BOOLEAN,
}

UNILORA: Mapping[str, Rule] = {
    **COMMON,
    **TARGETS,
    **LAYOUT,
    **LAYERS,
    "r": _rank(4),
    "theta_d_length": _count(256),
    "save_indices": _saved_projection("unilora_indices and unilora_scales"),
    "bias": bias_rule("unilora_only"),
    "unilora_dropout": DROPOUT,
    "proj_seed": _SEED,
    "init_theta_d_bound": _NUMBER,
    "init_weights": BOOLEAN,
}

BEFT: Mapping[str, Rule] = {**COMMON, **TARGETS, "init_weights": BOOLEAN}
