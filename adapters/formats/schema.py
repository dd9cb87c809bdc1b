"""Checking an uploaded config: every key is used, inert, or must keep the value that switches its feature off."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.formats.problems import Problems, kind_of, quoted

Check = Callable[[Any], bool]

_MAX_SCALE = 1e9


@dataclass(frozen=True, slots=True)
class Rule:
    """What a config key may hold.

    `used`: the reader asks for it, `default` where the file has none. Others are only checked: inert keys accept
    what can't change a number, the rest only what switches their feature off, `why` saying what that feature is.
    `explain` turns a refused value that it knows into a whole reason.
    """

    accepts: Check
    expected: str
    used: bool = False
    default: Any = None
    required: bool = False
    why: str = ""
    explain: Callable[[Any], str | None] | None = None


def check_config(
    raw: Mapping[str, Any], rules: Mapping[str, Rule], problems: Problems, *, prefix: str = ""
) -> dict[str, Any]:
    """The used keys with their values, defaults filled in; a refused value is None, with the reason in `problems`.

    `prefix` is put before the keys in messages (`config.` for a nested object).
    """
    for key in sorted(raw.keys() - rules.keys()):
        problems.add(
            f"adapter_config.json: the key {quoted(prefix + key)} is not known for this method, so neither is what it "
            "changes. Remove it only if it has no effect.",
            param=prefix + key if key.isidentifier() and len(key) <= 64 else "adapter",
        )
    values: dict[str, Any] = {}
    for key, rule in rules.items():
        value = raw.get(key, rule.default)
        if key not in raw and rule.required:
            problems.add(
                f"adapter_config.json: {prefix}{key} is missing, expected {rule.expected}.", param=key
            )
            value = None
        elif key in raw and not rule.accepts(value):
            problems.add(f"adapter_config.json: {prefix}{key}: {_reason(value, rule)}", param=prefix + key)
            value = None
        if rule.used:
            values[key] = value
    return values


def is_bool(value: object) -> bool:
    """True for true and false."""
    return type(value) is bool


def is_int(low: int, high: int) -> Check:
    """A check for integers (not booleans) in [low, high]."""
    return lambda value: type(value) is int and low <= value <= high


def is_scale(value: object) -> bool:
    """True for a positive finite number of sensible size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MAX_SCALE


def is_number(value: object) -> bool:
    """True for a finite number."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def is_fraction(value: object) -> bool:
    """True for a number in [0, 1), such as a dropout rate."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def is_text(value: object) -> bool:
    """True for a string or null."""
    return value is None or isinstance(value, str)


def is_names(value: object) -> bool:
    """True for a list of non-empty strings."""
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def is_object(value: object) -> bool:
    """True for an object or null."""
    return value is None or isinstance(value, dict)


def or_null(check: Check) -> Check:
    """A check that also takes null."""
    return lambda value: value is None or check(value)


def off(*values: object, why: str) -> Rule:
    """A key that may only hold the values that switch its feature off."""
    shown = " or ".join(_JSON.get(repr(value), repr(value)) for value in values)
    return Rule(
        lambda got: any(type(got) is type(value) and got == value for value in values), shown, why=why
    )


_JSON = {"None": "null", "False": "false", "True": "true"}

BOOLEAN = Rule(is_bool, "true or false")
TEXT = Rule(is_text, "a string or null")
OBJECT = Rule(is_object, "an object or null")
ANYTHING = Rule(lambda _: True, "any value")


def _reason(value: object, rule: Rule) -> str:
    if rule.explain is not None and (reason := rule.explain(value)):
        return reason
    why = f" ({rule.why})" if rule.why else ""
    return f"got {kind_of(value)}, expected {rule.expected}{why}."
