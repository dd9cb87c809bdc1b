"""What exactness is measured with: a method, its reference in any dtype, its rows, their error and its limit.

Used by `test_mixed_batch.py` (the rows of `tests/cases.py`) and by `tests/fidelity.py` (every method on every family).

In bf16 both libraries round, and the largest error is that of one unlucky position (ours is 0.7 to 1.6 times PEFT's,
as the seed falls): there the rule of 1.5 times the reference's own error is put to the root mean square over all
positions, and the largest error may be three times PEFT's largest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora.variants import calculate_alora_offsets
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapters.canonical import from_canonical, to_canonical
from adapters.formats import read_directory, read_upload
from adapters.positions import FromInvocation
from serving.model.backbone import Backbone
from serving.model.placement import place
from serving.model.programs import PlacedDelta
from serving.offline.lowering import to_delta
from serving.offline.peft_source import changes_of, load_adapter, method_of
from tests.cases import Case, quiet, tiny_backbone
from tests.contract.bottleneck import Bottleneck
from tests.contract.forced import Given, Row, errors
from tests.families import CONFIGS, ENCODERS, SEQ2SEQ, AnyFamily, Family

BOTTLENECKS = (
    Bottleneck("seq_bn", "relu", 8),
    Bottleneck("double_seq_bn", "swish", 4),
    Bottleneck("par_bn", "gelu", 16, scaling=4.0),
)
LIMITS = {"T1": 2e-5, "T2": 2e-4}
BARE = "bare backbone"
SKIPPED = CONFIGS["roberta"].pad_token_id
PROMPTS = 6
RMS_RATIO = 1.5  # bf16: root mean square error over the reference's own
EFFECT = 0.05  # a delta that moves no logit by this much does nothing, and would pass every test
# Rounded, a mixture of experts is not one function: between transformers' own eager and SDPA attention a token near a
# tie goes to another expert, and errors measure which tokens those are.
UNROUNDED = ("mixtral", "qwen3_moe")


Prompts = Sequence[Given]


@dataclass
class Method:
    """One delta of the table: how the reference computes it, in a given dtype, and how exact we must be."""

    name: str
    tolerance: str
    reference: Callable[[torch.dtype, Prompts], list[Tensor]]
    delta: PlacedDelta | None


@dataclass(frozen=True)
class Expected:
    """The reference's logits [T, V] per prompt, the largest error allowed, and in bf16 the reference's own rms."""

    logits: list[Tensor]
    limit: float
    own_rms: float | None


def base_model(family: AnyFamily, dtype: torch.dtype) -> PreTrainedModel:
    """The tiny backbone with weights that `dtype` holds exactly, in `dtype`."""
    return tiny_backbone(family).to(torch.bfloat16 if dtype == torch.bfloat16 else dtype)


def peft_outputs(
    case: Case, directory: Path, weights: torch.dtype, dtype: torch.dtype, prompts: Prompts
) -> list[Tensor]:
    """What `outputs_of` says of PEFT's own model, loaded from `directory`."""
    base = base_model(case.family, weights).to(dtype)
    body = base.base_model
    with quiet():
        model = PeftModel.from_pretrained(base, str(directory)).eval()
        found = []
        for prompt in prompts:
            with _invoked(model, torch.tensor([prompt.tokens])):
                found.append(outputs_of(model, body, case.family, prompt, **case.forward))
        return found


@torch.no_grad()
def outputs_of(
    model: nn.Module, body: nn.Module, family: AnyFamily, prompt: Given, **arguments: Tensor
) -> Tensor:
    """Logits [T, V] of the prompt's tokens; on an encoder the final hidden states [T, d] that `body` computes."""
    tokens = torch.tensor([prompt.tokens])
    if family in SEQ2SEQ:
        adapted, read = read_by_encoder(model, torch.tensor([prompt.source]), arguments)
        return adapted(decoder_input_ids=tokens, use_cache=False, **read).logits[0]
    if family not in ENCODERS:
        out = model(input_ids=tokens, use_cache=False, **arguments)
        return out.logits[0, -len(prompt.tokens) :]
    states: list[Tensor] = []
    handle = body.register_forward_hook(lambda _module, _args, out: states.append(out.last_hidden_state[0]))
    try:
        model(input_ids=tokens, **arguments)
    finally:
        handle.remove()
    return states[-1][-len(prompt.tokens) :]


