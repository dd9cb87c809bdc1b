"""The schemas of AdapterHub's adapter_config.json, by method.

Source: the config classes of `adapters` 1.3.0, and what each key does (tests/golden/README.md). A key that the file
lacks has the default of the class that the library reads it into (`BnConfig`, `LoRAConfig`), not its preset's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from adapters.formats.schema import (
    ANYTHING,
    TEXT,
    Rule,
    is_bool,
    is_fraction,
    is_int,
    is_number,
    is_scale,
    is_text,
    or_null,
)
from adapters.normal_form import Activation

# The library's names, lower case. gelu_fast and its kin round the same tanh form differently.
ACTIVATIONS: Mapping[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
    "linear": "identity",
}


def _is_reduction(value: object) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(is_scale(factor) for factor in value.values())
    return is_scale(value)


def release(version: str) -> tuple[int, int] | None:
    """(1, 3) of `adapters.1.3.0`; None for anything else."""
    found = re.fullmatch(r"adapters\.(\d{1,4})\.(\d{1,4})(\.\w{1,16})*", version, re.ASCII)
    return None if found is None else (int(found[1]), int(found[2]))


def _switch(*, default: bool | None = None) -> Rule:
    return Rule(is_bool, "true or false", used=True, default=default, required=default is None)


_LEAVE_OUT = Rule(
    lambda value: isinstance(value, list) and all(map(is_int(0, 1 << 20), value)),
    "a list of layer indices",
    used=True,
    default=[],
)

TOP_LEVEL: Mapping[str, Rule] = {
    "config": Rule(
        lambda value: isinstance(value, dict),
        "an object",
        required=True,
        why="presets named by a string come from old releases: load the adapter with adapters 1.x and save it again",
    ),
    "name": Rule(
        lambda value: isinstance(value, str) and bool(value) and "." not in value,
        "a name without dots",
        used=True,
        required=True,
    ),
    "model_type": Rule(lambda value: isinstance(value, str), "a string", used=True, required=True),
    "hidden_size": Rule(is_int(1, 1 << 30), "a positive integer", used=True, required=True),
    "version": Rule(
        lambda value: isinstance(value, str) and release(value) is not None,
        "adapters.<release>",
        used=True,
        required=True,
        why="older releases gave activations other meanings: load the adapter with adapters 1.x and save it again",
    ),
    # decides only whether an invertible adapter is undone
    "model_class": Rule(is_text, "a string or null", used=True),
    "model_name": TEXT,  # the base check has looked at it
}

BOTTLENECK: Mapping[str, Rule] = {
    "mh_adapter": _switch(),
    "output_adapter": _switch(),
    "cross_adapter": _switch(default=False),  # decoders alone have no place for it, so no tensors either
    "is_parallel": _switch(default=False),
    "original_ln_before": _switch(default=False),
    "original_ln_after": _switch(default=True),
    "residual_before_ln": Rule(
        is_bool,
        "true or false",
        used=True,
        default=True,
        why="'post_add' fails in the library on pre-LN decoders",
    ),
    "reduction_factor": Rule(
        _is_reduction, "a positive number, or a map of layers to them", used=True, required=True
    ),
    "non_linearity": Rule(
        lambda value: isinstance(value, str) and value.lower() in ACTIVATIONS,
        f"one of {', '.join(ACTIVATIONS)}",
        used=True,
        required=True,
    ),
    "scaling": Rule(
        lambda value: value in ("learned", "channel") or (type(value) is float and is_number(value)),
        "a number with a decimal point, 'learned' or 'channel'",
        used=True,
        default=1.0,
        why="the library itself fails on an integer",
    ),
    "leave_out": _LEAVE_OUT,
    "architecture": TEXT,
    "ln_before": _switch(default=False),
    "ln_after": _switch(default=False),
    "inv_adapter": Rule(
        lambda value: value in (None, "nice"),
        "null or 'nice'",
        used=True,
        why="the library's own 'glow' can't run",
    ),
    "use_gating": _switch(default=False),
    "phm_layer": _switch(default=False),
    "adapter_residual_before_ln": _switch(default=False),  # read only beside ln_after
    "dropout": Rule(is_fraction, "a number from 0 up to 1"),
    "stochastic_depth": Rule(is_fraction, "a number from 0 up to 1"),  # training only
    **dict.fromkeys(
        # looked at by PHM and INVERTIBLE where these are on, or read only while initialising
        (
            "inv_adapter_reduction_factor",
            "init_weights",
            "init_weights_seed",
            "hypercomplex_nonlinearity",
            "learn_phm",
            "phm_bias",
            "phm_c_init",
            "phm_dim",
            "phm_init_range",
            "phm_rank",
            "factorized_phm_W",
            "factorized_phm_rule",
            "shared_W_phm",
            "shared_phm_rule",
        ),
        ANYTHING,
    ),
}

PHM: Mapping[str, Rule] = {
    "phm_dim": Rule(is_int(1, 64), "1 to 64", used=True, default=4),
    "phm_rank": Rule(is_int(1, 1 << 20), "a positive integer", used=True, default=1),
    "phm_bias": _switch(default=True),
    "factorized_phm_W": _switch(default=True),
    "factorized_phm_rule": _switch(default=False),
    "shared_W_phm": _switch(default=False),
    "shared_phm_rule": _switch(default=True),
}
"""How a bottleneck's projections are stored where `phm_layer` is on."""

