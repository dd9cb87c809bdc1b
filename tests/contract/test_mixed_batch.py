"""Exactness (design: invariants 1 and 2): every method alone and all of them in one shuffled batch, against the
reference library (PEFT) or the float64 formula (AdapterHub placements), prefill and cached decode.

`pytest tests/contract -k mixed_batch -s` prints the table. In bf16 both libraries round, and the largest error is that
of one unlucky position (ours is 0.7 to 1.6 times PEFT's, as the seed falls): there the rule of 1.5 times the
reference's own error is put to the root mean square over all positions, and the largest error may be three times
PEFT's largest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from adapters.canonical import from_canonical, to_canonical
from adapters.formats import read_directory
from serving.engine.runner import Runner
from serving.kernels.reference import ReferenceKernels
from serving.model.backbone import Backbone, adopt_backbone
from serving.model.placement import place
from serving.model.programs import PlacedDelta
from tests.cases import (
    GOLDEN_CASES,
    GOLDEN_NAME,
    PEFT_CASES,
    Case,
    GoldenCase,
    case_id,
    quiet,
    tiny_backbone,
)
from tests.contract.bottleneck import LAYER_ONLY, Bottleneck
from tests.contract.forced import Row, errors, run
from tests.families import FAMILIES, Family

BOTTLENECKS = (
    Bottleneck("seq_bn", "relu", 8),
    Bottleneck("double_seq_bn", "swish", 4),
    Bottleneck("par_bn", "gelu", 16, scaling=4.0),
)
LIMITS = {"T1": 2e-5, "T2": 2e-4}
BARE = "bare backbone"
PROMPTS = 6


Prompts = Sequence[list[int]]


@dataclass
class Method:
    """One delta of the table: how the reference computes it, in a given dtype, and how exact we must be."""

    name: str
    tolerance: str
    reference: Callable[[torch.dtype, Prompts], list[Tensor]]
    delta: PlacedDelta | None


def base_model(family: Family, dtype: torch.dtype) -> PreTrainedModel:
    """The tiny backbone with weights that `dtype` holds exactly, in `dtype`."""
    return tiny_backbone(family).to(torch.bfloat16 if dtype == torch.bfloat16 else dtype)


def peft_logits(
    case: Case, directory: Path, weights: torch.dtype, dtype: torch.dtype, prompts: Prompts
) -> list[Tensor]:
    with quiet(), torch.no_grad():
        model = PeftModel.from_pretrained(base_model(case.family, weights).to(dtype), str(directory)).eval()
        return [
            model(input_ids=torch.tensor([p]), use_cache=False, **case.forward).logits[0, -len(p) :]
            for p in prompts
        ]


def bottleneck_logits(
    adapter: Bottleneck,
    directory: Path,
    family: Family,
    weights: torch.dtype,
    dtype: torch.dtype,
    prompts: Prompts,
) -> list[Tensor]:
    model = base_model(family, weights).to(torch.float64 if dtype == torch.float32 else dtype)
    model.set_experts_implementation("eager")  # the default, grouped_mm, has no float64
    return [adapter.logits(directory, family, model, prompt) for prompt in prompts]


@torch.no_grad()
def bare_logits(family: Family, weights: torch.dtype, dtype: torch.dtype, prompts: Prompts) -> list[Tensor]:
    model = base_model(family, weights).to(dtype)
    return [model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts]


def served(directory: Path, backbone: Backbone) -> PlacedDelta:
    """Upload format -> normal form -> canonical bytes -> device, as the server does it."""
    stored = to_canonical(read_directory(directory, backbone.spec))
    return place(from_canonical(stored.manifest, stored.tensors), stored.digest, backbone, ReferenceKernels())


def methods(family: Family, dtype: torch.dtype, backbone: Backbone, tmp_path: Path) -> list[Method]:
    found = [Method(BARE, "T1", partial(bare_logits, family, dtype), None)]
    for case in (c for c in PEFT_CASES if c.family == family):
        directory = tmp_path / case.name
        case.save(directory, base_model(family, dtype).float())
        reference = partial(peft_logits, case, directory, dtype)
        found.append(Method(case.name, case.tolerance, reference, served(directory, backbone)))
    for adapter in BOTTLENECKS[:1] if family in LAYER_ONLY else BOTTLENECKS:
        directory = tmp_path / adapter.name
        adapter.save(directory, family, backbone.model)
        reference = partial(bottleneck_logits, adapter, directory, family, dtype)
        found.append(Method(adapter.name, "T1", reference, served(directory, backbone)))
    return found


def rows_for(found: list[Method], chunk: int = 1 << 30) -> list[list[Row]]:
    """Per method, rows of different lengths; the same tokens whatever the order in which they run."""
    draw = random.Random(4)
    rows = []
    for method in found:
        mine = []
        for _ in range(PROMPTS):
            prefill, decode = draw.randint(3, 17), draw.randint(4, 7)
            tokens = [draw.randrange(97) for _ in range(prefill + decode)]
            mine.append(Row(method.name, tokens, prefill, method.delta, chunk))
        rows.append(mine)
    return rows


def shuffled(rows: list[list[Row]]) -> list[Row]:
    flat = [row for mine in rows for row in mine]
    random.Random(9).shuffle(flat)
    return flat


def worst(rows: list[Row], references: list[Tensor]) -> tuple[float, float]:
    """Largest error of (prefill, cached decode) over a method's prompts."""
    pairs = [errors(row, reference) for row, reference in zip(rows, references, strict=True)]
    return max(p for p, _ in pairs), max(d for _, d in pairs)


