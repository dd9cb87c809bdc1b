"""Exactness (design: invariants 1 and 2): every method alone and all of them in one shuffled batch, against the
reference library (PEFT) or the float64 formula (AdapterHub placements), prefill and cached decode.

`pytest tests/contract -k mixed_batch -s` prints the table; `exactness.py` has the limits. `python -m tests.fidelity`
runs every method on every family.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.engine.runner import Runner
from serving.kernels.select import Choice
from serving.model.backbone import Backbone, adopt_backbone
from tests.cases import GOLDEN_CASES, GOLDEN_NAME, PEFT_CASES, GoldenCase, case_id
from tests.contract.bottleneck import refused_placements
from tests.contract.exactness import (
    BARE,
    BOTTLENECKS,
    EFFECT,
    LIMITS,
    PROMPTS,
    RMS_RATIO,
    UNROUNDED,
    Method,
    bare_outputs,
    base_model,
    bottleneck_logits,
    expected,
    peft_outputs,
    rms,
    rows_for,
    served,
    shuffled,
    worst,
)
from tests.contract.forced import Row, errors, run
from tests.families import FAMILIES, Family

ROUNDED = ("llama", "gpt2")  # bf16 in every run; the other families' is slow


def methods(family: Family, dtype: torch.dtype, backbone: Backbone, tmp_path: Path) -> list[Method]:
    found = [Method(BARE, "T1", partial(bare_outputs, family, dtype), None)]
    for case in (c for c in PEFT_CASES if c.family == family):
        directory = tmp_path / case.name
        case.save(directory, base_model(family, dtype).float())
        reference = partial(peft_outputs, case, directory, dtype)
        found.append(Method(case.name, case.tolerance, reference, served(directory, backbone)))
    for adapter in (a for a in BOTTLENECKS if a.placement not in refused_placements(family)):
        directory = tmp_path / adapter.name
        adapter.save(directory, family, backbone.model)
        reference = partial(bottleneck_logits, adapter, directory, family, dtype)
        found.append(Method(adapter.name, "T1", reference, served(directory, backbone)))
    return found


@pytest.mark.parametrize(
    ("family", "dtype", "kernels"),
    [
        *(pytest.param(family, torch.float32, "auto", id=f"{family}-fp32") for family in FAMILIES),
        *(pytest.param(family, torch.float32, "reference", id=f"{family}-fp32-torch") for family in ROUNDED),
        *(
            pytest.param(
                family,
                torch.bfloat16,
                "auto",
                id=f"{family}-bf16",
                marks=() if family in ROUNDED else pytest.mark.slow,
            )
            for family in FAMILIES
            if family not in UNROUNDED
        ),
    ],
)
def test_mixed_batch_equals_reference(
    family: Family, dtype: torch.dtype, kernels: Choice, tmp_path: Path
) -> None:
    label = str(dtype).removeprefix("torch.")
    backbone = adopt_backbone(
        base_model(family, dtype), name="tiny", device="cpu", dtype=label, kernels=kernels
    )
    found = methods(family, dtype, backbone, tmp_path)
    runner = Runner(backbone, num_slots=len(found) * PROMPTS, max_len=64)
    alone, together, chunked = rows_for(found), rows_for(found), rows_for(found, chunk=4)
    for row in shuffled(alone):
        run(runner, [row])
    run(runner, shuffled(together))
    run(runner, shuffled(chunked))

    print(f"\n{family} {label}: max |logit error| over {PROMPTS} prompts, every position")
    columns = (
        "alone: prefill", "decode", "mixed: prefill", "decode", "chunked", "limit", "alone - mixed", "rms / PEFT's",
    )  # fmt: skip
    print(f"{'method':24}" + "".join(f"{column:>15}" for column in columns))
    for index, method in enumerate(found):
        prompts = [row.given for row in alone[index]]
        target = expected(method, dtype, prompts)
        references, limit = target.logits, target.limit
        measured = [*worst(alone[index], references), *worst(together[index], references)]
        measured.append(max(worst(chunked[index], references)))
        ratios = []
        if target.own_rms is not None:
            ratios = [rms(rows[index], references) / target.own_rms for rows in (alone, together, chunked)]
        apart = max(distance(one, other) for one, other in zip(alone[index], together[index], strict=True))
        cells = "".join(f"{value:15.1e}" for value in (*measured, limit, apart))
        print(f"{method.name:24}{cells}" + (f"{max(ratios):15.2f}" if ratios else ""))
        assert max(measured) <= limit, (method.name, measured, limit)
        assert apart <= limit, (method.name, apart, limit)
        assert max(ratios, default=0.0) <= RMS_RATIO, (method.name, ratios)
        if method.delta is not None:
            bare = bare_outputs(family, dtype, torch.float32, prompts)
            assert float((references[0] - bare[0]).abs().max()) > EFFECT, f"{method.name} does nothing"


def distance(row: Row, other: Row) -> float:
    """Largest difference of two runs of the same row."""
    return float((torch.cat(row.logits) - torch.cat(other.logits)).abs().max())


@pytest.mark.parametrize("chunk", [1 << 30, 2], ids=["whole", "chunked"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_adapterhub_goldens_in_one_batch(family: Family, chunk: int) -> None:
    """Every golden adapter of a backbone beside all others: AdapterHub's logits, whatever the neighbours."""
    cases = [case for case in GOLDEN_CASES if case.family == family]
    backbone = adopt_backbone(cases[0].backbone(), name=GOLDEN_NAME, device="cpu", dtype="float32")
    runner = Runner(backbone, num_slots=2 * len(cases), max_len=32)
    rows: dict[Row, tuple[GoldenCase, Tensor]] = {}
    for case in cases:
        delta = served(case.directory, backbone)
        for stored in case.golden():
            tokens = stored["input_ids"].tolist()
            rows[Row(case.name, tokens, len(tokens) - 1, delta, chunk)] = case, stored["logits"]
    run(runner, shuffled([[row] for row in rows]))
    for row, (case, logits) in rows.items():
        limit = LIMITS[case.tolerance] * max(1.0, float(logits.abs().max()))
        assert max(errors(row, logits)) <= limit, case.name


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=case_id)
def test_mixed_batch_of_adapterhub_goldens(case: GoldenCase) -> None:
    """AdapterHub's own logits, stored by its own environment; bare rows run beside."""
    backbone = adopt_backbone(case.backbone(), name=GOLDEN_NAME, device="cpu", dtype="float32")
    delta = served(case.directory, backbone)
    runner = Runner(backbone, num_slots=4, max_len=32)
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
    assert float(changed.abs().max()) > EFFECT