INVERTIBLE: Mapping[str, Rule] = {
    "inv_adapter_reduction_factor": Rule(is_scale, "a positive number", used=True, required=True)
}

_INITIAL = {"init_weights": ANYTHING, "init_weights_seed": ANYTHING}

LORA: Mapping[str, Rule] = {
    "architecture": TEXT,
    "selfattn_lora": _switch(default=True),
    "intermediate_lora": _switch(default=False),
    "output_lora": _switch(default=False),
    "attn_matrices": Rule(
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        "a list of strings",
        used=True,
        default=["q", "v"],
    ),
    "leave_out": _LEAVE_OUT,
    "r": Rule(is_int(1, 1 << 20), "a positive integer", used=True, default=8),
    "alpha": Rule(is_scale, "a positive number", used=True, default=8),
    "composition_mode": Rule(
        lambda value: value in ("add", "scale"), "add or scale", used=True, default="add"
    ),
    "use_gating": _switch(default=False),
    "use_dora": _switch(default=False),
    **dict.fromkeys(
        ("vera_d", "vera_b"),
        Rule(
            lambda value: value is None or (type(value) is float and is_number(value)),
            "null or a number with a decimal point",
            used=True,
            why="the library itself takes an integer for null",
        ),
    ),
    "dropout": Rule(is_fraction, "a number from 0 up to 1"),
    "dtype": TEXT,  # of the parameters, which the file has
    **_INITIAL,
}

PREFIX_TUNING: Mapping[str, Rule] = {
    "architecture": TEXT,
    "flat": _switch(default=False),
    "prefix_length": Rule(is_int(1, 1 << 20), "a positive integer", used=True, default=30),
    "bottleneck_size": Rule(is_int(1, 1 << 20), "a positive integer", used=True, default=512),
    "non_linearity": Rule(
        lambda value: isinstance(value, str) and value.lower() in ACTIVATIONS,
        f"one of {', '.join(ACTIVATIONS)}",
        used=True,
        default="tanh",
    ),
    "leave_out": _LEAVE_OUT,
    "use_gating": _switch(default=False),
    "shared_gating": _switch(default=True),  # read only beside use_gating
    "encoder_prefix": _switch(default=True),  # of encoder-decoders, as is the next
    "cross_prefix": _switch(default=True),
    "dropout": Rule(is_fraction, "a number from 0 up to 1"),
    "init_weights_seed": ANYTHING,
}

_POSITIONS = Rule(is_int(0, 1 << 20), "a number of positions", used=True, required=True)

REFT: Mapping[str, Rule] = {
    "architecture": TEXT,
    "layers": Rule(
        lambda value: value == "all" or (isinstance(value, list) and all(map(is_int(0, 1 << 20), value))),
        "'all' or a list of layer indices",
        used=True,
        required=True,
    ),
    "prefix_positions": _POSITIONS,
    "suffix_positions": _POSITIONS,
    "r": Rule(is_int(1, 1 << 20), "a positive integer", used=True, required=True),
    "orthogonality": _switch(),
    "tied_weights": _switch(default=False),
    "subtract_projection": Rule(is_bool, "true or false", used=True),
    "non_linearity": Rule(
        or_null(lambda value: isinstance(value, str) and value.lower() in ACTIVATIONS),
        f"null or one of {', '.join(ACTIVATIONS)}",
        used=True,
    ),
    "output_reft": Rule(lambda value: value is True, "true", why="without it the adapter has no place"),
    "dropout": Rule(is_fraction, "a number from 0 up to 1"),
    "dtype": TEXT,
    "init_weights_seed": ANYTHING,
}

MAX_UNION = 16
UNION: Mapping[str, Rule] = {
    "architecture": TEXT,
    "configs": Rule(
        lambda value: (
            isinstance(value, list)
            and 1 <= len(value) <= MAX_UNION
            and all(isinstance(item, dict) for item in value)
        ),
        f"a list of 1 to {MAX_UNION} objects",
        used=True,
        required=True,
    ),
}
