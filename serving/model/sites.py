"""Delta-aware modules: an instance-level `forward` on every site module of an unmodified transformers model.

The override costs a few microseconds a call and nothing else when the batch has no program for the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from adapters.backbone_spec import BackboneSpec
from serving.model.context import ForwardContext, active_context
from serving.model.programs import Program


def install_sites(model: nn.Module, spec: BackboneSpec) -> None:
    """Hook every module of `spec`; a module's index in `spec.modules` is its index in `ForwardContext.programs`."""
    for index, module in enumerate(spec.modules):
        _hook(model.get_submodule(module.path), index, is_layer=module.shape.kind == "layer")
        if module.writes[0].site.name == "final":
            _keep_hidden(model.get_submodule(module.path))
    if spec.kind == "encoder":
        insert_virtual_tokens(model.get_submodule(spec.modules[0].path))


def _hook(module: nn.Module, index: int, *, is_layer: bool) -> None:
    base = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        context = active_context()
        program = None if context is None else context.programs[index]
        if program is None:
            return base(x, *args, **kwargs)
        assert context is not None
        if context.padding is not None:
            return context.padding.run(index, program, context, base, x, args, kwargs)
        if is_layer:
            return _run_layer(program, context, base, x, args, kwargs)
        return program.run(context, base, x, args, kwargs)

    module.forward = forward


def _run_layer(
    program: Program,
    context: ForwardContext,
    base: Callable[..., Any],
    x: Tensor,
    args: Any,
    kwargs: dict[str, Any],
) -> Any:
    """What `program` makes of a layer, some of which give a tuple: T5's hand position biases on."""
    rest: tuple[Any, ...] = ()

    def states(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal rest
        out = base(given, *args, **kwargs)
        first: Tensor = out
        if isinstance(out, tuple):
            first, *others = out
            rest = tuple(others)
        return first

    y = program.run(context, states, x, args, kwargs)
    return (y, *rest) if rest else y


def _keep_hidden(module: nn.Module) -> None:
    base = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = base(*args, **kwargs)
        if (context := active_context()) is not None:
            context.keep_hidden(out)
        return out

    module.forward = forward


def insert_virtual_tokens(embedding: nn.Module) -> None:
    """Let `embedding` put the context's virtual tokens in their places."""
    base = embedding.forward

    def forward(token_ids: Tensor) -> Any:
        out = base(token_ids)
        if (context := active_context()) is not None and context.inserted:
            context.insert(out)
        return out

    embedding.forward = forward
