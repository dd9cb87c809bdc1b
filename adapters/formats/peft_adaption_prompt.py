"""PEFT adaption prompts (LLaMA-Adapter) -> AttnPrefix with a softmax of its own.

Format: PEFT 0.21.2, for the last `adapter_layers` layers `<attention>.adaption_prompt` [1, l, d], which the layer's k
and v projections map to keys and values, never rotated, and `<attention>.adaption_gate` [1]. Each token's attention to
the prompt, times the gate, goes through the output projection and is added.
Source: Zhang et al. "LLaMA-Adapter" section 3.2; PEFT `AdaptedAttention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.formats.peft_config_prompt import ADAPTION_PROMPT
from adapters.formats.peft_keys import PREFIX, Placed, check_shape
from adapters.formats.problems import Problems, quoted
from adapters.formats.schema import check_config
from adapters.normal_form import AttnPrefix, Op, Site

MODEL_TYPES = ("llama", "mistral")
"""On GPT-2, PEFT adds the prompt's attention behind the output projection, which is another op."""


def read_adaption_prompt(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: BackboneSpec, problems: Problems
) -> tuple[Op, ...]:
    """The ops of an adaption prompt; what does not fit is added to `problems`."""
    config = check_config(raw, ADAPTION_PROMPT, problems)
    length, count = config["adapter_len"], config["adapter_layers"]
    if spec.model_type not in MODEL_TYPES:
        problems.add(f"peft_type: adaption prompts are served on {', '.join(MODEL_TYPES)} only.")
        return ()
    if count is not None and count > spec.num_layers:
        problems.add(f"adapter_layers: got {count}, but the backbone has {spec.num_layers} layers.")
    used: set[str] = set()
    ops: list[Op] = []
    for layer in range(max(spec.num_layers - (count or 0), 0), spec.num_layers):
        projection, _ = spec.writer[Site("o.out", layer)]
        attention = projection.path.rpartition(".")[0]
        if projection.shape.has_bias:
            problems.add(
                f"{quoted(projection.path)} has a bias, which PEFT adds twice with an adaption prompt."
            )
        if config["target_modules"] not in (None, attention.rpartition(".")[2]):
            problems.add(f"target_modules: expected null or {attention.rpartition('.')[2]!r}.")
            return ()
        keys = [f"{PREFIX}{attention}.adaption_{name}" for name in ("prompt", "gate")]
        used.update(keys)
        for key in keys:
            if key not in tensors:
                problems.add(f"A site without a tensor: the file has no {quoted(key)}.")
        if length is None or not all(key in tensors for key in keys):
            continue
        prompt, gate = (tensors[key] for key in keys)
        fits = [
            check_shape(Placed(keys[0], prompt), (1, length, spec.hidden_size), problems),
            check_shape(Placed(keys[1], gate), (1,), problems),
        ]
        if all(fits):
            rows = prompt[0]
            ops.append(
                AttnPrefix(layer=layer, key=rows, value=rows, merge="separate", gate=gate, projected=False)
            )
    for key in sorted(tensors.keys() - used):
        problems.add(
            f"A tensor without a site: {quoted(key)} is in the file, but the config does not adapt it."
        )
    return tuple(ops)