def rms_of(differences: list[Tensor]) -> float:
    return float(torch.cat(differences).double().pow(2).mean().sqrt())


def rms(rows: list[Row], references: list[Tensor]) -> float:
    """Root mean square error over every logit of a method's prompts."""
    return rms_of([torch.cat(row.logits) - r for row, r in zip(rows, references, strict=True)])


ROUNDED = ("llama", "gpt2")  # bf16 in every run; the other families' is slow
# Rounded, a mixture of experts is not one function: between transformers' own eager and SDPA attention a token near a
# tie goes to another expert, and errors measure which tokens those are.
UNROUNDED = ("mixtral", "qwen3_moe")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(pytest.param(family, torch.float32, id=f"{family}-fp32") for family in FAMILIES),
        *(
            pytest.param(
                family,
                torch.bfloat16,
                id=f"{family}-bf16",
                marks=() if family in ROUNDED else pytest.mark.slow,
            )
            for family in FAMILIES
            if family not in UNROUNDED
        ),
    ],
)
def test_mixed_batch_equals_reference(family: Family, dtype: torch.dtype, tmp_path: Path) -> None:
    label = str(dtype).removeprefix("torch.")
    backbone = adopt_backbone(base_model(family, dtype), name="tiny", device="cpu", dtype=label)
    found = methods(family, dtype, backbone, tmp_path)
    runner = Runner(backbone, ReferenceKernels(), num_slots=len(found) * PROMPTS, max_len=64)
    alone, together, chunked = rows_for(found), rows_for(found), rows_for(found, chunk=4)
    for row in shuffled(alone):
        run(runner, [row])
    run(runner, shuffled(together))
    run(runner, shuffled(chunked))

    print(f"\n{family} {label}: max |logit error| over {PROMPTS} prompts, every position")
    columns = ("alone: prefill", "decode", "mixed: prefill", "decode", "chunked", "limit", "rms / PEFT's")
    print(f"{'method':24}" + "".join(f"{column:>15}" for column in columns))
    for index, method in enumerate(found):
        prompts = [row.tokens for row in alone[index]]
        references = method.reference(torch.float32, prompts)
        scale = max(1.0, *(float(r.abs().max()) for r in references))
        measured = [*worst(alone[index], references), *worst(together[index], references)]
        measured.append(max(worst(chunked[index], references)))
        if dtype == torch.float32:
            limit, ratios = LIMITS[method.tolerance] * scale, []
        else:
            own = [o - r for o, r in zip(method.reference(torch.bfloat16, prompts), references, strict=True)]
            limit = 3.0 * max(float(o.abs().max()) for o in own)
            ratios = [rms(rows[index], references) / rms_of(own) for rows in (alone, together, chunked)]
        cells = "".join(f"{value:15.1e}" for value in (*measured, limit))
        print(f"{method.name:24}{cells}" + (f"{max(ratios):15.2f}" if ratios else ""))
        assert max(measured) <= limit, (method.name, measured, limit)
        assert max(ratios, default=0.0) <= 1.5, (method.name, ratios)
        if method.delta is not None:
            bare = bare_logits(family, dtype, torch.float32, prompts)
            assert float((references[0] - bare[0]).abs().max()) > 0.05, f"{method.name} does nothing"


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=case_id)
def test_mixed_batch_of_adapterhub_goldens(case: GoldenCase) -> None:
    """AdapterHub's own logits, stored by its own environment; bare rows run beside."""
    backbone = adopt_backbone(case.backbone(), name=GOLDEN_NAME, device="cpu", dtype="float32")
    delta = served(case.directory, backbone)
    runner = Runner(backbone, ReferenceKernels(), num_slots=4, max_len=32)
    golden = case.golden()
    rows = [Row("golden", g["input_ids"].tolist(), len(g["input_ids"]) // 2, delta) for g in golden]
    bare = [Row(BARE, row.tokens, row.num_prefill, None) for row in rows]
    run(runner, [rows[0], bare[0], rows[1], bare[1]])
    for row, stored in zip(rows, golden, strict=True):
        scale = max(1.0, float(stored["logits"].abs().max()))
        limit = LIMITS[case.tolerance] * scale
        measured = max(errors(row, stored["logits"]))
        print(f"\n{case_id(case)}: {measured:.1e}, limit {limit:.1e}", end="")
        assert measured <= limit
    changed = torch.cat(rows[0].logits) - torch.cat(bare[0].logits)
    assert float(changed.abs().max()) > 0.05
