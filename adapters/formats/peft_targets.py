"""Which modules a PEFT config adapts, and which rank and alpha each has, without running a regular expression.

Source: PEFT 0.21.2 `check_target_module_exists` and `get_pattern_key`. Strings in `target_modules` are regular
expressions there; here the adapted kinds of modules must instead be the same in every layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from adapters.backbone_spec import BackboneSpec, ModuleKind, ModuleSpec
from adapters.formats.problems import Problems, quoted

ALL_LINEAR = "all-linear"
LINEAR_KINDS: tuple[ModuleKind, ...] = ("linear", "conv1d")

T = TypeVar("T")


def matches(path: str, names: Collection[str]) -> bool:
    """True where `path` is one of `names` or ends in "." and one of them."""
    return any(path == name or path.endswith("." + name) for name in names)


def pattern_value(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that matches `path` as `(.*\\.)?(pattern)$` does, else `default`.

    Patterns hold no quantifiers (`is_pattern`), so `.` is one character and the match is a comparison in place.
    """
    for pattern, value in patterns.items():
        body = pattern.removeprefix("^")
        start = len(path) - len(body)
        anchored = start == 0 or (start > 0 and path[start - 1] == "." and body == pattern)
        if anchored and all(want in (".", got) for want, got in zip(body, path[start:], strict=True)):
            return value
    return default


def expected_paths(
    config: Mapping[str, Any],
    spec: BackboneSpec,
    adapted: Collection[str],
    problems: Problems,
    kinds: Collection[str],
) -> set[str]:
    """Paths of the modules that must have tensors.

    `config`: the checked `target_modules` and, where the method has them, `exclude_modules`, `layers_to_transform` and
    `modules_to_save` (PEFT adapts no module that it saves whole).
    `adapted`: the paths that have tensors; they decide where the config holds a regular expression or nothing.
    `kinds`: the kinds of modules that the method adapts. Of heads that the trained model may have lacked, only what is
    adapted is expected.
    """
    found = _configured_paths(config, spec, adapted, problems, kinds)
    lacking = {module.path for module in spec.modules if module.in_head} - set(adapted)
    return found - lacking


def _configured_paths(
    config: Mapping[str, Any],
    spec: BackboneSpec,
    adapted: Collection[str],
    problems: Problems,
    kinds: Collection[str],
) -> set[str]:
    """The paths that the config names."""
    targets = config["target_modules"]
    excluded = [*(config.get("exclude_modules") or ()), *(config.get("modules_to_save") or ())]
    if isinstance(targets, list):
        return {
            module.path
            for module in _named(targets, spec, problems, kinds)
            if not matches(module.path, excluded)
            and _in_layers(module, config.get("layers_to_transform"), targets)
        }
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        inside = (m for m in _of_kinds(spec, kinds) if _layer(m) is not None or m.in_head)
        return {module.path for module in inside if not matches(module.path, excluded)}
    return _same_in_every_layer(spec, adapted, kinds)


def _named(
    targets: Sequence[str], spec: BackboneSpec, problems: Problems, kinds: Collection[str]
) -> list[ModuleSpec]:
    named = []
    for module in spec.modules:
        if not matches(module.path, targets):
            continue
        if module.shape.kind in kinds:
            named.append(module)
        else:
            problems.add(
                f"target_modules: {quoted(module.path)} is {_ARTICLES[module.shape.kind]}; only "
                f"{_KINDS_SHOWN.get(frozenset(kinds), 'linear modules')} can be adapted here at present.",
                param="target_modules",
            )
    return named


_ARTICLES = {
    "linear": "a linear module",
    "conv1d": "a Conv1D",
    "norm": "a norm",
    "embedding": "an embedding",
    "layer": "a whole layer",
}
_KINDS_SHOWN = {
    frozenset({"norm"}): "norms",
    frozenset({"embedding"}): "embeddings",
}


def _of_kinds(spec: BackboneSpec, kinds: Collection[str]) -> list[ModuleSpec]:
    return [module for module in spec.modules if module.shape.kind in kinds]


def _layer(module: ModuleSpec) -> int | None:
    """The module's layer; None for modules that exist once."""
    layer = module.writes[0].site.layer
    return None if layer < 0 else layer


def _in_layers(module: ModuleSpec, layers: int | Sequence[int] | None, targets: Sequence[str]) -> bool:
    # PEFT applies layers_to_transform only to suffix matches: a target given by its whole path stays
    if layers is None or layers == [] or module.path in targets:
        return True
    return _layer(module) in ([layers] if isinstance(layers, int) else layers)


def _same_in_every_layer(spec: BackboneSpec, adapted: Collection[str], kinds: Collection[str]) -> set[str]:
    """The adapted modules, completed so that every layer has the kinds of modules that any layer has."""
    present = [module for module in _of_kinds(spec, kinds) if module.path in adapted]
    sites = {frozenset(part.site.name for part in module.writes) for module in present}
    return {
        module.path
        for module in _of_kinds(spec, kinds)
        if frozenset(part.site.name for part in module.writes) in sites
    }
