"""Adapters that the user's own PEFT loads: loading one, and what it changes in every module.

Runs only in the worker process (and in tests). PEFT reads its own formats here, regenerates what they draw from seeds
and decomposes base weights; nothing of it is trusted but numbers that the probe has checked.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import peft
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel

from adapters.errors import InvalidDelta
from serving.offline.compress import Change, smallest
from serving.offline.pickled import read_tensors
from serving.offline.probe import AffineMap, NotAffineError, check_equal, recover

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
SHOWN = 6  # problems of a kind repeat in every layer
VERSION: str = peft.__version__

FIRST_TASK: Mapping[str, Tensor] = {"task_ids": torch.tensor([0])}
TASK_METHODS = frozenset({"POLY", "MULTITASK_PROMPT_TUNING"})
"""Methods whose forward asks which task; readers serve files that hold one."""


def unpickle(source: Path, into: Path) -> None:
    """Write the pickled adapter in `source` as PEFT would write it today. Raises InvalidDelta."""
    loaded = read_tensors(source / PICKLED)
    shutil.copyfile(source / CONFIG, into / CONFIG)
    save_file({key: value.clone().contiguous() for key, value in loaded.items()}, into / TENSORS)


def load_adapter(model: PreTrainedModel, source: Path) -> tuple[PeftModel, list[str]]:
    """The adapted model in eval mode, and what PEFT warned of. `model` is adapted in place.

    Raises InvalidDelta where PEFT can't load the adapter, or not all of it.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(model, str(source)).eval()
            wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        except Exception as error:  # PEFT raises whatever its parts raise
            raise InvalidDelta([f"PEFT {VERSION} can't load it: {_first_line(error)}"]) from error
    with safe_open(source / TENSORS, framework="pt") as file:
        stored = set(file.keys())
    problems = [f"PEFT has no place for the tensor {key}." for key in sorted(stored - wanted)]
    problems += [
        f"PEFT would have saved a tensor {key}, which the file lacks." for key in sorted(wanted - stored)
    ]
    if problems:
        raise InvalidDelta(problems)
    return adapted, sorted({str(w.message).splitlines()[0] for w in caught if w.category is UserWarning})


def method_of(adapted: PeftModel) -> str:
    """The method's name, as its config has it."""
    return str(adapted.peft_config[adapted.active_adapter].peft_type.value)


def forward_arguments(adapted: PeftModel) -> Mapping[str, Tensor]:
    """What the model is called with beside the tokens."""
    return FIRST_TASK if method_of(adapted) in TASK_METHODS else {}


@torch.no_grad()
def greedy(adapted: PeftModel, prompt: list[int], new_tokens: int) -> tuple[list[int], Tensor]:
    """`prompt` with its most likely continuation, and the logits [T, V] of all its tokens; without a cache.

    Raises InvalidDelta where PEFT can't run the adapter.
    """
    sequence, arguments = list(prompt), forward_arguments(adapted)
    for _ in range(new_tokens + 1):
        try:
            out = adapted(input_ids=torch.tensor([sequence]), use_cache=False, **arguments).logits[0]
        except Exception as error:  # PEFT raises whatever its parts raise
            raise InvalidDelta([f"PEFT {VERSION} can't run it: {_first_line(error)}"]) from error
        logits = out[-len(sequence) :].float().contiguous()  # virtual tokens come first
        sequence.append(int(logits[-1].argmax()))
    return sequence[:-1], logits


def changes_of(
    adapted: PeftModel,
    pristine: PreTrainedModel,
    *,
    quota_bytes: int,
    on_module: Callable[[str], object] = lambda _: None,
) -> dict[str, Change]:
    """Module path -> what the adapter adds there, each checked against the adapted module in float64 and fp32.

    `pristine`: the backbone without the adapter, since some methods alter the base weights that they wrap.
    Raises InvalidDelta listing every module that can't be written down as one affine change.
    """
    if adapted.peft_config[adapted.active_adapter].is_prompt_learning:
        raise InvalidDelta(["It acts through virtual tokens, not in modules, so there is nothing to probe."])
    base = adapted.get_base_model()
    problems = list(_elsewhere(base, pristine))
    changes: dict[str, Change] = {}
    size = 0
    for path, layer in base.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        on_module(path)
        try:
            change = change_of(layer, pristine.get_submodule(path))
        except NotAffineError as error:
            problems.append(f"{path}: {error}.")
            continue
        except Exception as error:  # a layer of PEFT's may want more than its input
            problems.append(f"{path}: it can't be run by itself: {_first_line(error)}")
            continue
        if change.tensors():
            changes[path] = change
        size += change.size_bytes
        if size > quota_bytes:
            problems.append(
                f"{path}: the changes up to here take {size} bytes, over the quota of {quota_bytes}."
            )
            break
    if not (changes or problems):
        problems.append("The adapter changes no module, so it would have no effect.")
    if (rest := len(problems) - SHOWN) > 0:
        problems[SHOWN:] = [f"... and {rest} more like these."]
    if problems:
        raise InvalidDelta(
            problems, remedy="What is not one affine change of a linear module can't be converted."
        )
    return changes


def change_of(layer: nn.Module, pristine: nn.Module) -> Change:
    """What the adapted `layer` adds to `pristine`. Raises NotAffineError."""
    if not isinstance(pristine, nn.Linear | Conv1D):
        raise NotAffineError(f"{type(pristine).__name__} is no linear module")
    weight = pristine.weight.detach().double()
    weight = weight.T if isinstance(pristine, Conv1D) else weight
    bias = torch.zeros(len(weight)) if pristine.bias is None else pristine.bias.detach()
    base = AffineMap(weight, bias.double())
    d_in = weight.shape[1]
    change = smallest(_recovered(layer, d_in), base)
    check_equal(layer, lambda x: change.apply(base, x), d_in, dtype=torch.float32)
    return change


def _recovered(layer: nn.Module, d_in: int) -> AffineMap:
    """What `layer` computes; probed in fp32 only where it keeps tensors that can't be cast."""
    layer.double()
    try:
        return recover(layer, d_in)
    except RuntimeError:  # operands of different dtypes; any other failure comes again below
        pass
    finally:
        layer.float()  # exact: its weights were fp32
    return recover(layer, d_in, dtype=torch.float32)


def _elsewhere(base: PreTrainedModel, pristine: PreTrainedModel) -> Iterator[str]:
    """What the adapter changes outside of the layers that it wraps."""
    modules = dict(base.named_modules())
    wrapped = {path for path, module in modules.items() if isinstance(module, BaseTunerLayer)}
    for path, module in modules.items():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield f"{path}: a trained copy of the whole module, or of rows of it, is not converted."
    for name, original in pristine.named_parameters():
        path = name.rpartition(".")[0]
        if path in wrapped or isinstance(modules.get(path), AuxiliaryTrainingWrapper):
            continue
        found = getattr(modules.get(path), name.rpartition(".")[2], None)
        if found is None:
            yield f"{name}: PEFT has put something else in its place, which is not converted."
        elif not torch.equal(found, original.to(found.dtype)):
            yield f"{name}: the adapter changes it outside of the layers that it wraps."


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