def read_by_encoder(
    model: nn.Module, source: Tensor, arguments: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder-decoder to call, and how it reads `source`: under a multitask prompt as PEFT's `generate` has it.

    PEFT's `forward` also puts rows before the decoder's tokens there, which its `generate` does not.
    """
    config = model.peft_config["default"] if isinstance(model, PeftModel) else None
    if config is None or config.peft_type != PeftType.MULTITASK_PROMPT_TUNING:
        return model, {"input_ids": source, **arguments}
    prompt = model.get_prompt(batch_size=1, **arguments)[:, : config.num_virtual_tokens]
    embedded = torch.cat([prompt, model.word_embeddings(source)], dim=1)
    return model.get_base_model(), {"inputs_embeds": embedded}


def _invoked(model: PeftModel, ids: Tensor) -> AbstractContextManager[None]:
    """On MPT PEFT's `forward` leaves aLoRA out; its `generate` does not, and this is what that does."""
    config = model.peft_config["default"]
    if model.config.model_type != "mpt" or not getattr(config, "alora_invocation_tokens", None):
        return nullcontext()
    offsets = calculate_alora_offsets(model.peft_config, "default", ids)
    hooks: AbstractContextManager[None] = model.base_model._enable_peft_forward_hooks(alora_offsets=offsets)
    return hooks


def bottleneck_logits(
    adapter: Bottleneck,
    directory: Path,
    family: Family,
    weights: torch.dtype,
    dtype: torch.dtype,
    prompts: Prompts,
) -> list[Tensor]:
    """Logits [T, V] per prompt of a bottleneck by formula; fp32 is computed in float64."""
    model = base_model(family, weights).to(torch.float64 if dtype == torch.float32 else dtype)
    model.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    return [adapter.logits(directory, family, model, prompt.tokens) for prompt in prompts]


def bare_outputs(
    family: AnyFamily, weights: torch.dtype, dtype: torch.dtype, prompts: Prompts
) -> list[Tensor]:
    """What `outputs_of` says of the stock model without a delta."""
    model = base_model(family, weights).to(dtype)
    return [outputs_of(model, model.base_model, family, prompt) for prompt in prompts]


def served(directory: Path, backbone: Backbone) -> PlacedDelta:
    """Upload format -> normal form -> canonical bytes -> device, as the server does it."""
    stored = to_canonical(read_directory(directory, backbone.spec))
    return place(from_canonical(stored.manifest, stored.tensors), stored.digest, backbone)


def converted(directory: Path, family: AnyFamily, dtype: torch.dtype, backbone: Backbone) -> PlacedDelta:
    """As `served`, for what only `deltamux convert` makes an upload of: each module probed under PEFT."""
    with quiet():
        adapted, _ = load_adapter(base_model(family, dtype).float(), directory)
        changes = changes_of(adapted, base_model(family, dtype), quota_bytes=1 << 30)
    pair = to_canonical(to_delta(changes, backbone.spec, method=method_of(adapted), lineage={}))
    delta = read_upload({"manifest.json": pair.manifest, "tensors.safetensors": pair.tensors}, backbone.spec)
    return place(delta, pair.digest, backbone)


def expected(method: Method, dtype: torch.dtype, prompts: Prompts) -> Expected:
    """What `method` must compute for `prompts`, and how exactly, when it is served in `dtype`."""
    references = method.reference(torch.float32, prompts)
    if dtype == torch.float32:
        scale = max(1.0, *(float(r.abs().max()) for r in references))
        return Expected(references, LIMITS[method.tolerance] * scale, None)
    own = [o - r for o, r in zip(method.reference(torch.bfloat16, prompts), references, strict=True)]
    return Expected(references, 3.0 * max(float(o.abs().max()) for o in own), rms_of(own))


def rows_for(
    found: Sequence[Method], chunk: int = 1 << 30, *, family: AnyFamily = "llama"
) -> list[list[Row]]:
    """Per method, rows of different lengths; the same tokens whatever the order in which they run.

    An encoder's run whole, and without the token that its positions skip.
    """
    draw = random.Random(4)
    rows = []
    for method in found:
        mine = []
        for _ in range(PROMPTS):
            prefill, decode = draw.randint(3, 17), draw.randint(4, 7)
            tokens = [draw.randrange(97) for _ in range(prefill + decode)]
            source = tuple(draw.randrange(97) for _ in range(draw.randint(1, 17) * (family in SEQ2SEQ)))
            if family in ENCODERS:
                prefill, tokens = len(tokens), [2 if token == SKIPPED else token for token in tokens]
            if method.delta is not None:
                for positions in method.delta.positions:
                    if isinstance(positions, FromInvocation):
                        _invoke(tokens, positions.tokens, len(mine))
            mine.append(Row(method.name, tokens, prefill, method.delta, chunk, source=source))
        rows.append(mine)
    return rows


def _invoke(tokens: list[int], invocation: tuple[int, ...], index: int) -> None:
    """Write the invocation into the prompt: further back with each prompt, in one twice, in the last not at all."""
    if index < PROMPTS - 1:
        for wanted in {1 + 3 * index, 1 + index}:
            at = min(wanted, len(tokens) - len(invocation))
            tokens[at : at + len(invocation)] = invocation


def shuffled(rows: list[list[Row]]) -> list[Row]:
    """All rows in one fixed random order."""
    flat = [row for mine in rows for row in mine]
    random.Random(9).shuffle(flat)
    return flat


def worst(rows: list[Row], references: list[Tensor]) -> tuple[float, float]:
    """Largest error of (prefill, cached decode) over a method's prompts."""
    pairs = [errors(row, reference) for row, reference in zip(rows, references, strict=True)]
    return max(p for p, _ in pairs), max(d for _, d in pairs)


def rms_of(differences: list[Tensor]) -> float:
    """Root mean square over every logit of all prompts."""
    return float(torch.cat(differences).double().pow(2).mean().sqrt())


def rms(rows: list[Row], references: list[Tensor]) -> float:
    """Root mean square error over every logit of a method's prompts."""
    return rms_of([torch.cat(row.logits) - r for row, r in zip(rows, references, strict=True)])
