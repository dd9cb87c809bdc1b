"""The schema of AdapterHub's adapter_config.json for bottleneck adapters.

Source: `BnConfig` of `adapters` 1.3.0, and what each key does on pre-LN decoders (tests/golden/README.md). A key that
the file lacks has `BnConfig`'s default, not its preset's.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapters.formats.schema import (
    ANYTHING,
    BOOLEAN,
    TEXT,
    Rule,
    is_bool,
    is_fraction,
    is_int,
    is_number,
    is_scale,
    off,
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


def _switch(*, default: bool | None = None) -> Rule:
    return Rule(is_bool, "true or false", used=True, default=default, required=default is None)


# Switched on, these give an adapter other tensors: looking for a plain one's would only add noise.
LAYOUT_KEYS = ("ln_before", "ln_after", "inv_adapter", "use_gating", "phm_layer")

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
        lambda value: isinstance(value, str) and value.startswith("adapters."),
        "adapters.<release>",
        required=True,
        why="older releases gave activations other meanings: load the adapter with adapters 1.x and save it again",
    ),
    "model_class": TEXT,  # decides only how an invertible adapter is undone
    "model_name": TEXT,  # the base check has looked at it
}

BOTTLENECK: Mapping[str, Rule] = {
    "mh_adapter": _switch(),
    "output_adapter": _switch(),
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
    "leave_out": Rule(
        lambda value: isinstance(value, list) and all(map(is_int(0, 1 << 20), value)),
        "a list of layer indices",
        used=True,
        default=[],
    ),
    "architecture": off(None, why="another method"),
    "ln_before": off(False, why="a norm inside the adapter is not executed yet"),
    "ln_after": off(False, why="a norm inside the adapter is not executed yet"),
    "inv_adapter": off(None, why="invertible adapters at the embedding are not executed yet"),
    "use_gating": off(False, why="the gate is a mean over the whole sequence, so it depends on later tokens"),
    "phm_layer": off(False, why="hypercomplex projections (Compacter) are not expanded yet"),
    "cross_adapter": BOOLEAN,  # decoders have no place for it, so no tensors either
    "adapter_residual_before_ln": BOOLEAN,  # read only beside ln_after
    "dropout": Rule(is_fraction, "a number from 0 up to 1"),
    "stochastic_depth": Rule(is_fraction, "a number from 0 up to 1"),  # training only
    **dict.fromkeys(
        # read only where inv_adapter or phm_layer is on, or while initialising
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
