"""PEFT adapters (adapter_config.json + adapter_model.safetensors) -> Delta. PEFT itself is never imported.

Format: PEFT 0.21.2; older releases where their keys mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from adapters.backbone_spec import BackboneSpec
from adapters.formats.base_claim import check_base
from adapters.formats.files import Upload
from adapters.formats.peft_adalora import read_adalora
from adapters.formats.peft_adaption_prompt import read_adaption_prompt
from adapters.formats.peft_beft import read_beft
from adapters.formats.peft_delora import read_delora
from adapters.formats.peft_gralora import read_gralora
from adapters.formats.peft_head import pooled_as_trained, split_head, task_of
from adapters.formats.peft_hra import read_hra
from adapters.formats.peft_ia3 import read_ia3
from adapters.formats.peft_keys import under_body
from adapters.formats.peft_ln_tuning import read_ln_tuning
from adapters.formats.peft_loha import read_loha
from adapters.formats.peft_lora import read_lora
from adapters.formats.peft_miss import read_miss
from adapters.formats.peft_oft import read_boft, read_oft
from adapters.formats.peft_poly import read_poly
from adapters.formats.peft_prompt import (
    read_cartridge,
    read_cpt,
    read_multitask_prompt_tuning,
    read_p_tuning,
    read_prefix_tuning,
    read_prompt_tuning,
)
from adapters.formats.peft_randlora import read_randlora
from adapters.formats.peft_refused import REFUSED_METHODS
from adapters.formats.peft_road import read_road
from adapters.formats.peft_tokens import read_trainable_tokens
from adapters.formats.peft_unilora import read_unilora
from adapters.formats.peft_vblora import read_vblora
from adapters.formats.peft_vera import read_pvera, read_vera
from adapters.formats.peft_weight_delta import read_c3a, read_lokr, read_shira
from adapters.formats.problems import Problems, name_or_kind
from adapters.normal_form import Delta, Op, VirtualTokens

Reader = Callable[[Mapping[str, Any], Mapping[str, Tensor], BackboneSpec, Problems], tuple[Op, ...]]

READERS: Mapping[str, Reader] = {
    "LORA": read_lora,
    "IA3": read_ia3,
    "PREFIX_TUNING": read_prefix_tuning,
    "PROMPT_TUNING": read_prompt_tuning,
    "ADALORA": read_adalora,
    "BEFT": read_beft,
    "CARTRIDGE": read_cartridge,
    "CPT": read_cpt,
    "DELORA": read_delora,
    "GRALORA": read_gralora,
    "LOHA": read_loha,
    "MISS": read_miss,
    "MULTITASK_PROMPT_TUNING": read_multitask_prompt_tuning,
    "POLY": read_poly,
    "PVERA": read_pvera,
    "P_TUNING": read_p_tuning,
    "RANDLORA": read_randlora,
    "UNILORA": read_unilora,
    "VBLORA": read_vblora,
    "VERA": read_vera,
    "OFT": read_oft,
    "BOFT": read_boft,
    "ROAD": read_road,
    "HRA": read_hra,
    "SHIRA": read_shira,
    "LOKR": read_lokr,
    "C3A": read_c3a,
    "LN_TUNING": read_ln_tuning,
    "TRAINABLE_TOKENS": read_trainable_tokens,
    "ADAPTION_PROMPT": read_adaption_prompt,
}


def read_peft(
    upload: Upload, spec: BackboneSpec, backbone_digest: str | None, problems: Problems
) -> Delta | None:
    """The delta of a PEFT adapter, or None where its method is not served; what is wrong is added to `problems`."""
    config = upload.config
    method = config.get("peft_type")
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        got = name_or_kind(method)
        hint = " This looks like an AdapterHub config: name its tensors adapter.safetensors." * (
            "config" in config
        )
        reason = REFUSED_METHODS.get(method) if isinstance(method, str) else None
        problems.add(
            f"adapter_config.json: peft_type: {got} is not served: {reason}"
            if reason
            else f"adapter_config.json: peft_type: got {got}, supported: {', '.join(READERS)}.{hint}",
            param="peft_type",
        )
        return None
    assert isinstance(method, str)
    claimed, revision = config.get("base_model_name_or_path"), config.get("revision")
    lineage = check_base(
        claimed if isinstance(claimed, str) else None,  # another type is refused by the method's schema
        revision if isinstance(revision, str) else None,
        spec,
        backbone_digest,
        problems,
    )
    task = task_of(config, upload.task, spec, problems)
    split = split_head(config, under_body(upload.tensors, spec), task, spec, problems)
    ops = reader(split.config, split.tensors, spec, problems) + split.stages
    head = pooled_as_trained(split.spec, ops, spec)
    delta = Delta(
        method=method,
        ops=ops,
        task=task.value,
        head=head,
        backbone_digest=spec.digest,
        lineage={"format": "peft", **lineage},
    )
    if spec.kind == "encoder-decoder" and any(isinstance(op, VirtualTokens) for op in ops):
        return delta  # they stand before the encoder's tokens; the decoder's are positioned from 0
    return replace(delta, position_offset=delta.num_virtual_tokens)
